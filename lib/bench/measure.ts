import { setTimeout } from 'node:timers/promises'

/** One of several ways to do the same work. */
export interface Side {
  name: string
  /** Floating-point operations or bytes of a run; sides of a case may do more or less of the same work. */
  work: number
  /** Tokens of a run, where that means something. */
  tokens?: number
  /** Device memory that it takes. */
  bytes?: number
  /** What is to be known of the figures. */
  remark?: string
  /** Runs once; gives the seconds that the work itself took. */
  run(): Promise<number>
  dispose?(): unknown
}

/** Order statistics of a sample. */
export interface Summary {
  median: number
  q1: number
  q3: number
  min: number
  max: number
  n: number
}

export interface Budget {
  /** Seconds to measure each side for. */
  seconds: number
  /** At least so many runs of each side. */
  rounds: number
  /** Milliseconds between two sides; default 40. */
  settle?: number
  signal?: AbortSignal | undefined
}

/** Threads of a library go on waiting for work for a while after a run; until then they would slow the next side down. */
const SETTLE_MS = 40
/** Runs shorter than this, in seconds, are timed on their second go: waking a core that sleeps can take milliseconds. */
const SHORT = 0.25

const MOST_ROUNDS = 400

/**
 * Runs the sides in turn, A B C A B C ..., so that other work on the machine meets all of them alike. Gives each side's
 * rates, work per second, by round. The first run of each is not counted.
 */
export async function compare(
  sides: readonly Side[],
  { seconds, rounds, signal, settle = SETTLE_MS }: Budget,
): Promise<number[][]> {
  const rates = sides.map((): number[] => [])
  let end = Infinity
  for (let round = -1; round < MOST_ROUNDS && (round < rounds || performance.now() < end); round++) {
    if (round === 0) end = performance.now() + 1000 * seconds * sides.length
    for (const [i, side] of sides.entries()) {
      signal?.throwIfAborted()
      if (sides.length > 1) await setTimeout(settle)
      let taken = await side.run()
      if (taken < SHORT) taken = await side.run()
      if (round >= 0) rates[i]!.push(side.work / taken)
    }
  }
  return rates
}

/** Linear interpolation between order statistics, as numpy's default. */
export function quantile(sorted: readonly number[], q: number): number {
  const at = q * (sorted.length - 1)
  const low = Math.floor(at)
  return sorted[low]! + (at - low) * (sorted[Math.ceil(at)]! - sorted[low]!)
}

export function summarize(values: readonly number[]): Summary {
  const sorted = [...values].sort((a, b) => a - b)
  return {
    median: quantile(sorted, 0.5),
    q1: quantile(sorted, 0.25),
    q3: quantile(sorted, 0.75),
    min: sorted[0]!,
    max: sorted.at(-1)!,
    n: sorted.length,
  }
}

/** How many times as fast as `others` are `ours`: the median over the rounds, and between the best runs of both. */
export function ratio(ours: readonly number[], others: readonly number[]): { median: number; best: number } {
  const rounds = ours.map((rate, i) => rate / others[i]!)
  return { median: summarize(rounds).median, best: Math.max(...ours) / Math.max(...others) }
}
