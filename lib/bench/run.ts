// Runs the cases one after the other, and gathers what they gave.
import { type Case, listCases, type Setting, type Stem, stepTimes } from './cases.js'
import { describeMachine, load, type Machine } from './machine.js'
import { compare, ratio, type Side, summarize, type Summary } from './measure.js'
import { loadMemory, stepMemory } from './memory.js'
import { Peers } from './peers.js'
import { profileStep, type ProfileRow } from './profile.js'
import { eventFacts, type Fact } from './step.js'

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
  /** The peers. */
  peers: SideResult[]
  roofline: SideResult
  /** What our rate is to be, as a part of a side's, and whether it is. */
  bar?: { side: string; least: number; met: boolean }
}

export interface Profile {
  time: number
  threads: number
  rows: ProfileRow[]
}

/** The JSON document. */
export interface Report {
  version: 1
  machine: Machine & { loadAfter: number }
  settings: { stem: Stem | null; threads: number[]; quick: boolean; seconds: number; peers: string[] }
  cases: CaseResult[]
  facts: Fact[]
  profiles: Profile[]
}

export interface Options {
  stem?: Stem
  quick: boolean
  peers: boolean
  profile: boolean
  threads?: readonly number[]
  /** Seconds for each side of a case. */
  seconds: number
  loadBytes: number
  signal: AbortSignal
  /** Remarks, and what is being done: `done` of `total`. */
  note(text: string): void
  progress(done: number, total: number, what: string): void
}

const GIGA = 1e9

export async function runBench(options: Options): Promise<Report> {
  const { stem, quick, seconds, signal } = options
  const machine = describeMachine()
  const threads = options.threads ? [...options.threads] : [...new Set([1, machine.cores])]
  const setting: Setting = { threads, quick, loadBytes: options.loadBytes, cacheBytes: machine.cacheBytes }
  const peers = options.peers ? await Peers.open(machine.isa) : Peers.none()
  try {
    for (const line of peers.found) options.note(`peer: ${line}`)
    for (const line of peers.missing) options.note(`no peer ${line}`)
    const cases = listCases(setting, stem)
    const extras = extraWork(setting, options)
    const total = cases.length + extras.length
    const results: CaseResult[] = []
    for (const [i, one] of cases.entries()) {
      options.progress(i, total, `${one.stem} ${one.name}, threads ${one.threads}`)
      results.push(await runCase(one, peers, options))
    }
    const report: Report = {
      version: 1,
      machine: { ...machine, loadAfter: 0 },
      settings: { stem: stem ?? null, threads, quick, seconds, peers: peers.found },
      cases: results,
      facts: [],
      profiles: [],
    }
    for (const [i, { name, run }] of extras.entries()) {
      options.progress(cases.length + i, total, name)
      signal.throwIfAborted()
      await run(report)
    }
    report.machine.loadAfter = load()
    return report
  } finally {
    peers.close()
  }
}

/** What is measured beside the cases. */
function extraWork(
  setting: Setting,
  { stem, quick, profile, loadBytes, signal }: Options,
): { name: string; run(report: Report): Promise<unknown> }[] {
  const threads = Math.max(...setting.threads)
  const times = stepTimes(setting)
  const wants = (name: Stem): boolean => stem === undefined || stem === name
  const extras: ReturnType<typeof extraWork> = []
  const facts = (name: string, run: () => Promise<Fact[]>): void => {
    const bare = ({ name, value, unit }: Fact): Fact => ({ name, value, unit })
    extras.push({
      name,
      run: async ({ facts }) => facts.push(...(await run()).map((fact) => (quick ? bare(fact) : fact))),
    })
  }
  if (wants('step')) {
    facts('memory of a step', () => stepMemory(times.at(-1)!, threads))
    facts('event loop and cancelling', () => eventFacts(quick, threads, signal))
  }
  if (wants('load')) facts('memory of loading', () => loadMemory(loadBytes, threads))
  if (profile && wants('step')) {
    for (const time of times) {
      const run = async ({ profiles }: Report): Promise<unknown> =>
        profiles.push({ time, threads, rows: await profileStep(time, threads, quick ? 1 : 3, signal) })
      extras.push({ name: `profile of a step, T ${time}`, run })
    }
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
    rates = await compare(sides, { seconds, rounds: quick || one.heavy ? 3 : 5, signal })
  } finally {
    for (const side of sides) await side.dispose?.()
  }
  const [own, ...others] = sides as [Side, ...Side[]]
  const results = others.map(({ name: side }, i): SideResult => {
    const rate = summarize(rates[i + 1]!.map((value) => value / GIGA))
    return { name: side, rate, ours: ratio(rates[0]!, rates[i + 1]!) }
  })
  const ours = summarize(rates[0]!.map((value) => value / GIGA))
  // A bar says nothing about small sizes.
  const against = quick ? undefined : results.find((side) => side.name === bar?.side)
  return {
    ...{ stem, name, threads, unit, work: own.work, ours },
    ...(own.tokens !== undefined && { tokensPerSecond: (GIGA * ours.median * own.tokens) / own.work }),
    peers: results.filter((side) => side.name !== one.roofline),
    roofline: results.find((side) => side.name === one.roofline)!,
    ...(bar && against && { bar: { ...bar, met: against.ours.median >= bar.least } }),
  }
}
