// Runs before `npm pack` and `npm publish`: compiles dist/ afresh, and refuses to make a package without its prebuilt
// addon and CUDA library, or with ones that need a newer glibc than the README promises. Writes prebuilds/SHA256SUMS,
// which lib/runtime/native.ts checks. ROPEWALK_PACK_WITHOUT_CUDA=1 is for tests where there is no nvcc.
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { root, run } from './setup.js'

/** Node 20's own. */
const NEWEST_GLIBC = '2.28'
const ADDON = 'linux-x64/ropewalk.glibc.node'
const CUDA_LIBRARY = 'linux-x64/libropewalk_cuda.so'
const PREBUILT = process.env.ROPEWALK_PACK_WITHOUT_CUDA === '1' ? [ADDON] : [ADDON, CUDA_LIBRARY]

const prebuilds = join(root, 'prebuilds')
const problems = PREBUILT.map(problemOf).filter(Boolean)
if (problems.length > 0) {
  for (const problem of problems) console.error(`prepack: ${problem}`)
  process.exit(1)
}
rmSync(join(root, 'dist'), { recursive: true, force: true })
run(process.execPath, ['node_modules/typescript/bin/tsc', '-p', 'tsconfig.json'])
writeFileSync(join(prebuilds, 'SHA256SUMS'), PREBUILT.map((path) => `${sha256(path)}  ${path}\n`).join(''))

function problemOf(path) {
  const file = join(prebuilds, path)
  if (!existsSync(file)) return `prebuilds/${path} is missing: npm run build:prebuilds (needs nvcc)`
  const needed = glibcOf(file)
  const newer = needed.localeCompare(NEWEST_GLIBC, 'en', { numeric: true }) > 0
  return newer && `prebuilds/${path} needs glibc ${needed}, but may need ${NEWEST_GLIBC} at most (see csrc/glibc.cc)`
}

/** The newest version among the symbols that a file takes from glibc. */
function glibcOf(file) {
  const { status, stdout, stderr } = spawnSync('objdump', ['-T', file], { encoding: 'utf8' })
  if (status !== 0) throw new Error(`objdump -T ${file}: ${stderr}`)
  const versions = [...stdout.matchAll(/GLIBC_([\d.]+)/g)].map(([, version]) => version)
  return versions.sort((a, b) => a.localeCompare(b, 'en', { numeric: true })).at(-1)
}

function sha256(path) {
  return createHash('sha256')
    .update(readFileSync(join(prebuilds, path)))
    .digest('hex')
}
