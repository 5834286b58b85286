// The parts of gpu.js. Each gives { status: passed | failed | skipped, summary, ... }; commands never throw. `first` parts
// run one by one before the others, `alone` ones one by one after them.
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { tally } from './gpu-session.js'

export const PARTS = {
  machine: { first: true, run: machine },
  doctor: { first: true, run: doctor },
  conformance: { run: conformance },
  ops: { run: ops },
  model: { run: model },
  sanitizer: { run: sanitizer },
  step: { alone: true, run: step },
  bench: { alone: true, run: bench },
}

const CLI = 'lib/cli/main.js'
/** For nvcc: conformance*.cu for every GPU. The instructions of sm_90a are in no other form. */
export const CONFORMANCE_CODE = [
  'compute_80,code=sm_80',
  'compute_90a,code=sm_90a',
  'compute_80,code=compute_80',
].flatMap((code) => ['-gencode', `arch=${code}`])
/** Of a toolkit that is installed, but not on PATH. */
const TOOLKIT = process.env.CUDA_HOME || '/usr/local/cuda'
const tool = (name) => {
  const inToolkit = join(TOOLKIT, 'bin', name)
  return existsSync(inToolkit) ? inToolkit : name
}
const namesIn = (folder, pattern) =>
  existsSync(folder) ? readdirSync(folder).filter((name) => pattern.test(name)) : []

/** Driver, CUDA, Python: what the figures depend on. */
async function machine(session, report) {
  const fields = 'name,driver_version,memory.total,compute_cap,clocks.max.sm,power.limit'
  const index = session.device.split(':')[1] ?? '0'
  const query = [`--id=${index}`, `--query-gpu=${fields}`, '--format=csv,noheader']
  const gpu = await session.run('machine', 'nvidia-smi', query)
  const nvcc = await session.run('machine', tool('nvcc'), ['--version'])
  const python = await session.run('machine', process.env.ROPEWALK_PYTHON || 'python3', ['--version'])
  const [name, driver, memory, capability, clock, power] = gpu.code === 0 ? gpu.text.trim().split(/\s*[,\n]\s*/) : []
  const first = (result) => (result.code === 0 ? result.text.trim().split('\n').at(-1) : null)
  session.gpu = name
  report.machine = { gpu: name ?? null, driver, memory, capability, clock, power }
  Object.assign(report.machine, { nvcc: first(nvcc), python: first(python), node: process.versions.node })
  const summary = name ? `${name}, driver ${driver}, ${memory}` : `no GPU: ${gpu.missing ?? gpu.text.trim()}`
  return { status: name ? 'passed' : 'skipped', summary }
}

/**
 * Whether the device is there at all; without it nothing else is tried. A machine without a GPU is no fault, a GPU that
 * cannot be used is one.
 */
async function doctor(session) {
  const { text, code } = await session.node('doctor', [CLI, 'doctor', '--json'])
  const json = text.slice(text.indexOf('{'), text.lastIndexOf('}') + 1)
  const name = session.device.split(':')[0]
  let checks
  try {
    ;({ checks } = JSON.parse(json))
  } catch {
    return { status: 'failed', summary: `ended with ${code}: ${text.slice(-300)}` }
  }
  const backend = checks.find((check) => check.name === name)
  const broken = checks.find(({ ok }) => !ok)
  const there = backend && !backend.absent
  const summary = broken
    ? `${broken.name}: ${broken.detail}`
    : there
      ? backend.detail
      : `no ${name}: ${backend?.detail}`
  const without = !broken && !there && /finds no (NVIDIA driver|GPU)/.test(summary) && !session.gpu
  return { status: without ? 'skipped' : broken || !there ? 'failed' : 'passed', summary, checks }
}

/**
 * Instructions against the hashes that the emulator gives: test/simt/conformance*.cu, built by nvcc, or, where there is
 * none that can, as the bundle brought them along.
 */
