import { RopewalkError } from '../errors.js'
import type { LossModel, TokenDocument } from './perplexity.js'

/**
 * Options of {@link perplexityByPosition}.
 *
 * @category Evaluation
 */
export interface PositionOptions {
  /** Window length in tokens, at least 4. */
  window: number
  /** Bins for each doubling of the distance; default 1. */
  binsPerOctave?: number
  /** Puts the beginning-of-sequence token before each window. Default: true where the model has such a token. */
  bos?: boolean
  /** Windows of each document at most; default: as many as it has. */
  windowsPerDocument?: number
  /** Ends the evaluation between two windows; it rejects with the signal's reason. */
  signal?: AbortSignal
  /** Called after each window; `perplexity` is that of all tokens so far. */
  onProgress?: (done: { done: number; total: number; perplexity: number }) => void
}

/**
 * Tokens that stand `from` to `to` tokens from the start of their window, or, which is the same, see that many before
 * them.
 *
 * @category Evaluation
 */
export interface PositionBin {
  /** Smallest distance, in tokens. */
  from: number
  /** Largest distance. */
  to: number
  /** Tokens in it, of all windows. */
  targets: number
  /** Their mean negative log-likelihood, in nats. */
  nll: number
  /** exp(nll) */
  perplexity: number
  /** Standard error of nll, by documents; undefined for a single document. */
  standardError: number | undefined
  /** 95 % interval of nll, by documents; undefined for a single document. */
  interval: [number, number] | undefined
  /** How much lower nll is than in the bin before; undefined in the first one. */
  gain: number | undefined
  /** Standard error of gain, by documents; undefined in the first bin, and for a single document. */
  gainError: number | undefined
}

/**
 * What {@link perplexityByPosition} gives.
 *
 * @category Evaluation
 */
export interface PositionResult {
  /** As in the options. */
  window: number
  /** Whether each window began with the beginning-of-sequence token. */
  bos: boolean
  /** Documents that were used. */
  documents: number
  /** Documents left out because they are shorter than a window. */
  skipped: number
  /** Windows run. */
  windows: number
  /** From the start of the window to its end. */
  bins: PositionBin[]
  /**
   * Up to where more context helps: `to` of the last bin whose gain lies above 0 by more than 1.96 standard errors (95 %),
   * 0 where none does; undefined for a single document.
   */
  helpsUpTo: number | undefined
}

/** Bounds of bins that grow by the factor 2^(1 / perOctave): 1, 2, 4 ... for one an octave. The last one ends at `end`. */
export function logBins(end: number, perOctave: number): { from: number; to: number }[] {
  const starts: number[] = []
  for (let i = 0; ; i++) {
    const from = Math.round(2 ** (i / perOctave))
    if (from > end) break
    if (from !== starts.at(-1)) starts.push(from)
  }
  return starts.map((from, i) => ({ from, to: (starts[i + 1] ?? end + 1) - 1 }))
}

/**
 * Negative log-likelihood by position within the window: each document is cut into windows that do not overlap, and every
 * token is scored by what stands before it in its window. Mean nll in bins of the distance from the window's start, which
 * grow in proportion, tells whether a model uses the far context, and where it stops. Standard errors are of the ratio
 * estimator over documents, in which tokens of one document need not be independent; that of a gain is of the difference
 * within the same documents. `model` is a {@link Llama}.
 *
 * Throws TypeError or RangeError for options out of range, RopewalkError ERR_TEXT_TOO_SHORT where no document fills a
 * window. A window longer than the model's context window is computed all the same: that is what a baseline does.
 *
 * @category Evaluation
 */
