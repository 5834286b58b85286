import { setImmediate } from 'node:timers/promises'
import { RopewalkError } from '../errors.js'
import { uniform } from '../model/generate.js'
import type { Llama } from '../model/llama.js'
import { queriesAndKeys } from '../model/readout.js'
import type { TokenDocument } from './perplexity.js'
import { addScores, LayerSums, NEAR, rotation, ScoreSum } from './scores.js'

/**
 * Options of {@link attentionResolution}.
 *
 * @category Evaluation
 */
export interface ResolutionOptions {
  /** T, tokens of each document that are read, the beginning-of-sequence token among them; default: the window. */
  context?: number
  /** Layers to look at; default: all. */
  layers?: readonly number[]
  /** Query positions sampled in each document, spread evenly over the context; default 64. */
  queries?: number
  /** Width of the ranges of distances, in tokens; default: an eighth of the trained window, at least context / 256. */
  range?: number
  /** Distances at which copies are tried; default 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64. */
  distances?: readonly number[]
  /** Copies tried at each distance; default 16, 0 leaves them out. */
  trials?: number
  /** Of query positions and copies; default 0. */
  seed?: number
  /** Ends the evaluation between two heads or copies; it rejects with the signal's reason. */
  signal?: AbortSignal
  /** Called after each head and each distance. */
  onProgress?: (done: { done: number; total: number }) => void
}

/**
 * Attention scores q . k / sqrt(D), before the softmax, of a range of distances.
 *
 * @category Evaluation
 */
export interface ScoreRange {
  /** The first distance. */
  from: number
  /** The one after the last. */
  to: number
  /** Scores that were looked at. */
  count: number
  /** The largest of them; far ranges hold fewer pairs than near ones, and so have smaller extremes. */
  max: number
  /** The least. */
  min: number
  /** Their mean. */
  mean: number
  /** Their standard deviation. */
  deviation: number
  /**
   * The most that one of these queries and keys could score at any distance, by the lengths of their pairs: no position
   * can make a score larger.
   */
  bound: number
}

/**
 * What {@link attentionResolution} gives.
 *
 * @category Evaluation
 */
export interface ResolutionResult {
  /** T */
  context: number
  /** The trained window, before any scaling. */
  window: number
  /** As in the options. */
  seed: number
  /** Documents read. */
  documents: number
  /** Documents left out because they are shorter than the context. */
  skipped: number
  /** Queries looked at in each head, over all documents. */
  queries: number
  /** Mean attention weight of the token itself (entry 0) and of the tokens 1 .. 8 before, over layers and heads. */
  near: number[]
  /** Scores by distance over all layers and heads. The first token of the text is not in them. */
  ranges: ScoreRange[]
  /** Scores of the first token of the text, on which heads rest that find nothing. */
  first: Omit<ScoreRange, 'from' | 'to'>
  /** The same by layer. */
  layers: LayerResolution[]
  /** How often the model's first choice repeats a random token, by how many tokens before it came. */
  copies: CopyAccuracy[]
}

/**
 * What the heads of one layer do.
 *
 * @category Evaluation
 */
export interface LayerResolution extends Pick<ResolutionResult, 'ranges' | 'first'> {
  /** The first is 0. */
  layer: number
  /** Mean attention weight of the token itself and of the 1 .. 8 before it, by head. */
  near: number[][]
}

/**
 * Copies of random tokens.
 *
 * @category Evaluation
 */
export interface CopyAccuracy {
  /** The repeated token came so many tokens before. */
  distance: number
  /** Share of first choices that repeat it. */
  accuracy: number
  /** Tokens that were to be foreseen. */
  targets: number
}

const DISTANCES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
/** Random tokens before a copy begins, and tokens of the copy. */
const LEAD = 16
const COPIED = 16
/** Bytes of queries and keys that are held at a time. */
const HELD = 1 << 30

