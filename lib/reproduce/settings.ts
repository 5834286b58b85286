import { quote } from '../errors.js'

/** One stretch of the window, and how long it is fine-tuned: `steps` of batchSize * accumulate windows. */
export interface Extension {
  factor: number
  steps: number
  batchSize: number
  accumulate: number
}

/** Everything that decides the numbers of a report, beside the model and the data. It stands in report.json. */
export interface Settings {
  /** Set where everything is cut short, to be looked at only. */
  look?: true
  /** Of the order of the training texts, the keys and the sampled summaries. */
  seed: number
  dtype: 'float32' | 'bfloat16'
  extensions: Extension[]
  /** Factors that are also fine-tuned without interpolation, with the same steps. */
  direct: number[]
  /** The factor at which all methods are compared. */
  compared: number
  /** Methods that are fine-tuned in that comparison, beside PI and direct. */
  comparedTuned: ('ntk' | 'yarn')[]
  /** Evaluations over the steps, the last at the end: 5 gives 200, 400 ... 1000 of 1000. */
  points: number
  learningRate: number
  warmupSteps: number
  schedule: 'constant' | 'linear' | 'cosine'
  finalFraction: number
  maxGradNorm: number
  /** Tokens by which the window of a perplexity moves on. */
  stride: number
  /** At most so many documents of a corpus, the first of those that are long enough. */
  documents: number
  /** Documents of the second corpus are cut to so many tokens, or to the largest window where that is more. */
  proofPileTokens: number
  passkey: { distances: number; trials: number }
  /** Lengths are the window's doublings up to the extended one. */
  needle: { depths: number; trials: number }
  ruler: { trials: number }
  position: { documents: number; windows: number }
  resolution: { documents: number; queries: number; trials: number }
  /** At most so many questions of a set; Infinity is written as null: all. */
  choiceItems: number | null
  summaries: {
    factor: number
    articleTokens: number
    summaryTokens: number
    epochs: number
    learningRate: number
    /** At most so many articles to train on and to summarize; null: all. */
    train: number | null
    test: number | null
    temperature: number
    topP: number
  }
  /** Steps of each kind in the comparison of costs. */
  costSteps: number
}

/** The paper's recipe (arXiv 2306.15595, section 3) for a model whose window is `window`, stretched to `contexts`. */
export function paperSettings(window: number, contexts: readonly number[], steps = 1000): Settings {
  const extensions = contexts.map((context) => {
    if (context <= window) {
      throw new RangeError(`context ${context} is not larger than the model's window of ${window}: give a larger one`)
    }
    // 64 windows a step at 8k, 128 beyond.
    return { factor: context / window, steps, batchSize: 1, accumulate: context <= 4 * window ? 64 : 128 }
  })
  const factors = extensions.map(({ factor }) => factor)
  const twice = contexts.find((context, n) => contexts.indexOf(context) < n)
  if (twice !== undefined) throw new RangeError(`context ${twice} is given twice`)
  return {
    seed: 0,
    dtype: 'bfloat16',
    extensions,
    direct: factors.slice(0, 1),
    compared: factors[0]!,
    comparedTuned: [],
    // A table's columns are apart even in a short run.
    points: Math.min(5, steps),
    ...{ learningRate: 2e-5, warmupSteps: 20, schedule: 'constant', finalFraction: 0.1, maxGradNorm: 0 },
    stride: 256,
    documents: 128,
    proofPileTokens: 32768,
    passkey: { distances: 32, trials: 10 },
    needle: { depths: 11, trials: 5 },
    ruler: { trials: 20 },
    position: { documents: 32, windows: 4 },
    resolution: { documents: 8, queries: 64, trials: 16 },
    choiceItems: null,
    summaries: {
      factor: factors.find((factor) => factor * window >= 16384) ?? factors.at(-1)!,
      ...{ articleTokens: 15000, summaryTokens: 1000, epochs: 10, learningRate: 2e-5 },
      ...{ train: null, test: null, temperature: 0.5, topP: 0.95 },
    },
    costSteps: 5,
  }
}

/** Steps at which models are evaluated: 0, then `points` of them. */
export const pointsOf = ({ steps }: Extension, points: number): number[] => [
  ...new Set(Array.from({ length: points + 1 }, (_, n) => Math.round((n * steps) / points))),
]

export const windowOf = (window: number, factor: number): number => Math.round(window * factor)

/** A factor on the page: 4x, 1.333x. */
export const timesText = (factor: number): string => `${Number(factor.toPrecision(4))}x`

/** window, twice that ... up to `end`, which is always the last. */
export function doublings(window: number, end: number): number[] {
  const list: number[] = []
  for (let length = window; length < end; length *= 2) list.push(length)
  return [...list, end]
}

export function extensionOf(settings: Settings, factor: number): Extension {
  const found = settings.extensions.find((extension) => extension.factor === factor)
  if (found) return found
  const known = settings.extensions.map((extension) => extension.factor)
  throw new RangeError(`factor ${factor} is none of the report's extensions, ${known.join(', ')}`)
}

/**
 * Where two JSON values differ first, as "path is a, but was b"; undefined where they do not. For messages about a
 * folder of another run.
 */
export function difference(now: unknown, then: unknown, path: string): string | undefined {
  const objects = [now, then].every((value) => typeof value === 'object' && value !== null)
  if (!objects || Array.isArray(now) !== Array.isArray(then)) {
    return Object.is(now, then) ? undefined : `${path} is ${quote(now)} now, but was ${quote(then)}`
  }
  const [a, b] = [now as Record<string, unknown>, then as Record<string, unknown>]
  for (const key of [...new Set([...Object.keys(a), ...Object.keys(b)])].sort()) {
    const found = difference(a[key], b[key], path === '' ? key : `${path}.${key}`)
    if (found !== undefined) return found
  }
  return undefined
}