async function conformance(session) {
  const sources = namesIn(join(session.root, 'test/simt'), /^conformance.*\.cu$/)
  if (sources.length === 0) return { status: 'skipped', summary: 'there is no test/simt/conformance*.cu' }
  if (session.rehearsal) return { status: 'skipped', summary: 'it is for GPUs: test/simt runs it on the emulator' }
  const results = await Promise.all(
    sources.map(async (name) => {
      const program = join(tmpdir(), `ropewalk-${name}-${process.pid}`)
      const flags = ['-std=c++17', '-O2', ...CONFORMANCE_CODE, '-Icsrc', join('test/simt', name), '-o', program]
      const built = await session.run('conformance', tool('nvcc'), flags, { early: true })
      const carried = join(session.root, 'conformance', name.replace(/\.cu$/, ''))
      if (built.code !== 0 && existsSync(carried)) {
        return { name, ...(await session.run('conformance', carried, [], { early: true })) }
      }
      if (built.missing) return undefined
      if (built.code !== 0) return { name, ...built }
      const ran = await session.run('conformance', program, [], { early: true })
      rmSync(program, { force: true })
      return { name, ...ran }
    }),
  )
  if (results.includes(undefined)) {
    return {
      status: 'skipped',
      summary: 'there is no nvcc, and the bundle has no programs: it was made without nvcc too',
    }
  }
  return tally(results)
}

/** The tests of every op, each file in a process of its own. */
async function ops(session) {
  const files = namesIn(join(session.root, 'test/ops'), /\.test\.js$/)
  // The emulator would take minutes over the large ones.
  const chosen = session.rehearsal ? files.filter((name) => /^(swiglu|elementwise)\./.test(name)) : files
  const env = { ROPEWALK_TEST_DEVICE: session.device }
  const run = async (name) => ({
    name,
    ...(await session.node('ops', [join('test/ops', name)], { early: true, env })),
  })
  return tally(await Promise.all(chosen.map(run)))
}

/** Logits, losses and gradients of the golden checkpoints; packed documents. */
async function model(session) {
  const env = { ROPEWALK_TEST_DEVICE: session.device, ROPEWALK_TEST_ONLY: '^(golden|packed)' }
  const result = await session.node('model', ['test/model/model.test.js'], { early: true, env })
  return tally([{ name: 'model.test.js', ...result }])
}

/** Every op under every tool of compute-sanitizer. */
async function sanitizer(session) {
  const tools = ['memcheck', 'racecheck', 'initcheck', 'synccheck']
  if (session.rehearsal) {
    const result = await session.node('sanitizer', ['test/bench/every-op.js', 'simt'], { early: true })
    return { ...tally([{ name: 'every-op.js', ...result }]), remark: 'without compute-sanitizer' }
  }
  const command = tool('compute-sanitizer')
  const results = await Promise.all(
    tools.map(async (name) => {
      const args = [
        '--tool',
        name,
        '--error-exitcode',
        '86',
        process.execPath,
        'test/bench/every-op.js',
        session.device,
      ]
      return { name, ...(await session.run('sanitizer', command, args, { early: true })) }
    }),
  )
  const found = results.map(({ name, text, code, timedOut, missing }) => {
    const [line] = /={2,}\s*((ERROR|RACECHECK) SUMMARY.*)/.exec(text)?.slice(1) ?? []
    const kernel = /={2,}\s*((?:Invalid|Error|Warning|Uninitialized|Barrier|Potential).*)/.exec(text)?.[1]
    const unsupported = /Device not supported|Unable to initialize|not supported on/i.test(text)
    const ok = code === 0 && line !== undefined && /\b0 (errors|hazards)/.test(line)
    const status = missing || unsupported ? 'skipped' : ok ? 'passed' : 'failed'
    const why = missing ?? (timedOut ? 'took too long' : (line ?? `ended with ${code}`))
    return { tool: name, status, detail: [why, !ok && kernel].filter(Boolean).join('; ') }
  })
  const any = (status) => found.some((result) => result.status === status)
  const status = any('failed') ? 'failed' : any('skipped') ? 'skipped' : 'passed'
  return { status, summary: found.map(({ tool, detail }) => `${tool}: ${detail}`).join('; '), tools: found }
}

