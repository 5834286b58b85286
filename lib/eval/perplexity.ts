import { formatCount, RopewalkError } from '../errors.js'
import { readDocuments } from '../files/text.js'
import type { Llama } from '../model/llama.js'

/** A text as token ids, without special tokens. `source` names it in messages. */
export interface TokenDocument {
  source: string
  ids: readonly number[]
}

export interface PerplexityOptions {
  /** Window lengths in tokens, each evaluated on the same documents. */
  windows: readonly number[]
  /** Tokens by which the window moves on; default 256, as in the paper. At most the smallest window. */
  stride?: number
  /**
   * Puts the beginning-of-sequence token before each window, which then has one token of text fewer: the convention of
   * the paper's and YaRN's figures. Default: true where the model has such a token.
   */
  bos?: boolean
  /** Cuts each document after so many tokens (32768 for the paper's proof-pile figures). */
  truncate?: number
  signal?: AbortSignal
  /** Called after each window; `window` is the length at work, `perplexity` the token-weighted one so far. */
  onProgress?: (done: { window: number; done: number; total: number; perplexity: number }) => void
}

export interface PerplexityResult {
  /** Window length and stride in tokens. */
  window: number
  stride: number
  bos: boolean
  /** Documents that were used, and those left out because they are shorter than the largest window. */
  documents: number
  skipped: number
  /** Tokens of the documents used, how many of them were predicted, and windows run. */
  tokens: number
  targets: number
  windows: number
  /** Mean negative log-likelihood of a target, in nats. */
  nll: number
  /** exp(nll): every token counts the same. */
  perplexity: number
  /** exp of the mean over all windows of their mean nll, the first window counting as much as a later one (YaRN). */
  perplexityWindowMean: number
  /** Standard error of nll and 95 % interval of perplexity, by documents; undefined for a single document. */
  standardError: number | undefined
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

/** Reads text files (.txt, .jsonl, .parquet ...) as token documents. Throws RopewalkError where they hold no text. */
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
    throw new RopewalkError('ERR_NO_TEXT', `${paths.join(', ')}: there is no text: give files with at least one document`)
  }
  return documents
}

/**
 * Sliding-window perplexity (Press et al.): each window gets positions from 0, and only its tokens that no earlier
 * window held are scored. The first token of a document is scored only behind a BOS. Documents shorter than the largest
 * window are left out, so that all windows are measured on the same text. Throws RopewalkError when none is long enough.
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
  const results: PerplexityResult[] = []
  for (const window of windows) {
    const plans = used.map(({ ids }) => slidingWindows(ids.length, window - room, stride))
    const total = plans.reduce((sum, plan) => sum + plan.length, 0)
    const sums: Sum[] = []
    const means: number[] = []
    for (const [d, { ids }] of used.entries()) {
      const sum = { nll: 0, targets: 0 }
      sums.push(sum)
      for (const { begin, end, fresh } of plans[d]!) {
        options.signal?.throwIfAborted()
        const row = ids.slice(begin, end)
        if (bosId !== undefined) row.unshift(bosId)
        const targets = Math.min(fresh, row.length - 1)
        // A last window of one token, with neither BOS nor overlap, predicts nothing.
        if (targets > 0) {
          const labels = row.map((id, t) => (t < row.length - targets ? -100 : id))
          const { data } = await model.tokenLosses([row], { labels: [labels] })
          const nll = data.reduce((a, b) => a + b, 0)
          sum.nll += nll
          sum.targets += targets
          means.push(nll / targets)
        }
        const { nll, targets: scored } = add(sums)
        const done = plans.slice(0, d).reduce((n, plan) => n + plan.length, plans[d]!.findIndex((w) => w.begin === begin) + 1)
        options.onProgress?.({ window, done, total, perplexity: Math.exp(nll / scored) })
      }
    }
    const tokens = used.reduce((n, { ids }) => n + ids.length, 0)
    const counts = { documents: used.length, skipped: texts.length - used.length, tokens, windows: total }
    results.push({ window, stride, bos: bosId !== undefined, ...counts, ...summary(sums, means) })
  }
  return results
}
