import { createHash } from 'node:crypto'
import { basename } from 'node:path'
import { RopewalkError } from '../errors.js'
import { openTokens, type TokenFile, type TokenOptions, type TokenProgress } from '../files/tokens.js'
import type { BatchOptions, Tokens } from '../model/batch.js'
import { chunksOf, type PoseSettings } from './pose.js'
import { permutation } from './shuffle.js'

/**
 * Documents follow each other, and windows are cut from the whole. With `concat` attention runs across documents, as in
 * the paper; with `documents` no token attends to, or is predicted from, another document, and positions restart.
 *
 * @category Training
 */
export type Packing = 'concat' | 'documents'
export type { TokenProgress }

export interface DataSettings extends Omit<TokenOptions, 'encode' | 'tokenizerHash'> {
  /** Files and folders of documents. */
  data: readonly string[]
  /** Tokens in a window. */
  context: number
  packing: Packing
  seed: number
  /** Of training windows: chunks of longer texts. */
  pose?: PoseSettings | undefined
  /** A fraction (below 1) or number of windows to keep out of training, or files of their own. */
  validation: number | readonly string[] | undefined
}

/** What the loader needs of a tokenizer. */
export interface Encoder {
  encode(text: string): readonly number[]
  hash: string
}

/** Where in the data a run is: `index` windows of `epoch` have been taken. Nothing else decides what comes next. */
export interface DataCursor {
  epoch: number
  index: number
}

/** Windows (B,T), and for packed documents what keeps them apart. */
export interface Sample {
  tokens: Tokens
  options: BatchOptions
  /** For messages: where each row comes from. */
  origin: string[]
}

/** Stream numbers of the seed: epoch e is shuffled by stream e, the validation split is drawn by this one. */
const SPLIT_STREAM = 0xffffffff

/**
 * Documents as one stream of tokens, cut into windows of `context`; what is left over at the end (less than a window)
 * is not used. The labels are the tokens themselves, so a window holds context - 1 predictions.
 *
 * `concat` lets attention run across documents, as the paper does. `documents` keeps them apart: no token attends to, or
 * predicts, a token of another document, and positions start at 0 with each; a document that the end of a window cuts
 * goes on in the next one as a document of its own.
 *
 * Each epoch takes every training window once, in an order that follows from the seed and the epoch's number alone.
 * Validation windows are drawn from all of the data by the seed; neighbours of a window may come from the same document,
 * so files of their own are the stricter test.
 */
export class DataLoader {
  private order: { epoch: number; windows: Uint32Array } | undefined

  private constructor(
    private readonly file: TokenFile,
    private readonly held: { file: TokenFile; windows: Uint32Array } | undefined,
    private readonly training: Uint32Array,
    private readonly settings: DataSettings,
    /** Identifies tokens, windows and split: equal hashes and cursors give equal batches. */
    readonly hash: string,
  ) {}

  /** Reads, tokenises (or finds in the cache) and splits. Throws RopewalkError where there is less than one window. */
  static async open(settings: DataSettings, encoder: Encoder): Promise<DataLoader> {
    const { data, context, packing, seed, pose, validation } = settings
    const options = { ...settings, encode: (text: string) => encoder.encode(text), tokenizerHash: encoder.hash }
    const file = await openTokens(data, options)
    let other: TokenFile | undefined
    const count = countWindows(file, data, context, 'data')
    let training = Uint32Array.from({ length: count }, (_, i) => i)
    let held: { file: TokenFile; windows: Uint32Array } | undefined
    if (typeof validation === 'number') {
      const size = validation < 1 ? Math.max(1, Math.round(count * validation)) : validation
      if (size >= count) {
        throw new RopewalkError(
          'ERR_DATA',
          `validation takes ${size} of ${count} windows of ${context} tokens and leaves none to train on: ` +
            'use less validation, a smaller context or more data',
        )
      }
      const drawn = permutation(count, seed, SPLIT_STREAM)
      held = { file, windows: drawn.slice(0, size).sort() }
      training = drawn.slice(size).sort()
    } else if (validation) {
      other = await openTokens(validation, options)
      const windows = countWindows(other, validation, context, 'validation')
      held = { file: other, windows: Uint32Array.from({ length: windows }, (_, i) => i) }
    }
    const identity = [file.key, other?.key ?? validation ?? null, context, packing, ...(pose ? [pose] : [])]
    const hash = createHash('sha256').update(JSON.stringify(identity)).digest('hex')
    return new DataLoader(file, held, training, settings, hash)
  }

  /** Tokens and documents of the data, and how many windows they make. */
  get size(): { tokens: number; documents: number; windows: number; validationWindows: number } {
    return {
      tokens: this.file.tokens,
      documents: this.file.ends.length,
      windows: this.training.length,
      validationWindows: this.held?.windows.length ?? 0,
    }
  }

