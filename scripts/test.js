// `npm test`: sets up what is missing or stale, then type-checks, lints, runs the native tests under ASan and UBSan, the
// suite under tap, the CUDA kernels on the CPU, and what nvcc alone can tell of them. Arguments are test files; with
// some, only those run under tap. ROPEWALK_TEST_PARTS names parts (below). Ends with "N passed, N failed, N skipped".
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { root, run, setup } from './setup.js'

setup()
const files = process.argv.slice(2)
const total = { passed: 0, failed: 0, skipped: 0 }

const parts = {
  types: () => check('types', ['node_modules/typescript/bin/tsc', '-p', 'test/tsconfig.json']),
  lint: () => check('lint', ['scripts/lint.js']),
  native: nativeTests,
  tap: () => tap('all', files, simtLibrary('fast', { build: files.length === 0 })),
  simt: simtTests,
  mutation: mutationTests,
  cuda: () => script('scripts/cuda-check.js'),
  package: () => script('scripts/package-test.js'),
}
const only = files.length > 0 ? ['tap'] : (process.env.ROPEWALK_TEST_PARTS?.split(',') ?? Object.keys(parts))
for (const name of only) {
  if (!parts[name]) {
    console.error(`ROPEWALK_TEST_PARTS: there is no part "${name}"; known are ${Object.keys(parts).join(', ')}`)
    process.exit(1)
  }
  const start = performance.now()
  parts[name]()
  console.error(`-- ${name}: ${((performance.now() - start) / 1000).toFixed(0)} s`)
}
console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`)
process.exit(total.failed > 0 ? 1 : 0)

/** A check that is one pass or one failure. */
function check(name, args) {
  const { status } = spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit' })
  if (status === 0) total.passed++
  else {
    total.failed++
    console.error(`not ok: ${name}`)
  }
}

/** The C++ test programs; each ends with a line "<name>: N passed, N failed, N skipped". */
function nativeTests() {
  const work = '.cmake-native'
  const flags = ['-DROPEWALK_ADDON=OFF', '-DROPEWALK_NATIVE_TESTS=ON', '-DROPEWALK_SANITIZE=address,undefined']
  const quiet = { stdio: ['ignore', 'ignore', 'inherit'] }
  console.error('-- building the native tests with ASan and UBSan')
  run('cmake', ['-S', '.', '-B', work, ...flags], quiet)
  run('cmake', ['--build', work, '--parallel', '2'], quiet)
  programs(work)
}

/** Runs the test programs in a folder. */
function programs(folder, env = {}) {
  for (const program of readdirSync(join(root, folder)).filter((name) => name.endsWith('_test'))) {
    const { status, stdout, stderr, signal } = spawnSync(join(root, folder, program), {
      encoding: 'utf8',
      env: { ...process.env, ...env },
      maxBuffer: 1 << 26,
    })
    process.stderr.write(stderr)
    const summary = /(\d+) passed, (\d+) failed, (\d+) skipped\s*$/.exec(stdout)
    if (summary) count(...summary.slice(1).map(Number))
    if (!summary || (status !== 0 && Number(summary[2]) === 0)) {
      total.failed++
      console.error(`not ok: ${program} ended with ${signal ?? `code ${status}`}`)
    } else console.error(`${status === 0 ? 'ok' : 'not ok'}: ${stdout.trim().split('\n').at(-1)}`)
    if (status !== 0) process.stdout.write(stdout)
  }
}

/**
 * The environment in which the device simt is there. Building takes a minute, so that a run of some test files takes it
 * as it is.
 */
function simtLibrary(flavour, { build }) {
  const work = `.cmake-simt-${flavour}`
  const library = join(root, work, 'libropewalk_simt.so')
  if (build) {
    const flags = ['-DROPEWALK_ADDON=OFF', '-DROPEWALK_SIMT=ON', `-DROPEWALK_SIMT_FLAVOUR=${flavour}`]
    const quiet = { stdio: ['ignore', 'ignore', 'inherit'] }
    console.error(`-- building the CUDA kernels for the CPU: ${flavour}`)
    run('cmake', ['-S', '.', '-B', work, ...flags], quiet)
    run('cmake', ['--build', work, '--parallel', '2'], quiet)
  }
  return existsSync(library) ? { ROPEWALK_SIMT_LIBRARY: library } : {}
}

/** The CUDA kernels, executed by the CPU: in each flavour the emulator's own tests and the tests of all ops. */
function simtTests() {
  const ops = readdirSync(join(root, 'test', 'ops'))
    .filter((name) => name.endsWith('.test.ts'))
    .map((name) => `test/ops/${name}`)
  const once = (share) => ({ ROPEWALK_TEST_RUNS: '1', ROPEWALK_TEST_SHARE: share })
  simtFlavour('fast', [...ops, 'test/model/model.test.ts'], {})
  simtFlavour('race', ['test/simt/accesses.ts', ...ops], once('0/4')) // the longest on one core first
  // Node itself is not instrumented: the sanitizer has to be there before it starts.
  const { stdout } = spawnSync('g++', ['-print-file-name=libasan.so'], { encoding: 'utf8' })
  const asan = { LD_PRELOAD: stdout.trim(), ASAN_OPTIONS: 'detect_leaks=0:verify_asan_link_order=0' }
  simtFlavour('sanitize', ops, { ...once('2/4'), ...asan })
}

function simtFlavour(flavour, files, more) {
  const start = performance.now()
  const env = { ...simtLibrary(flavour, { build: true }), ROPEWALK_TEST_DEVICE: 'simt', ...more }
  const built = performance.now()
  programs(`.cmake-simt-${flavour}`)
  tap(`simt-${flavour}`, files, env)
  const seconds = (from, to) => ((to - from) / 1000).toFixed(0)
  console.error(`-- simt ${flavour}: built in ${seconds(start, built)} s, ran ${seconds(built, performance.now())} s`)
}

/** Every barrier of the CUDA kernels, left out once. */
function mutationTests() {
  tap('mutation', ['test/simt/barriers.ts'], simtLibrary('race', { build: true }))
}

function tap(name, files, env = {}) {
  const log = join(root, '.tap', `${name}.tap`)
  mkdirSync(join(root, '.tap'), { recursive: true })
  rmSync(log, { force: true })
  const args = ['node_modules/tap/dist/esm/run.mjs', 'run', '--reporter=terse', `--output-file=${log}`, ...files]
  const { status } = spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit', env: { ...process.env, ...env } })
  const text = existsSync(log) ? readFileSync(log, 'utf8') : ''
  const summary = text.match(/^# \{ .*\}$/gm)?.at(-1)
  const of = (name) => Number(new RegExp(`\\b${name}: (\\d+)`).exec(summary ?? '')?.[1] ?? 0)
  count(of('pass'), of('fail'), of('skip') + of('todo'))
  if (status !== 0 && of('fail') === 0) {
    total.failed++
    console.error(`not ok: tap ended with code ${status}`)
  }
}

/** A script that ends with a line "<name>: N passed, N failed, N skipped". */
function script(path) {
  const { status, stdout } = spawnSync(process.execPath, [path], {
    cwd: root,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const summary = /(\d+) passed, (\d+) failed, (\d+) skipped\s*$/.exec(stdout)
  process.stderr.write(stdout)
  if (summary) count(...summary.slice(1).map(Number))
  if (!summary || (status !== 0 && Number(summary[2]) === 0)) {
    total.failed++
    console.error(`not ok: ${path} ended with code ${status}`)
  }
}

function count(passed, failed, skipped) {
  total.passed += passed
  total.failed += failed
  total.skipped += skipped
}
