// `npm test`: sets up what is missing or stale, then type-checks, lints, runs the native tests under ASan and UBSan, and
// the suite under tap. Arguments are test files; with some, only those run. Ends with "N passed, N failed, N skipped".
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { root, run, setup } from './setup.js'

setup()
const files = process.argv.slice(2)
const total = { passed: 0, failed: 0, skipped: 0 }

if (files.length === 0) {
  check('types', ['node_modules/typescript/bin/tsc', '-p', 'test/tsconfig.json'])
  check('lint', ['scripts/lint.js'])
  nativeTests()
}
tap()
if (files.length === 0) packageTest()
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
  for (const program of readdirSync(join(root, work)).filter((name) => name.endsWith('_test'))) {
    const { status, stdout, stderr, signal } = spawnSync(join(root, work, program), { encoding: 'utf8' })
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

function tap() {
  const log = join(root, '.tap', 'all.tap')
  mkdirSync(join(root, '.tap'), { recursive: true })
  rmSync(log, { force: true })
  const args = ['node_modules/tap/dist/esm/run.mjs', 'run', '--reporter=terse', `--output-file=${log}`, ...files]
  const { status } = spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit' })
  const text = existsSync(log) ? readFileSync(log, 'utf8') : ''
  const summary = text.match(/^# \{ .*\}$/gm)?.at(-1)
  const of = (name) => Number(new RegExp(`\\b${name}: (\\d+)`).exec(summary ?? '')?.[1] ?? 0)
  count(of('pass'), of('fail'), of('skip') + of('todo'))
  if (status !== 0 && of('fail') === 0) {
    total.failed++
    console.error(`not ok: tap ended with code ${status}`)
  }
}

/** Makes the tarball and uses it as a stranger would; ends with a line "package: N passed, N failed, N skipped". */
function packageTest() {
  const { status, stdout } = spawnSync(process.execPath, ['scripts/package-test.js'], {
    cwd: root,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const summary = /(\d+) passed, (\d+) failed, (\d+) skipped\s*$/.exec(stdout)
  if (summary) count(...summary.slice(1).map(Number))
  if (!summary || (status !== 0 && Number(summary[2]) === 0)) {
    total.failed++
    console.error(`not ok: the package test ended with code ${status}`)
  }
}

function count(passed, failed, skipped) {
  total.passed += passed
  total.failed += failed
  total.skipped += skipped
}