/** `ropewalk bench` of some stems, in a process of its own: an error that ends the device ends no other stems. */
async function measure(session, stems, limit, time, ...more) {
  const out = join(tmpdir(), `ropewalk-bench-${process.pid}-${stems.replaceAll(',', '-')}.json`)
  const begin = Math.max(1, Math.floor(limit - 25)) // what a case that was begun may take
  const args = [CLI, 'bench', stems, '--device', session.device, '--time', String(time), '--limit', String(begin)]
  const quick = session.rehearsal ? ['--quick', ...more] : more
  const result = await session.node(
    'bench',
    [...args, ...quick, '--load-mb', session.rehearsal ? '8' : '2000', '--out', out],
    { limit },
  )
  let report = null
  if (existsSync(out)) report = JSON.parse(readFileSync(out, 'utf8'))
  rmSync(out, { force: true })
  const failures = report?.failures ?? []
  if (result.timedOut) failures.push({ name: stems, error: `took longer than ${limit.toFixed(0)} s` })
  else if (result.code !== 0 && failures.length === 0) {
    failures.push({ name: stems, error: `ended with ${result.code}: ${result.text.trim().split('\n').at(-1)}` })
  }
  return { stems, report, failures }
}

function measured(runs) {
  const cases = runs.flatMap(({ report }) => report?.cases ?? [])
  const left = runs.flatMap(({ report }) => report?.left ?? [])
  const failures = runs.flatMap(({ failures }) => failures)
  const missed = cases.filter(({ bar }) => bar && !bar.met).length
  const bars = cases.filter(({ bar }) => bar).length
  const parts = [
    `${cases.length} cases measured`,
    ...(bars > 0 ? [`${bars - missed} of ${bars} bars met`] : []),
    ...(left.length > 0 ? [`${left.length} left out for time`] : []),
    ...failures.map(({ name, error }) => `FAILED ${name}: ${error}`),
  ]
  const reports = runs.flatMap(({ report }) => (report ? [report] : []))
  // A bar that is missed is a figure, not a fault.
  return { status: failures.length > 0 ? 'failed' : 'passed', summary: parts.join(', '), reports }
}

/** Dense bf16, in TFLOP/s, as the data sheets of the SXM parts have it. */
const SHEETS = [
  [/H100|H200/, 989],
  [/A100/, 312],
]

/** Training steps, the 7B-shaped ones first. */
async function step(session, report) {
  const run = await measure(session, 'step', Math.min(150, session.left()), session.rehearsal ? 0.02 : 0.2, '--profile')
  const result = measured([run])
  const [, peak] = SHEETS.find(([pattern]) => pattern.test(report.machine?.gpu ?? '')) ?? []
  const steps = (run.report?.cases ?? []).map(({ name, remark, ours, roofline, tokensPerSecond, bytes, work }) => ({
    ...{ name, remark, tokensPerSecond, bytes },
    ...{ seconds: work / (1e9 * ours.median), teraflops: ours.median / 1000 },
    mfuOfMeasured: roofline.ours.median,
    ...(peak && { mfuOfSheet: ours.median / 1000 / peak, sheetTeraflops: peak }),
  }))
  return { ...result, steps }
}

/** Stems that share a process, and their part of the time that is left. */
const GROUPS = [
  ['matmul', 0.33],
  ['attention,rope', 0.37],
  ['rmsnorm,swiglu,embedding,adamw,copy', 0.18],
  ['linear_cross_entropy,generate,load', 0.12],
]

async function bench(session) {
  const runs = []
  const all = session.left() - 10
  for (const [stems, part] of GROUPS) {
    const limit = Math.max(5, Math.min(session.left() - 5, part * all + 25))
    const run = await measure(session, stems, limit, session.rehearsal ? 0.02 : 0.25)
    session.say('bench', `${stems}: ${run.report?.cases.length ?? 0} cases, ${run.failures.length} failures`)
    runs.push(run)
  }
  return measured(runs)
}
