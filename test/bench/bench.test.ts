// `ropewalk bench` on small sizes and without peers: that it measures, and what it writes. Speed is never tested here.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { stems } from '../../lib/bench/case.js'
import { listCases } from '../../lib/bench/cases.js'
import { compare, quantile, ratio, type Side, summarize } from '../../lib/bench/measure.js'
import { LLAMA_7B } from '../../lib/bench/models.js'
import { Peers } from '../../lib/bench/peers.js'
import type { Report } from '../../lib/bench/run.js'
import { fitting, stepBytes } from '../../lib/bench/training.js'
import { runCommand } from '../../lib/cli/commands.js'
import { Device } from '../../lib/runtime/device.js'
import { MEMORY_DEFAULTS } from '../../lib/train/memory.js'

const dir = mkdtempSync(join(tmpdir(), 'ropewalk-bench-test-'))
t.teardown(() => rmSync(dir, { recursive: true, force: true }))

async function ropewalk(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const result = { code: 0, stdout: '', stderr: '' }
  const sink = (name: 'stdout' | 'stderr') => ({ write: (part: string) => (result[name] += part) })
  result.code = await runCommand(args, { stdout: sink('stdout'), stderr: sink('stderr') })
  return result
}

const small = ['--quick', '--time', '0.05', '--no-peers']