/**
 * How finely a model's attention tells near positions apart, and how large its scores get at far ones: attention to the
 * previous 1 .. 8 tokens, attention scores by distance up to `context`, and copies of random tokens at small distances.
 * A baseline that extrapolates is the model loaded with `rope: 'none'` and the same `context`. Queries and keys come from the
 * model's forward pass; rotation, scores and softmax are computed here in float64, for a sample of query positions.
 *
 * Throws TypeError or RangeError for options out of range, RopewalkError ERR_TEXT_TOO_SHORT where no document has
 * `context` tokens.
 *
 * @category Evaluation
 */
export async function attentionResolution(
  model: Llama,
  documents: readonly TokenDocument[],
  options: ResolutionOptions = {},
): Promise<ResolutionResult> {
  const { config } = model
  const { context, layers, queries, range, distances, trials, seed, signal } = readOptions(model, options)
  const bos = config.bosId === undefined ? [] : [config.bosId]
  const used = documents.filter(({ ids }) => ids.length + bos.length >= context)
  if (used.length === 0) throw tooShort(documents, context)
  const rows = used.map(({ ids }) => [...bos, ...ids.slice(0, context - bos.length)])
  const ranges = Math.ceil(context / range)
  const sums = new Map(layers.map((layer) => [layer, new LayerSums(config.heads, ranges, range)]))
  const total = rows.length * layers.length * config.heads + (trials > 0 ? distances.length : 0)
  let done = 0
  const step = async (): Promise<void> => {
    options.onProgress?.({ done: ++done, total })
    await setImmediate()
    signal?.throwIfAborted()
  }
  const table = rotation(config, context)
  const bytes = 4 * context * (config.heads + config.kvHeads) * config.headDim
  const together = Math.max(1, Math.floor(HELD / bytes))
  const random = uniform(seed)
  for (const row of rows) {
    const positions = sample(random, queries, context)
    for (let at = 0; at < layers.length; at += together) {
      for (const { layer, ...tensors } of await queriesAndKeys(model, [row], layers.slice(at, at + together))) {
        await addScores(sums.get(layer)!, config, tensors, table, positions, step)
      }
    }
  }
  const vocabulary = [...new Set(used.flatMap(({ ids }) => ids))]
  const copies: ResolutionResult['copies'] = []
  for (const distance of trials > 0 ? distances : []) {
    copies.push({ distance, ...(await copyAccuracy(model, distance, trials, vocabulary, random, bos)) })
    await step()
  }
  const found = [...sums].map(([layer, sum]) => ({ layer, sum }))
  return {
    ...{ context, window: config.originalMaxPositionEmbeddings, seed },
    ...{ documents: used.length, skipped: documents.length - used.length, queries: found[0]!.sum.queries },
    ...summary(
      found.map(({ sum }) => sum),
      context,
    ),
    layers: found.map(({ layer, sum }) => ({
      layer,
      ...summary([sum], context),
      near: sum.near.map((head) => Array.from(head, (weight) => weight / sum.queries)),
    })),
    copies,
  }
}

function summary(sums: readonly LayerSums[], context: number): Pick<ResolutionResult, 'near' | 'ranges' | 'first'> {
  const heads = sums.flatMap(({ near, queries }) => near.map((head) => ({ head, queries })))
  const near = Array.from({ length: NEAR + 1 }, (_, n) =>
    heads.reduce((mean, { head, queries }) => mean + head[n]! / queries / heads.length, 0),
  )
  const merged = (of: (sum: LayerSums) => ScoreSum) => {
    const all = new ScoreSum()
    for (const sum of sums) all.merge(of(sum))
    return all
  }
  const { width, ranges } = sums[0]!
  const parts = ranges.map((_, i) => ({
    ...{ from: i * width, to: Math.min((i + 1) * width, context) },
    ...merged((sum) => sum.ranges[i]!).values(),
  }))
  return { near, ranges: parts.filter(({ count }) => count > 0), first: merged((sum) => sum.first).values() }
}

