// Runs the cases one after the other, and gathers what they gave.
import { Device } from '../runtime/device.js'
import type { Case, Setting, Stem } from './case.js'
import { listCases, stepTimes } from './cases.js'
import { describeMachine, load, type Machine } from './machine.js'
import { compare, ratio, type Side, summarize, type Summary } from './measure.js'
import { leanMemory, loadMemory, stepMemory } from './memory.js'
import { LLAMA_1B, LLAMA_25M, LLAMA_TINY } from './models.js'
import { Peers } from './peers.js'
import { profileStep, type ProfileRow } from './profile.js'
import { eventFacts, type Fact, runCost } from './step.js'

export interface SideResult {
  name: string
  /** Work per second, in the case's unit. */
  rate: Summary
  /** How many times as fast ours is: the median over the rounds, and between the best runs. */
  ours: { median: number; best: number }
}

export interface CaseResult {
  stem: Stem
  name: string
  threads: number
  unit: Case['unit']
  /** Floating-point operations or bytes of a run of our side. */
  work: number
  ours: Summary
  tokensPerSecond?: number
  /** Device memory that ours takes, where that is known. */
  bytes?: number
  /** What is to be known of the figures. */
  remark?: string
  /** The peers. */
  peers: SideResult[]
  roofline: SideResult
  /** What our rate is to be, as a part of a side's, and whether it is. */
  bar?: { side: string; least: number; met: boolean }
}

export interface Profile {
  model: string
  time: number
  threads: number
  rows: ProfileRow[]
}

/** The JSON document. */
export interface Report {
  version: 2
  machine: Machine & { loadAfter: number }
  settings: { stems: readonly Stem[] | null; threads: number[]; quick: boolean; seconds: number; peers: string[] }
  cases: CaseResult[]
  /** Cases and parts that ended with an error; the others go on. */
  failures: { name: string; error: string }[]
  /** Cases that were not begun, because their time was up. */
  left: string[]
  facts: Fact[]
  profiles: Profile[]
}

export interface Options {
  /** As for Device.open. */
  device: string
  stems?: readonly Stem[]
  quick: boolean
  peers: boolean
  profile: boolean
  /** Also the step of 32,768 tokens that saves memory in every way: minutes. */
  long: boolean
  threads?: readonly number[]
  /** Seconds for each side of a case. */
  seconds: number
  /** Seconds after which no case is begun. */
  limit: number
  loadBytes: number
  signal: AbortSignal
  /** Remarks, and what is being done: `done` of `total`. */
  note(text: string): void
  progress(done: number, total: number, what: string): void
  /** Called after every part, so that what was measured outlives a process that does not. */
  save(report: Report): Promise<void>
}

const GIGA = 1e9
/** Of the free memory of a GPU: what its driver, library workspaces and staging buffers leave to a training step. */
const USABLE = 0.95

export async function runBench(options: Options): Promise<Report> {
  const { stems, quick, seconds, signal } = options
  const { machine, setting } = describe(options)
  const peers = options.peers ? await Peers.open(machine.isa, setting.device) : Peers.none()
  const end = performance.now() + 1000 * options.limit
  const report: Report = {
    version: 2,
    machine: { ...machine, loadAfter: 0 },
    settings: { stems: stems ?? null, threads: [...setting.threads], quick, seconds, peers: peers.found },
    ...{ cases: [], failures: [], left: [], facts: [], profiles: [] },
  }
  try {
    for (const line of peers.found) options.note(`peer: ${line}`)
    for (const line of peers.missing) options.note(`no peer ${line}`)
    const cases = listCases(setting, stems).map((one) => ({
      name: `${one.stem} ${one.name}${one.threads ? `, threads ${one.threads}` : ''}`,
      run: async () => report.cases.push(await runCase(one, peers, options)),
    }))
    const parts = [...cases, ...extraWork(setting, report, options)]
    for (const [i, { name, run }] of parts.entries()) {
      signal.throwIfAborted()
      if (performance.now() > end) {
        report.left.push(name)
        continue
      }
      options.progress(i, parts.length, name)
      try {
        await run()
      } catch (error) {
        signal.throwIfAborted()
        const { message } = error as Error
        options.note(`${name}: ${message}`)
        report.failures.push({ name, error: message })
      }
      report.machine.loadAfter = load()
      await options.save(report)
    }
    return report
  } finally {
    peers.close()
  }
}

