// `npm run gpu` without a GPU: the bundle, its stand-in for tap, and a rehearsal on the emulator where that is built.
import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { Device } from '../../lib/runtime/device.js'

const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
const place = mkdtempSync(join(tmpdir(), 'ropewalk-gpu-test-'))
t.teardown(() => rmSync(place, { recursive: true, force: true }))
const bundle = join(place, 'bundle')

/** Why a device is not there, or false. */
function absence(device: string): string | false {
  try {
    Device.open(device).dispose()
    return false
  } catch (error) {
    return `skipped: ${(error as Error).message}`
  }
}

/** Node as it is, without what the runner of these tests adds to it. */
function node(args: string[], more: NodeJS.ProcessEnv = {}) {
  const { NODE_OPTIONS: _, OUT: __, ...env } = process.env
  const { status, stdout, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8', env: { ...env, ...more } })
  return { status, stdout, stderr, last: stdout.trim().split('\n').at(-1) }
}

t.test('a bundle is made', async (t) => {
  const { status, stdout, stderr } = node([join(root, 'scripts', 'gpu-bundle.js'), bundle])
  t.equal(status, 0, stderr)
  t.match(stdout, /bundle: \d+\.\d MB; there: sh run\.sh/)
  t.match(JSON.parse(readFileSync(join(bundle, 'bundle.json'), 'utf8')), { commit: String, date: /^\d{4}-/ })
  for (const name of [
    'lib/cli/main.js',
    'lib/bench/peers.py',
    'test/ops/matmul.test.js',
    'test/fixtures/manifest.json',
  ]) {
    t.ok(readFileSync(join(bundle, name)).length > 0, name)
  }
  const other = join(place, 'other')
  mkdirSync(other)
  writeFileSync(join(other, 'precious'), '')
  const refused = node([join(root, 'scripts', 'gpu-bundle.js'), other])
  t.equal(refused.status, 1)
  t.match(refused.stderr, /other is no bundle, and not empty: name another folder/)
  t.same(readdirSync(other), ['precious'])
})

t.test('its tests run without tap, and count as they do with it', async (t) => {
  const file = join(bundle, 'test/ops/swiglu.test.js')
  const { status, stdout, last } = node([file], { ROPEWALK_TEST_DEVICE: 'cpu' })
  t.equal(status, 0, stdout)
  t.match(last, /^\d{3,} passed, 0 failed, 0 skipped$/)
  const part = node([file], { ROPEWALK_TEST_DEVICE: 'cpu', ROPEWALK_TEST_ONLY: 'special values' })
  t.match(part.last, /^[1-9] passed, 0 failed, 0 skipped$/)
})

t.test('what fails is seen', async (t) => {
  const file = join(bundle, 'test', 'wrong.test.js')
  const checks: [holds: string, fails: string][] = [
    ['t.ok(1)', 't.ok(0)'],
    ['t.notOk(0)', 't.notOk(1)'],
    ['t.equal(1, 1)', "t.equal(1, '1')"],
    ['t.not(1, 2)', 't.not(1, 1)'],
    ['t.same({ a: 1 }, { a: 1 })', 't.same({ a: 1 }, { a: 2 })'],
    ['t.notSame([1], [2])', 't.notSame([1], [1])'],
    ['t.strictSame([new Uint8Array(2)], [new Uint8Array(2)])', 't.strictSame([0], [-0])'],
    ['t.match({ a: "xy", b: 1, c: [5] }, { a: /y/, b: Number, c: [5] })', 't.match({ a: "xy" }, { a: /z/ })'],
    ['t.match("a b", "b")', 't.match({ a: undefined }, { a: String })'],
    ['t.throws(() => { throw new Error("x") }, { message: /x/ })', 't.throws(() => 1)'],
    [
      'await t.rejects(Promise.reject(new RangeError("x")), { name: "RangeError" })',
      'await t.rejects(Promise.resolve())',
    ],
    [
      'await t.rejects(async () => { throw new Error("x") }, /x/)',
      'await t.rejects(Promise.reject(new Error("x")), /y/)',
    ],
    ['await t.test("inner", async (t) => { t.ok(1) })', 't.test("inner", async (t) => { t.fail("inside") })'],
    ['t.teardown(() => undefined); t.ok(1)', 'throw new Error("thrown")'],
  ]
  const write = (which: 0 | 1): void => {
    const tests = checks.map((pair, i) => `t.test('${i}', async (t) => { ${pair[which]} })`)
    writeFileSync(file, ["import t from 'tap'", ...tests, "t.test('x', { skip: 'why' }, () => {})"].join('\n'))
  }
  write(0)
  const good = node([file])
  t.strictSame([good.status, good.last], [0, `${checks.length} passed, 0 failed, 1 skipped`], good.stdout)
  write(1)
  const bad = node([file])
  t.strictSame([bad.status, bad.last], [1, `0 passed, ${checks.length} failed, 1 skipped`], bad.stdout)
})

t.test('every op runs at the sizes that the sanitizer watches', async (t) => {
  const { status, stdout, last } = node([join(bundle, 'test/bench/every-op.js'), 'cpu'])
  t.equal(status, 0, stdout)
  t.match(last, /^\d{3} passed, 0 failed, 0 skipped$/)
})

/** The JSON report in a folder, which has one. */
const reportIn = (folder: string) => {
  const [name] = readdirSync(folder).filter((name) => name.endsWith('.json'))
  return JSON.parse(readFileSync(join(folder, name!), 'utf8'))
}

t.test('without a GPU every part is skipped, and that is said', { skip: absence('simt') }, async (t) => {
  const out = join(place, 'none')
  // with the library of the emulator, as on a machine where there is the CUDA library and no driver
  const lonely = { ROPEWALK_CUDA_LIBRARY: process.env.ROPEWALK_SIMT_LIBRARY, ROPEWALK_SIMT_MACHINE: 'driver=0' }
  const run = node([join(bundle, 'scripts/gpu.js'), '--out', out], lonely)
  t.equal(run.status, 3, run.stdout)
  t.match(run.stdout, /doctor: skipped after \d s: no cuda: .*finds no NVIDIA driver/)
  t.match(run.last, /gpu: 0 passed, 0 failed, 8 skipped \(no cuda: .*finds no NVIDIA driver.*\): .*\.md$/)
  const { parts } = reportIn(out) as { parts: Record<string, { status: string }> }
  t.strictSame(Object.keys(parts), 'machine doctor conformance ops model sanitizer step bench'.split(' '))
  t.ok(Object.values(parts).every(({ status }) => status === 'skipped'))
  const [markdown] = readdirSync(out).filter((name) => name.endsWith('.md'))
  t.match(readFileSync(join(out, markdown!), 'utf8'), /\| bench \| skipped \| 0 \| without the device: see doctor \|/)
})

t.test('a CUDA library that cannot be used is a fault; so are wrong arguments', async (t) => {
  const damaged = join(place, 'damaged')
  const { status, stdout } = node([join(bundle, 'scripts/gpu.js'), '--part', 'ops', '--out', damaged], {
    ROPEWALK_CUDA_LIBRARY: join(place, 'no.so'),
  })
  t.equal(status, 1)
  t.match(stdout, /doctor: failed after \d s: no cuda: .*there is no .*no\.so/)
  t.match(reportIn(damaged).parts, { machine: {}, doctor: { status: 'failed' }, ops: { status: 'skipped' } })
  for (const [args, message] of [
    [['--part', 'opps'], /there is no part "opps"; known are machine, doctor, /],
    [['--device', 'cpu'], /--device is "cpu", but must be cuda, cuda:1 or simt/],
    [['--time', 'x'], /--time is "x"/],
  ] as const) {
    const wrong = node([join(bundle, 'scripts/gpu.js'), ...args])
    t.equal(wrong.status, 2)
    t.match(wrong.stderr, message)
  }
})

t.test('a rehearsal on the emulator', { skip: absence('simt') }, async (t) => {
  const out = join(place, 'out')
  const args = ['--device', 'simt', '--part', 'machine,doctor,ops,bench', '--out', out, '--time', '240']
  const { stdout } = node([join(bundle, 'scripts/gpu.js'), ...args])
  const { parts } = reportIn(out)
  t.match(
    parts,
    { doctor: { status: 'passed' }, ops: { status: 'passed', failed: 0 }, bench: { status: 'passed' } },
    stdout,
  )
  t.ok(parts.ops.passed > 100)
  const [report] = readdirSync(out).filter((name) => name.endsWith('.md'))
  const text = readFileSync(join(out, report!), 'utf8')
  t.match(text, /## Parts\n[\s\S]*\| ops \| passed \|[\s\S]*## Measurements[\s\S]*\| matmul nn /)
})