  /** The `rows` windows after a cursor, and the cursor after them. Epochs follow each other without a gap. */
  async next(cursor: DataCursor, rows: number): Promise<{ sample: Sample; cursor: DataCursor }> {
    let { epoch, index } = cursor
    const windows: number[] = []
    const epochs: number[] = []
    while (windows.length < rows) {
      if (index >= this.training.length) {
        epoch++
        index = 0
      }
      windows.push(this.epoch(epoch)[index++]!)
      epochs.push(epoch)
    }
    const { pose } = this.settings
    const sample = pose ? await this.skipping(pose, windows, epochs) : await this.sample(this.file, windows)
    return { sample, cursor: { epoch, index } }
  }

  /**
   * The validation windows in groups of `rows`. The last group is filled up by repeating its first window; `count` says
   * how many of its rows are to be counted.
   */
  async *validation(rows: number): AsyncGenerator<{ sample: Sample; count: number }> {
    if (!this.held) return
    const { file, windows } = this.held
    for (let at = 0; at < windows.length; at += rows) {
      const group = [...windows.subarray(at, at + rows)]
      const count = group.length
      while (group.length < rows) group.push(group[0]!)
      yield { sample: await this.sample(file, group), count }
    }
  }

  private epoch(epoch: number): Uint32Array {
    if (this.order?.epoch !== epoch) {
      const order = permutation(this.training.length, this.settings.seed, epoch)
      this.order = { epoch, windows: order.map((i) => this.training[i]!) }
    }
    return this.order.windows
  }

  /** Windows of PoSE: what a window skips stays inside the document that it begins in. */
  private async skipping(pose: PoseSettings, windows: readonly number[], epochs: readonly number[]): Promise<Sample> {
    const { file, settings } = this
    const { context, seed } = settings
    const dims = [windows.length, context]
    const data = new Int32Array(windows.length * context)
    const positions = new Int32Array(data.length)
    const rows = windows.map(async (window, row) => {
      const start = window * context
      const room = file.ends[documentAt(file.ends, start)]! - start
      for (const chunk of chunksOf(pose, context, { start, room }, seed, epochs[row]!, window)) {
        const to = row * context + chunk.at
        data.set(await file.read(chunk.token, chunk.length), to)
        for (let t = 0; t < chunk.length; t++) positions[to + t] = chunk.position + t
      }
    })
    await Promise.all(rows)
    const origin = windows.map((window) => `${describe(file, window, context)} and what follows there`)
    return { tokens: { dims, data }, options: { positions: { dims, data: positions } }, origin }
  }

  private async sample(file: TokenFile, windows: readonly number[]): Promise<Sample> {
    const { context, packing } = this.settings
    const dims = [windows.length, context]
    const data = new Int32Array(windows.length * context)
    const parts = await Promise.all(windows.map((window) => file.read(window * context, context)))
    parts.forEach((ids, row) => data.set(ids, row * context))
    const origin = windows.map((window) => describe(file, window, context))
    if (packing === 'concat') return { tokens: { dims, data }, options: {}, origin }

    const labels = data.slice()
    const positions = new Int32Array(data.length)
    const first = new Int32Array(data.length)
    windows.forEach((window, row) => {
      const at = window * context
      let document = documentAt(file.ends, at)
      let start = 0
      for (let t = 0; t < context; t++) {
        const n = row * context + t
        if (at + t === file.ends[document]) {
          document++
          start = t
          labels[n] = -100
        }
        positions[n] = t - start
        first[n] = start
      }
    })
    const like = (values: Int32Array): Tokens => ({ dims, data: values })
    return {
      tokens: like(data),
      options: { labels: like(labels), positions: like(positions), first: like(first) },
      origin,
    }
  }
}

function countWindows(file: TokenFile, paths: readonly string[], context: number, option: string): number {
  const count = Math.floor(file.tokens / context)
  if (count > 0) return count
  throw new RopewalkError(
    'ERR_DATA',
    `${option}: a window of context ${context} takes ${context} tokens, but ${paths.join(', ')} ` +
      `${paths.length === 1 ? 'has' : 'have'} ${file.tokens}: use a smaller context or more data`,
  )
}

/** Index of the document that holds a token: the first whose end lies behind it. */
function documentAt(ends: Float64Array, token: number): number {
  let low = 0
  for (let high = ends.length; low < high;) {
    const middle = (low + high) >>> 1
    if (ends[middle]! <= token) low = middle + 1
    else high = middle
  }
  return low
}

function describe(file: TokenFile, window: number, context: number): string {
  const at = window * context
  let document = documentAt(file.ends, at)
  const source = file.files.find(({ documents }) => {
    if (document < documents) return true
    document -= documents
    return false
  })
  return `window ${window} (${basename(source!.path)}, document ${document + 1}, tokens ${at}..${at + context - 1})`
}
