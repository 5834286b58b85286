import { RopewalkError } from '../errors.js'
import { readDocuments } from '../files/text.js'
import type { Llama } from '../model/llama.js'

/**
 * A text as token ids.
 *
 * @category Evaluation
 */
export interface TokenDocument {
  /** Names the text in messages: file, file:line or file#row. */
  source: string
  /** Without special tokens. */
  ids: readonly number[]
}

/**
 * Options of {@link perplexity}.
 *
 * @category Evaluation
 */
export interface PerplexityOptions {
  /** Window lengths in tokens, at least 2, each evaluated on the same documents. */
  windows: readonly number[]
  /** Tokens by which the window moves on; default 256, as in the paper, or the text in the smallest window if less. */
  stride?: number
  /**
   * Puts the beginning-of-sequence token before each window, which then has one token of text fewer: the convention of
   * the paper's and YaRN's figures. Default: true where the model has such a token.
   */
  bos?: boolean
  /** Cuts each document after so many tokens (32768 for the paper's proof-pile figures); default: none is cut. */
  truncate?: number
  /** Ends the evaluation between two windows; it rejects with the signal's reason. */
  signal?: AbortSignal
  /** Called after each window; `window` is the length at work, `perplexity` the token-weighted one so far. */
  onProgress?: (done: { window: number; done: number; total: number; perplexity: number }) => void
}

/**
 * What {@link perplexity} gives for one window length.
 *
 * @category Evaluation
 */
export interface PerplexityResult {
  /** Window length in tokens. */
  window: number
  /** Tokens by which the window moved on. */
  stride: number
  /** Whether each window began with the beginning-of-sequence token. */
  bos: boolean
  /** Documents that were used. */
  documents: number
  /** Documents left out because they are shorter than the largest window. */
  skipped: number
  /** Tokens of the documents used. */
  tokens: number
  /** How many of them were predicted. */
  targets: number
  /** Windows run. */
  windows: number
  /** Mean negative log-likelihood of a target, in nats. */
  nll: number
  /** exp(nll): every token counts the same. */
  perplexity: number
  /** exp of the mean over all windows of their mean nll, the first window counting as much as a later one (YaRN). */
  perplexityWindowMean: number
  /** Standard error of nll, by documents; undefined for a single document. */
  standardError: number | undefined
  /** 95 % interval of perplexity, by documents; undefined for a single document. */
  interval: [number, number] | undefined
}

/** What an evaluation of the loss needs of a model. */
export type LossModel = Pick<Llama, 'config' | 'tokenLosses'>

/** Window `ids[begin:end]` of a document, of which the last `fresh` tokens were in no window before. */
export interface Window {
  begin: number
  end: number
  fresh: number
}

/** Windows of `size` tokens, `stride` apart, up to the first that reaches the end of `length` tokens. */
export function slidingWindows(length: number, size: number, stride: number): Window[] {
  const windows: Window[] = []
  for (let begin = 0, previous = 0; previous < length; begin += stride) {
    const end = Math.min(begin + size, length)
    windows.push({ begin, end, fresh: end - previous })
    previous = end
  }
  return windows
}

/**
 * Reads files and folders (.txt, .jsonl, .ndjson, .parquet) as token documents, by the model's tokenizer and in the
 * order of `paths`. A .txt file is one document; the others have one in `field` (default `text`) of every line or row.
 *
 * Throws RopewalkError: ERR_NO_TEXT where there is no document, ERR_NOT_FOUND, ERR_FORMAT, ERR_FIELD, ERR_EMPTY and the
 * other codes of files; the reason of `signal` where that is aborted.
 *
 * @category Evaluation
 */
export async function readTokenDocuments(
  model: Pick<Llama, 'tokenizer'>,
  paths: readonly string[],
  options: { field?: string; signal?: AbortSignal } = {},
): Promise<TokenDocument[]> {
  const { field, signal } = options
  const tokenizer = await model.tokenizer()
  const documents: TokenDocument[] = []
  for await (const { text, source } of readDocuments(paths, field === undefined ? {} : { field })) {
    signal?.throwIfAborted()
    documents.push({ source, ids: tokenizer.encode(text, { addSpecialTokens: false }) })
  }
  if (documents.length === 0) {
    throw new RopewalkError(
      'ERR_NO_TEXT',
      `${paths.join(', ')}: there is no text: give files with at least one document`,
    )
  }
  return documents
}

/**
 * Sliding-window perplexity (Press et al., arXiv 2108.12409): each window gets positions from 0, and only its tokens
 * that no earlier window held are scored. The first token of a document is scored only behind a BOS. Documents shorter
 * than the largest window are left out, so that all windows are measured on the same text. `model` is a {@link Llama}.
 * One result a window length, in the order of `windows`.
 *
 * Throws TypeError or RangeError for options out of range, RopewalkError ERR_TEXT_TOO_SHORT where no document is long
 * enough. Windows longer than the model's context window are computed all the same: that is what a baseline does.
 *
 * @category Evaluation
 */