/** Opening and closing tags match, and text is escaped: what a browser asks of an SVG. */
function wellFormed(xml: string): boolean {
  const open: string[] = []
  for (const [tag, close, name, empty] of xml.matchAll(/<(\/?)([\w]+)(?:\s+[\w:-]+="[^"<]*")*\s*(\/?)>/g)) {
    if (close) {
      if (open.pop() !== name) return false
    } else if (!empty && tag) open.push(name!)
  }
  const text = xml.replace(/<(\/?)([\w]+)(?:\s+[\w:-]+="[^"<]*")*\s*(\/?)>/g, '')
  return open.length === 0 && !/[<>]|&(?!(amp|lt|gt|quot);)/.test(text)
}

t.test('statistics', async (t) => {
  t.equal(quantile([1, 2, 4], 0.25), 1.5)
  t.strictSame(summarize([4, 1, 2]), { median: 2, q1: 1.5, q3: 3, min: 1, max: 4, n: 3 })
  // the machine was half as fast in the second round, for both
  t.strictSame(ratio([8, 4, 9], [4, 2, 3]), { median: 2, best: 9 / 4 })
})

t.test('sides run in turn, and the first round does not count', async (t) => {
  const order: string[] = []
  const side = (name: string, seconds: number): Side => ({
    ...{ name, work: 10 },
    run: async () => {
      order.push(name)
      return seconds
    },
  })
  const rates = await compare([side('a', 2), side('b', 5)], { seconds: 0, rounds: 3 })
  t.strictSame(rates, [
    [5, 5, 5],
    [2, 2, 2],
  ])
  t.equal(order.join(''), 'abababab')
  await t.rejects(compare([side('a', 1)], { seconds: 1, rounds: 3, signal: AbortSignal.abort() }), {
    name: 'AbortError',
  })
})

t.test('every stem has cases, each with a name of its own', async (t) => {
  for (const gpu of [false, true]) {
    for (const quick of [true, false]) {
      const device = gpu ? 'cuda' : 'cpu'
      const sizes = { loadBytes: 1e6, cacheBytes: 1 << 20, memoryBytes: 1e9 }
      const setting = { device, gpu, threads: gpu ? [0] : [1, 2], quick, ...sizes }
      const cases = listCases(setting)
      t.strictSame([...new Set(cases.map(({ stem }) => stem))], [...stems])
      const names = cases.map(({ stem, name, threads }) => `${stem} ${name} ${threads}`)
      t.equal(new Set(names).size, names.length)
      const some = listCases(setting, ['adamw', 'copy'])
      t.strictSame([...new Set(some.map(({ stem }) => stem))], ['adamw', 'copy'])
      t.strictSame([...new Set(some.map(({ threads }) => threads))], gpu ? [0] : [1, 2])
    }
  }
})

t.test('a model that does not fit is measured with memory options, or with fewer layers', async (t) => {
  const whole = stepBytes(LLAMA_7B, 4096)
  t.strictSame(fitting(LLAMA_7B, 4096, whole), { config: LLAMA_7B, memory: MEMORY_DEFAULTS })
  const lean = fitting(LLAMA_7B, 32768, 130e9)
  t.equal(lean.config, LLAMA_7B)
  t.match(lean.memory, { gradients: 'fused', masters: 'remainder', moments: 'float32', offloadOptimizer: false })
  t.match(
    lean.remark,
    /^memory: \{ checkpointLayers: 1, .+ \}; with everything kept it takes \d+\.\d GB, 130\.0 GB are free$/,
  )
  const leanest = fitting(LLAMA_7B, 32768, 75e9)
  t.equal(leanest.config, LLAMA_7B, 'all of it, on a GPU of 80 GB')
  t.match(leanest, { memory: { moments: '8bit' }, remark: /moments: '8bit'/ })
  for (const { memory, remark } of [lean, leanest]) {
    t.ok(stepBytes(LLAMA_7B, 32768, memory) <= Number(/([\d.]+) GB are free/.exec(remark!)![1]) * 1e9)
  }
  const { config, memory, remark } = fitting(LLAMA_7B, 4096, 20e9)
  t.match(remark, /^\d+ of its 32 layers, memory: \{ .+ \}; with everything kept it takes/)
  const layers = config.num_hidden_layers
  t.ok(layers > 1 && stepBytes(config, 4096, memory) <= 20e9)
  t.ok(stepBytes({ ...config, num_hidden_layers: layers + 1 }, 4096, memory) > 20e9, 'as many as fit')
  t.throws(() => fitting(LLAMA_7B, 4096, 1e6), { message: /a step with a single layer takes [\d.]+ GB of 0\.0 GB/ })
})

t.test('a small run writes JSON, CSV and a chart', async (t) => {
  const file = (name: string): string => join(dir, name)
  const out = ['--out', file('b.json'), '--csv', file('b.csv'), '--svg', file('b.svg')]
  const { code, stdout, stderr } = await ropewalk('bench', 'matmul', ...small, '--json', '--threads', '1,2', ...out)
  t.equal(code, 0, stderr)
  const report = JSON.parse(stdout) as Report
  t.same(JSON.parse(readFileSync(file('b.json'), 'utf8')), report, 'the file holds what stdout does')
  t.match(report, { version: 2, settings: { stems: ['matmul'], threads: [1, 2], quick: true, peers: [] } })
  t.match(report, { failures: [], left: [], machine: { device: 'cpu' } })
  t.match(report.machine, { cpu: String, cores: Number, isa: /^(baseline|avx2|avx512|amx)$/, memoryBytes: Number })
  t.match(report.machine, { loadBefore: Number, loadAfter: Number, date: /^\d{4}-\d\d-\d\dT/, node: String })
  t.equal(report.cases.length, 6)
  for (const { ours, roofline, unit, work, peers } of report.cases) {
    t.ok(ours.n >= 3 && 0 < ours.min && ours.min <= ours.q1 && ours.q1 <= ours.median, 'ordered')
    t.ok(ours.median <= ours.q3 && ours.q3 <= ours.max && work > 0)
    t.ok(roofline.rate.median > 0 && roofline.ours.median > 0 && roofline.name === 'matmul')
    t.strictSame([unit, peers], ['GFLOP/s', []])
  }
  const lines = readFileSync(file('b.csv'), 'utf8').trimEnd().split('\n')
  t.equal(lines.length, 1 + 2 * report.cases.length)
  t.ok(lines.every((line) => line.split(',').length === lines[0]!.split(',').length))
  const chart = readFileSync(file('b.svg'), 'utf8')
  t.ok(wellFormed(chart))
  t.match(chart, /prefers-color-scheme: dark/)
  t.equal(chart.match(/text-anchor="end"/g)?.length, report.cases.length)
})

t.test('memory, loading and cancelling are measured too', async (t) => {
  const { code, stdout, stderr } = await ropewalk('bench', 'load', ...small, '--load-mb', '2', '--device', 'cpu')
  t.equal(code, 0, stderr)
  t.match(stdout, /load safetensors, 2 MB .*cat .*\n/)
  t.match(stdout, /memory of loading: weights +\d/)
  t.match(stderr, /bench 0\/2 load safetensors/)
})

t.test('peers that are not there are named with the reason', async (t) => {
  const before = { ...process.env }
  t.teardown(() => Object.assign(process.env, before))
  process.env.ROPEWALK_PYTHON = join(dir, 'no-python')
  const peers = await Peers.open('baseline', 'cpu')
  t.teardown(() => peers.close())
  t.match(peers.missing.join('\n'), /PyTorch: .*no-python.* ROPEWALK_PYTHON names another/)
  const sides = await peers.sides({ op: 'adamw', size: 10 }, 1, 1, 1)
  t.strictSame(sides, [])
})

t.test('what is not begun within --limit is named', async (t) => {
  const { code, stdout } = await ropewalk('bench', 'adamw,copy', ...small, '--device', 'cpu', '--limit', '0')
  t.equal(code, 0)
  t.match(stdout, /not begun within --limit: adamw f32 65536, threads 1; .*copy cast f32 131072/)
})

const simt = (() => {
  try {
    Device.open('simt').dispose()
    return false
  } catch (error) {
    return `skipped: ${(error as Error).message}`
  }
})()

t.test('the GPU cases on the emulator', { skip: simt }, async (t) => {
  const file = join(dir, 'simt.json')
  const { code, stderr } = await ropewalk('bench', 'matmul,swiglu', '--device', 'simt', ...small, '--out', file)
  t.equal(code, 0, stderr)
  const { cases, machine } = JSON.parse(readFileSync(file, 'utf8')) as Report
  t.equal(machine.device, 'simt')
  t.strictSame(
    cases.map(({ stem }) => stem),
    ['matmul', 'matmul', 'matmul', 'swiglu', 'swiglu'],
  )
  t.ok(cases.every(({ ours, roofline, threads }) => ours.median > 0 && roofline.rate.median > 0 && threads === 0))
  const missing = await ropewalk('bench', 'copy', '--device', 'simt')
  t.match([missing.code, missing.stderr], [2, /--device simt executes kernels on the CPU.*needs --quick/])
})

t.test('what cannot be understood or written', async (t) => {
  for (const [args, expected, code] of [
    [['matmull'], /there is no stem "matmull"; did you mean "matmul"\?; known are matmul, /, 2],
    [['matmul', 'step'], /"step" is one argument too many/, 2],
    [['--threads', '0'], /--threads is "0"/, 2],
    [['--device', 'simt', '--threads', '1'], /--device simt/, 2],
    [['copy', '--device', 'cuda', '--threads', '1'], /--threads counts CPU threads: leave out --device cuda/, 2],
    [['copy', '--device', 'cudo'], /unknown device "cudo"; did you mean "cuda"/, 1],
    [['--quik'], /unknown option "--quik"; did you mean "--quick"\?/, 2],
    [['--svg', join(dir, 'none', 'x.svg')], /x\.svg: .*none is not a folder that can be written to/, 1],
  ] as const) {
    const result = await ropewalk('bench', ...args)
    t.equal(result.code, code)
    t.match(result.stderr, expected)
    t.equal(result.stdout, '')
  }
})