export async function perplexityByPosition(
  model: LossModel,
  documents: readonly TokenDocument[],
  options: PositionOptions,
): Promise<PositionResult> {
  const { window, bosId, perOctave, most } = readOptions(model, options)
  const size = bosId === undefined ? window : window - 1
  const used = documents.filter(({ ids }) => ids.length >= size)
  if (used.length === 0) throw tooShort(documents, size, window)
  const counts = used.map(({ ids }) => Math.min(most, Math.floor(ids.length / size)))
  const total = counts.reduce((sum, count) => sum + count, 0)
  const bins = logBins(window - 1, perOctave)
  const binAt = Int32Array.from({ length: window }, (_, t) => bins.findIndex(({ to }) => t <= to))
  const sums: Sums[] = []
  let done = 0
  let nll = 0
  for (const [d, { ids }] of used.entries()) {
    const sum = bins.map(() => ({ nll: 0, targets: 0 }))
    sums.push(sum)
    for (let w = 0; w < counts[d]!; w++) {
      options.signal?.throwIfAborted()
      const row = ids.slice(w * size, (w + 1) * size)
      if (bosId !== undefined) row.unshift(bosId)
      const { data } = await model.tokenLosses([row])
      // Entry t is about the token t + 1, which sees t + 1 others.
      for (let t = 0; t + 1 < window; t++) {
        const bin = sum[binAt[t + 1]!]!
        bin.nll += data[t]!
        bin.targets++
        nll += data[t]!
      }
      options.onProgress?.({ done: ++done, total, perplexity: Math.exp(nll / (done * (window - 1))) })
    }
  }
  const results = bins.map((bin, i) => ({ ...bin, ...estimate(sums, i) }))
  const common = { window, bos: bosId !== undefined, documents: used.length, skipped: documents.length - used.length }
  return { ...common, windows: total, bins: results, helpsUpTo: lastGain(results) }
}

/** nll and targets of each bin, of one document. */
type Sums = { nll: number; targets: number }[]

function estimate(sums: readonly Sums[], bin: number): Omit<PositionBin, 'from' | 'to'> {
  const here = ratio(sums, bin)
  const before = bin > 0 ? ratio(sums, bin - 1) : undefined
  const standardError = errorOf(here.residuals)
  const { nll, targets } = here
  return {
    targets,
    nll,
    perplexity: Math.exp(nll),
    standardError,
    interval: standardError === undefined ? undefined : [nll - 1.96 * standardError, nll + 1.96 * standardError],
    gain: before && before.nll - nll,
    gainError: before && errorOf(here.residuals.map((residual, d) => before.residuals[d]! - residual)),
  }
}

/** Mean nll of a bin, and how each document pulls at it. */
function ratio(sums: readonly Sums[], bin: number): { nll: number; targets: number; residuals: number[] } {
  const targets = sums.reduce((total, sum) => total + sum[bin]!.targets, 0)
  const nll = sums.reduce((total, sum) => total + sum[bin]!.nll, 0) / targets
  return { nll, targets, residuals: sums.map((sum) => (sum[bin]!.nll - nll * sum[bin]!.targets) / targets) }
}

function errorOf(residuals: readonly number[]): number | undefined {
  const count = residuals.length
  if (count < 2) return undefined
  return Math.sqrt((residuals.reduce((sum, r) => sum + r * r, 0) * count) / (count - 1))
}

/** @internal The end of the last bin that more context has helped; undefined from one document. */
export function lastGain(bins: readonly PositionBin[]): number | undefined {
  if (bins[0]!.standardError === undefined) return undefined
  return bins.findLast(({ gain = 0, gainError = Infinity }) => gain > 1.96 * gainError)?.to ?? 0
}

function readOptions(
  model: LossModel,
  { window, binsPerOctave: perOctave = 1, bos = model.config.bosId !== undefined, windowsPerDocument }: PositionOptions,
): { window: number; perOctave: number; bosId: number | undefined; most: number } {
  if (!Number.isInteger(window) || window < 4) throw new RangeError(`window is ${window}, must be a whole number >= 4`)
  if (!Number.isInteger(perOctave) || perOctave < 1) {
    throw new RangeError(`binsPerOctave is ${perOctave}, must be a whole number >= 1`)
  }
  if (windowsPerDocument !== undefined && !(Number.isInteger(windowsPerDocument) && windowsPerDocument >= 1)) {
    throw new RangeError(`windowsPerDocument is ${windowsPerDocument}, must be a whole number >= 1`)
  }
  if (bos && model.config.bosId === undefined) {
    throw new RangeError('bos is true, but config.json has no bos_token_id: set bos to false')
  }
  return { window, perOctave, bosId: bos ? model.config.bosId : undefined, most: windowsPerDocument ?? Infinity }
}

function tooShort(documents: readonly TokenDocument[], needed: number, window: number): Error {
  if (documents.length === 0) return new TypeError('documents: the list is empty')
  const { source, ids } = documents.reduce((a, b) => (b.ids.length > a.ids.length ? b : a))
  return new RopewalkError(
    'ERR_TEXT_TOO_SHORT',
    `the longest of ${documents.length} documents, ${source}, has ${ids.length} tokens, but a window of ${window} needs ` +
      `${needed}: give longer documents, or a smaller window`,
  )
}
