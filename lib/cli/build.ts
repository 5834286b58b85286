import { spawn, spawnSync } from 'node:child_process'
import { accessSync, constants, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { RopewalkError } from '../errors.js'
import { BUILT_ADDON, PACKAGE_ROOT } from '../runtime/native.js'
import { TABLE_HASH } from '../runtime/ops.gen.js'
import { type Command, commonOptions } from './options.js'
import { formatDuration, type Output } from './output.js'

const options = { ...commonOptions }

/** As in CMakeLists.txt. */
const OLDEST_CMAKE = [3, 18] as const

export const build: Command<typeof options> = {
  name: 'build',
  summary: 'Builds the native addon from source, for machines that no prebuilt one fits.',
  details:
    `Needs CMake >= ${OLDEST_CMAKE.join('.')}, a C++17 compiler, and make or ninja; nothing is downloaded. It takes about a\n` +
    'minute and leaves the addon in the package, where it goes before a prebuilt one. Where there is nvcc (12.4 or later)\n' +
    'it builds the CUDA backend too, which takes minutes; ROPEWALK_CUDA=off leaves that out, =on insists on it. In a\n' +
    'clone, npm run build:native and npm run build:cuda are quicker: they compile only what changed.',
  examples: ['ropewalk build', 'CXX=clang++ ropewalk build'],
  operands: [],
  options,
  async run(_, output) {
    const missing = findMissing()
    if (missing.length > 0) {
      throw new RopewalkError('ERR_BUILD', `cannot build from source: ${missing.join('; ')}. ${INSTALL}`)
    }
    const started = performance.now()
    // A work folder that was copied along with the package would be refused by CMake.
    const work = join(PACKAGE_ROOT, '.cmake')
    rmSync(work, { recursive: true, force: true })
    const ended = await show(output, join(PACKAGE_ROOT, 'scripts', 'cmake.js'))
    if (ended !== 0) {
      throw new RopewalkError('ERR_BUILD', `the build ended with ${ended}; the output above says why`)
    }
    rmSync(work, { recursive: true, force: true })
    verify()
    const seconds = (performance.now() - started) / 1000
    output.line(`built ${join(PACKAGE_ROOT, BUILT_ADDON)} in ${formatDuration(seconds)}. Next: ropewalk doctor`)
    output.value({ addon: BUILT_ADDON, seconds })
  },
}

const INSTALL =
  'Debian and Ubuntu: apt install cmake g++ make; Fedora and RHEL: dnf install cmake gcc-c++ make; ' +
  'Alpine: apk add cmake g++ make; a newer CMake for any of them: pip install cmake'

/** Everything that the build needs and this machine lacks, with what to do about what no package manager brings. */
function findMissing(): string[] {
  const missing: string[] = []
  const { stdout } = spawnSync('cmake', ['--version'], { encoding: 'utf8' })
  const version = /version (\d+)\.(\d+)/.exec(stdout ?? '')
  const [major, minor] = OLDEST_CMAKE
  if (!version) missing.push(`cmake is not on PATH (>= ${major}.${minor} is needed)`)
  else if (Number(version[1]) < major || (Number(version[1]) === major && Number(version[2]) < minor)) {
    missing.push(`cmake is ${version[1]}.${version[2]}, but >= ${major}.${minor} is needed`)
  }
  const compilers = process.env.CXX ? [process.env.CXX] : ['c++', 'g++', 'clang++']
  if (!compilers.some(compiles)) missing.push(`no C++17 compiler (tried ${compilers.join(', ')})`)
  if (!has('make') && !has('ninja')) missing.push('neither make nor ninja is on PATH')
  const require = createRequire(join(PACKAGE_ROOT, 'package.json'))
  for (const name of ['node-api-headers', 'node-addon-api']) {
    try {
      require.resolve(name)
    } catch {
      missing.push(`the package ${name} is not installed (reinstall ropewalk with its dependencies)`)
    }
  }
  try {
    accessSync(PACKAGE_ROOT, constants.W_OK)
  } catch {
    missing.push(`${PACKAGE_ROOT} is not writable (run this as its owner, or install ropewalk in a folder of your own)`)
  }
  return missing
}

const has = (tool: string): boolean => spawnSync(tool, ['--version']).status === 0

/** Whether a compiler, as $CXX spells it, knows C++17. */
function compiles(compiler: string): boolean {
  const [program = '', ...args] = compiler.trim().split(/\s+/)
  const input = '#include <optional>\nint main() { if constexpr (true) return std::optional<int>(0).value(); }\n'
  const test = ['-std=c++17', '-x', 'c++', '-fsyntax-only', '-']
  return spawnSync(program, [...args, ...test], { input }).status === 0
}

/** Runs a script with its output on stderr, as it comes: CMake's own lines say how far it is. Returns how it ended. */
function show(output: Output, script: string): Promise<number | string> {
  const env = { ROPEWALK_CUDA: 'auto', ...(!has('make') && { CMAKE_GENERATOR: 'Ninja' }), ...process.env }
  const child = spawn(process.execPath, [script], { env, stdio: ['ignore', 'pipe', 'pipe'] })
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => output.stderr.write(text))
  }
  return new Promise((resolve, reject) => {
    child.on('error', reject)
    child.on('close', (code, signal) => resolve(code ?? signal ?? 1))
  })
}

/** Loads the new addon in a process of its own; one that does not work is removed, so that a prebuilt one stays in use. */
function verify(): void {
  const file = join(PACKAGE_ROOT, BUILT_ADDON)
  const script = 'const { tableHash, backends } = require(process.argv[1]); backends(); process.stdout.write(tableHash)'
  const { stdout, stderr, signal } = spawnSync(process.execPath, ['-e', script, file], { encoding: 'utf8' })
  if (stdout === TABLE_HASH) return
  rmSync(file, { force: true })
  const reason = signal ?? (stderr.match(/^.*Error: .*$/m)?.[0] || `its op table is ${stdout}, not ${TABLE_HASH}`)
  throw new RopewalkError('ERR_BUILD', `the addon was built, but does not work and was removed: ${reason}`)
}
