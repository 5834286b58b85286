// Configures and builds the addon into build/Release. Uses cmake-js where it is installed, else plain cmake. With --cuda,
// or ROPEWALK_CUDA=on (fails without nvcc) or auto (where there is nvcc), the CUDA backend too: that takes minutes.
// `configure` and `build`, never `compile`: the latter ignores changed options and wipes the tree after an error.
// The work folder lies outside build/, which node-gyp deletes.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const work = join(root, '.cmake')
const out = join(root, 'build', 'Release')
const cuda = process.argv.includes('--cuda') ? 'on' : process.env.ROPEWALK_CUDA || 'off'
const cmakeJs = join(root, 'node_modules', 'cmake-js', 'bin', 'cmake-js')

function run(command, args) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: 'inherit' })
  if (error?.code === 'ENOENT') {
    console.error(
      `ropewalk: \`${command}\` is not on PATH; building from source needs CMake >= 3.18 and a C++17 compiler`,
    )
    process.exit(1)
  }
  if (status !== 0) process.exit(status ?? 1)
}

if (existsSync(cmakeJs)) {
  const options = ['-d', root, '-O', work, `--CDROPEWALK_OUT=${out}`, `--CDROPEWALK_CUDA=${cuda}`]
  run(process.execPath, [cmakeJs, 'configure', ...options])
  run(process.execPath, [cmakeJs, 'build', ...options])
} else {
  run('cmake', ['-S', root, '-B', work, `-DROPEWALK_OUT=${out}`, `-DROPEWALK_CUDA=${cuda}`])
  run('cmake', ['--build', work, '--parallel', String(availableParallelism())])
}