function describe({ device: name, threads, quick, loadBytes }: Options): { machine: Machine; setting: Setting } {
  using device = Device.open(name)
  const machine = describeMachine(device)
  const gpu = device.name !== 'cpu'
  const memoryBytes = USABLE * (device.memory()?.freeBytes ?? machine.memoryBytes)
  const { cacheBytes } = machine
  const counts = gpu ? [0] : threads ? [...threads] : [...new Set([1, machine.cores])]
  return {
    machine,
    setting: {
      device: name === 'auto' ? device.name : name,
      gpu,
      threads: counts,
      quick,
      loadBytes,
      cacheBytes,
      memoryBytes,
    },
  }
}

/** What is measured beside the cases. */
function extraWork(
  setting: Setting,
  report: Report,
  { stems, quick, profile, long, loadBytes, signal }: Options,
): { name: string; run(): Promise<unknown> }[] {
  const threads = Math.max(...setting.threads)
  const times = stepTimes(setting)
  const wants = (name: Stem): boolean => !stems || stems.includes(name)
  const extras: ReturnType<typeof extraWork> = []
  const facts = (name: string, run: () => Promise<Fact[]>): void => {
    const bare = ({ name, value, unit }: Fact): Fact => ({ name, value, unit })
    extras.push({
      name,
      run: async () => report.facts.push(...(await run()).map((fact) => (quick ? bare(fact) : fact))),
    })
  }
  if (setting.gpu && wants('copy')) facts('cost of a run', () => runCost({ device: setting.device, threads }))
  if (!setting.gpu) {
    if (wants('step')) {
      facts('memory of a step', () => stepMemory(times.at(-1)!, threads))
      if (long) facts('a lean step', () => leanMemory(quick ? 2048 : 32_768, quick ? 256 : 4096, threads))
      facts('event loop and cancelling', () => eventFacts(quick, threads, signal))
    }
    if (wants('load')) facts('memory of loading', () => loadMemory(loadBytes, threads))
  }
  if (!profile || !wants('step')) return extras
  const [model, config] = !setting.gpu
    ? (['25M', LLAMA_25M] as const)
    : quick
      ? (['tiny', LLAMA_TINY] as const)
      : (['1.1B', LLAMA_1B] as const)
  for (const time of setting.gpu && !quick ? [4096] : times) {
    extras.push({
      name: `profile of a step of ${model}, T ${time}`,
      run: async () => {
        const target = { device: setting.device, threads }
        const rows = await profileStep(config, time, target, quick ? 1 : 3, signal)
        report.profiles.push({ model, time, threads, rows })
      },
    })
  }
  return extras
}

async function runCase(one: Case, peers: Peers, { seconds, quick, signal, note }: Options): Promise<CaseResult> {
  const { stem, name, threads, unit, bar } = one
  const sides = await one.sides({
    // A peer that fails is left out; ours must not.
    sides: async (...args) => {
      try {
        return await peers.sides(...args)
      } catch (error) {
        note(`${stem} ${name}: without a peer: ${(error as Error).message}`)
        return []
      }
    },
  })
  let rates: number[][]
  try {
    // the host's threads have nothing to do with what a GPU computes
    const settle = threads === 0 ? { settle: 0 } : {}
    rates = await compare(sides, { seconds, rounds: quick || one.heavy ? 3 : 5, signal, ...settle })
  } finally {
    for (const side of sides) await side.dispose?.()
  }
  const [own, ...others] = sides as [Side, ...Side[]]
  const results = others.map(({ name: side }, i): SideResult => {
    const rate = summarize(rates[i + 1]!.map((value) => value / GIGA))
    return { name: side, rate, ours: ratio(rates[0]!, rates[i + 1]!) }
  })
  const ours = summarize(rates[0]!.map((value) => value / GIGA))
  const roofline = results.at(-1)!
  // A bar says nothing about small sizes.
  const against = quick ? undefined : results.find((side) => side.name === bar?.side)
  return {
    ...{ stem, name, threads, unit, work: own.work, ours },
    ...(own.tokens !== undefined && { tokensPerSecond: (GIGA * ours.median * own.tokens) / own.work }),
    ...(own.bytes !== undefined && { bytes: own.bytes }),
    ...(own.remark !== undefined && { remark: own.remark }),
    ...{ peers: results.slice(0, -1), roofline },
    ...(bar && against && { bar: { ...bar, met: against.ours.median >= bar.least } }),
  }
}