export async function perplexity(
  model: LossModel,
  documents: readonly TokenDocument[],
  options: PerplexityOptions,
): Promise<PerplexityResult[]> {
  const { windows, stride, bosId } = readOptions(model, options)
  const room = bosId === undefined ? 0 : 1
  const needed = Math.max(...windows) - room
  const texts = documents.map(({ source, ids }) => ({ source, ids: ids.slice(0, options.truncate) }))
  const used = texts.filter(({ ids }) => ids.length >= needed)
  if (used.length === 0) throw tooShort(texts, needed, options)
  const tokens = used.reduce((sum, { ids }) => sum + ids.length, 0)
  const common = {
    stride,
    bos: bosId !== undefined,
    documents: used.length,
    skipped: texts.length - used.length,
    tokens,
  }
  const results: PerplexityResult[] = []
  for (const window of windows) {
    const plans = used.map(({ ids }) => slidingWindows(ids.length, window - room, stride))
    const total = plans.reduce((sum, plan) => sum + plan.length, 0)
    const sums: Sum[] = []
    const means: number[] = []
    let done = 0
    for (const [d, { ids }] of used.entries()) {
      const sum: Sum = { nll: 0, targets: 0 }
      sums.push(sum)
      for (const { begin, end, fresh } of plans[d]!) {
        options.signal?.throwIfAborted()
        const row = ids.slice(begin, end)
        if (bosId !== undefined) row.unshift(bosId)
        const targets = Math.min(fresh, row.length - 1)
        // A last window of one token, with neither BOS nor overlap, predicts nothing.
        if (targets > 0) {
          const nll = await scoreTail(model, row, targets)
          sum.nll += nll
          sum.targets += targets
          means.push(nll / targets)
        }
        done++
        const { nll, targets: scored } = totalOf(sums)
        options.onProgress?.({ window, done, total, perplexity: Math.exp(nll / scored) })
      }
    }
    results.push({ window, ...common, windows: total, ...summary(sums, means) })
  }
  return results
}

/** Negative log-likelihood, in nats, of the last `targets` tokens of a row. */
async function scoreTail(model: LossModel, row: readonly number[], targets: number): Promise<number> {
  const labels = row.map((id, t) => (t < row.length - targets ? -100 : id))
  const { data } = await model.tokenLosses([row], { labels: [labels] })
  return data.reduce((sum, nll) => sum + nll, 0)
}

interface Sum {
  nll: number
  targets: number
}

const totalOf = (sums: readonly Sum[]): Sum => ({
  nll: sums.reduce((total, { nll }) => total + nll, 0),
  targets: sums.reduce((total, { targets }) => total + targets, 0),
})

type Summary = Pick<
  PerplexityResult,
  'targets' | 'nll' | 'perplexity' | 'perplexityWindowMean' | 'standardError' | 'interval'
>

function summary(sums: readonly Sum[], means: readonly number[]): Summary {
  const total = totalOf(sums)
  const nll = total.nll / total.targets
  const windowMean = means.reduce((sum, mean) => sum + mean, 0) / means.length
  let standardError: number | undefined
  let interval: [number, number] | undefined
  if (sums.length > 1) {
    // Documents are independent, tokens and windows are not: the ratio estimator over documents.
    const squares = sums.reduce((sum, document) => sum + (document.nll - nll * document.targets) ** 2, 0)
    standardError = Math.sqrt((squares * sums.length) / (sums.length - 1)) / total.targets
    interval = [Math.exp(nll - 1.96 * standardError), Math.exp(nll + 1.96 * standardError)]
  }
  return {
    targets: total.targets,
    nll,
    perplexity: Math.exp(nll),
    perplexityWindowMean: Math.exp(windowMean),
    standardError,
    interval,
  }
}

function readOptions(
  model: LossModel,
  options: PerplexityOptions,
): { windows: readonly number[]; stride: number; bosId: number | undefined } {
  const { windows, bos = model.config.bosId !== undefined, truncate } = options
  if (!Array.isArray(windows) || windows.length === 0) throw new TypeError('windows must be a list of window lengths')
  for (const window of windows) {
    if (!Number.isInteger(window) || window < 2)
      throw new RangeError(`window is ${window}, must be a whole number >= 2`)
  }
  if (bos && model.config.bosId === undefined) {
    throw new RangeError('bos is true, but config.json has no bos_token_id: set bos to false')
  }
  const shortest = Math.min(...windows) - (bos ? 1 : 0)
  const stride = options.stride ?? Math.min(256, shortest)
  if (!Number.isInteger(stride) || stride < 1 || stride > shortest) {
    throw new RangeError(
      `stride is ${stride}, but must be a whole number from 1 to ${shortest}, the text in the smallest window` +
        (bos ? ' (one token of it is the BOS)' : ''),
    )
  }
  const largest = Math.max(...windows)
  if (truncate !== undefined && !(Number.isInteger(truncate) && truncate >= largest)) {
    throw new RangeError(`truncate is ${truncate}, but must be a whole number >= ${largest}, the largest window`)
  }
  return { windows, stride, bosId: bos ? model.config.bosId : undefined }
}

function tooShort(texts: readonly TokenDocument[], needed: number, { windows }: PerplexityOptions): Error {
  const [first, ...others] = texts
  if (!first) return new TypeError('documents: the list is empty')
  const { source, ids } = others.reduce((a, b) => (b.ids.length > a.ids.length ? b : a), first)
  const longest = texts.length === 1 ? `${source} has` : `the longest of ${texts.length} documents, ${source}, has`
  return new RopewalkError(
    'ERR_TEXT_TOO_SHORT',
    `${longest} ${ids.length} tokens, but a window of ${Math.max(...windows)} needs ${needed}: ` +
      'give longer documents, or smaller windows',
  )
}
