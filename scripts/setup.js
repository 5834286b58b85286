// Brings a clone to where its commands can run: installs packages, builds the addon and dist/ where they are missing or
// older than their sources. No dependencies, because it runs before there are any.
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = dirname(dirname(fileURLToPath(import.meta.url)))

/** Runs a command with its output shown; ends this process with its exit code where it fails. */
export function run(command, args, options = {}) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: 'inherit', ...options })
  if (error?.code === 'ENOENT') {
    console.error(
      `ropewalk: \`${command}\` is not on PATH. A clone needs Node >= 20.19, CMake >= 3.18 and a C++17 compiler`,
    )
    process.exit(1)
  }
  if (status !== 0) process.exit(status ?? 1)
}

/** The latest modification among files and, recursively, folders; 0 for what is not there. */
export function newest(...paths) {
  let time = 0
  for (const path of paths.map((name) => join(root, name))) {
    if (!existsSync(path)) continue
    const stat = statSync(path)
    if (stat.isDirectory()) {
      for (const entry of readdirSync(path)) time = Math.max(time, newest(join(path, entry).slice(root.length + 1)))
    } else time = Math.max(time, stat.mtimeMs)
  }
  return time
}

function checkNode() {
  const [major, minor] = process.versions.node.split('.').map(Number)
  if (major > 20 || (major === 20 && minor >= 19)) return
  console.error(`ropewalk needs Node >= 20.19; this is ${process.versions.node}`)
  process.exit(1)
}

export function setup() {
  checkNode()
  const step = (text) => console.error(`-- ${text}`)
  if (newest('node_modules/.package-lock.json') < newest('package-lock.json')) {
    step('installing packages')
    run('npm', ['ci', '--no-audit', '--no-fund'])
  }
  if (newest('lib/runtime/ops.gen.ts') < newest('csrc/ops.def')) {
    step('generating the emitters from csrc/ops.def')
    run(process.execPath, ['scripts/ops.js'])
  }
  // the addon does not contain the CUDA kernels
  const addonSources = readdirSync(join(root, 'csrc')).filter((name) => name !== 'cuda' && name !== 'simt')
  const sources = [...addonSources.map((name) => join('csrc', name)), 'CMakeLists.txt']
  if (newest('build/Release/ropewalk.node') < newest(...sources)) {
    step('building the addon')
    run(process.execPath, ['scripts/cmake.js'])
  }
  if (newest('dist/index.js') < newest('lib', 'tsconfig.json')) {
    step('compiling lib/ to dist/')
    run(process.execPath, ['node_modules/typescript/bin/tsc', '-p', 'tsconfig.json'])
  }
}