/** Positions from NEAR on, one at random in each of `count` equal parts; all of them where there are no more. */
function sample(random: () => number, count: number, context: number): number[] {
  const all = context - NEAR
  if (count >= all) return Array.from({ length: all }, (_, i) => NEAR + i)
  const edge = (i: number): number => Math.floor((i * all) / count)
  return Array.from({ length: count }, (_, i) => NEAR + edge(i) + Math.floor(random() * (edge(i + 1) - edge(i))))
}

/**
 * Copies at a distance n: LEAD random tokens, n more, then COPIED tokens each of which is the one n before it. The
 * first could not be foreseen and does not count.
 */
async function copyAccuracy(
  model: Llama,
  distance: number,
  trials: number,
  vocabulary: readonly number[],
  random: () => number,
  bos: readonly number[],
): Promise<{ accuracy: number; targets: number }> {
  const begin = bos.length + LEAD + distance
  const rows = Array.from({ length: trials }, () => {
    const row = [...bos]
    while (row.length < begin) row.push(vocabulary[Math.floor(random() * vocabulary.length)]!)
    while (row.length < begin + COPIED) row.push(row[row.length - distance]!)
    return row
  })
  let [right, targets] = [0, 0]
  // One row at a time: the logits of a row are its length times the vocabulary.
  for (const row of rows) {
    const { data, dims } = await model.logits([row])
    const size = dims[2]!
    for (let t = begin + 1; t < row.length; t++) {
      const logits = data.subarray((t - 1) * size, t * size)
      let best = 0
      for (let id = 1; id < size; id++) if (logits[id]! > logits[best]!) best = id
      if (best === row[t]) right++
      targets++
    }
  }
  return { accuracy: right / targets, targets }
}

function readOptions(
  { config, contextWindow }: Llama,
  options: ResolutionOptions,
): Required<Omit<ResolutionOptions, 'signal' | 'onProgress'>> & Pick<ResolutionOptions, 'signal'> {
  const whole = (name: string, value: unknown, least: number, most: number): void => {
    if (!Number.isInteger(value) || (value as number) < least || (value as number) > most) {
      const limit = Number.isFinite(most) ? `from ${least} to ${most}` : `of at least ${least}`
      throw new RangeError(`${name}: ${String(value)}, but it must be a whole number ${limit}`)
    }
  }
  const { context = contextWindow, queries = 64, distances = DISTANCES, trials = 16, seed = 0, signal } = options
  const layers = options.layers ?? Array.from({ length: config.layers }, (_, layer) => layer)
  // Two more than the nearest, so that there is a query whose near tokens are all there.
  whole('context', context, NEAR + 2, Infinity)
  const window = config.originalMaxPositionEmbeddings
  const range = options.range ?? Math.max(1, Math.ceil(context / 256), Math.floor(window / 8))
  whole('range', range, 1, Infinity)
  whole('queries', queries, 1, Infinity)
  whole('trials', trials, 0, Infinity)
  whole('seed', seed, 0, Number.MAX_SAFE_INTEGER)
  if (layers.length === 0) throw new RangeError('layers: the list is empty')
  for (const layer of layers) whole('layers', layer, 0, config.layers - 1)
  if (new Set(layers).size < layers.length) throw new RangeError(`layers: ${layers.join(', ')} names one twice`)
  for (const distance of distances) whole('distances', distance, 1, Infinity)
  return { context, layers, queries, range, distances, trials, seed, ...(signal && { signal }) }
}

function tooShort(documents: readonly TokenDocument[], context: number): Error {
  if (documents.length === 0) return new TypeError('documents: the list is empty')
  const { source, ids } = documents.reduce((a, b) => (b.ids.length > a.ids.length ? b : a))
  return new RopewalkError(
    'ERR_TEXT_TOO_SHORT',
    `the longest of ${documents.length} documents, ${source}, has ${ids.length} tokens, but the context is ${context}: ` +
      'give longer documents, or a smaller context',
  )
}
