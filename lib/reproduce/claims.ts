import type { ReportFolder } from './folder.js'
import { idOf } from './models.js'
import { CORPORA, type Corpus, passkeyOf, perplexityOf } from './results.js'
import { windowOf } from './settings.js'

/**
 * The claims that reports are held against, at every factor, with the same yardstick whatever came out. Each is a
 * quantity of one report; over several reports (seeds) it gets a Student interval. A claim holds where the whole interval
 * is on its side of the bound. A single report has no interval, and decides nothing.
 */
export interface ClaimValue {
  id: string
  claim: string
  factor: number
  /** What is bounded; undefined where it was not measured. */
  value: number | undefined
  bound: { side: 'below' | 'at most' | 'at least'; at: number }
  /** How the quantity reads. */
  unit: 'share' | 'change'
}

/** Quality at the original window may fall by this much. */
const SLACK = 0.05

const change = (a: number | undefined, b: number | undefined): number | undefined =>
  a === undefined || b === undefined ? undefined : a / b - 1

export function claimsOf(folder: ReportFolder): ClaimValue[] {
  const { settings, model } = folder.record
  return settings.extensions.flatMap(({ factor, steps }) => {
    const window = windowOf(model.window, factor)
    const tuned = idOf({ method: 'pi', factor, step: steps })
    const at = (corpus: Corpus, id: string, length: number) => perplexityOf(folder, corpus, id, length)?.perplexity
    const keys = passkeyOf(folder, tuned, window)
    const list: ClaimValue[] = []
    for (const corpus of ['pg19', 'proof-pile'] as const) {
      list.push({
        id: `longer-${corpus}`,
        claim: `after PI fine-tuning, perplexity at the extended window is below that at the original one (${CORPORA[corpus]})`,
        factor,
        value: change(at(corpus, tuned, window), at(corpus, tuned, model.window)),
        bound: { side: 'below', at: 0 },
        unit: 'change',
      })
    }
    list.push({
      id: 'kmax',
      claim: 'k_max is the full extended window',
      factor,
      value: keys && keys.kmax / window,
      bound: { side: 'at least', at: 1 },
      unit: 'share',
    })
    for (const corpus of ['pg19', 'proof-pile'] as const) {
      list.push({
        id: `kept-${corpus}`,
        claim: `perplexity at the original window is at most 5 % above that before the extension (${CORPORA[corpus]})`,
        factor,
        value: change(at(corpus, tuned, model.window), at(corpus, 'base', model.window)),
        bound: { side: 'at most', at: SLACK },
        unit: 'change',
      })
    }
    return list
  })
}

/** Two-sided 97.5 % points of Student's t with 1, 2 ... degrees of freedom. */
const STUDENT = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.306, 2.2622]

/** Mean and 95 % interval of two or more independent values, by Student's t. */
export function studentInterval(values: readonly number[]): { mean: number; interval: [number, number] } {
  const n = values.length
  if (n < 2) throw new RangeError(`values: an interval needs two or more, but there are ${n}`)
  const mean = values.reduce((sum, value) => sum + value, 0) / n
  const deviation = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (n - 1))
  const margin = ((STUDENT[n - 2] ?? 2.2622) * deviation) / Math.sqrt(n)
  return { mean, interval: [mean - margin, mean + margin] }
}

/** Whether the bound is kept by the whole interval. */
export function holds({ side, at }: ClaimValue['bound'], [low, high]: readonly [number, number]): boolean {
  return side === 'below' ? high < at : side === 'at most' ? high <= at : low >= at
}

/** What a single report says of a claim, beside its figure. */
export const NOT_DECIDED = 'one seed: not decided'
