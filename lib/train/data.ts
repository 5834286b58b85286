import { createHash } from 'node:crypto'
import { RopewalkError } from '../errors.js'
import { openTokens, type TokenOptions, type TokenProgress } from '../files/tokens.js'
import type { BatchOptions, Tokens } from '../model/batch.js'
import { chunksOf, type PoseSettings } from './pose.js'
import { permutation } from './shuffle.js'
import { documentAt, nameOf, type Windows, windowsOf } from './windows.js'

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
 * Examples (`fields`) are not cut: a window holds as many whole ones as follow each other and fit, and is filled up with
 * tokens that nobody predicts. Labels of a prompt's tokens are -100.
 *
 * Each epoch takes every training window once, in an order that follows from the seed and the epoch's number alone.
 * Validation windows are drawn from all of the data by the seed; neighbours of a window may come from the same document,
 * so files of their own are the stricter test.
 */
export class DataLoader {
  private order: { epoch: number; windows: Uint32Array } | undefined

  private constructor(
    private readonly windows: Windows,
    private readonly held: { from: Windows; windows: Uint32Array } | undefined,
    private readonly training: Uint32Array,
    private readonly settings: DataSettings,
    /** Identifies tokens, windows and split: equal hashes and cursors give equal batches. */
    readonly hash: string,
  ) {}

  /** Reads, tokenises (or finds in the cache) and splits. Throws RopewalkError where there is less than one window. */
  static async open(settings: DataSettings, encoder: Encoder): Promise<DataLoader> {
    const { data, context, packing, seed, pose, validation, fields, onWarning } = settings
    const options = { ...settings, encode: (text: string) => encoder.encode(text), tokenizerHash: encoder.hash }
    const file = await openTokens(data, options)
    const cut = { context, examples: fields !== undefined, onWarning }
    const all = windowsOf(file, data, cut, 'data')
    const { count } = all
    let other: string | undefined
    let training = Uint32Array.from({ length: count }, (_, i) => i)
    let held: { from: Windows; windows: Uint32Array } | undefined
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
      held = { from: all, windows: drawn.slice(0, size).sort() }
      training = drawn.slice(size).sort()
    } else if (validation) {
      const from = windowsOf(await openTokens(validation, options), validation, cut, 'validation')
      other = from.file.key
      held = { from, windows: Uint32Array.from({ length: from.count }, (_, i) => i) }
    }
    const identity = [file.key, other ?? validation ?? null, context, packing, ...(pose ? [pose] : [])]
    const hash = createHash('sha256').update(JSON.stringify(identity)).digest('hex')
    return new DataLoader(all, held, training, settings, hash)
  }

  /** Tokens and documents of the data, and how many windows they make. */
  get size(): { tokens: number; documents: number; windows: number; validationWindows: number } {
    return {
      tokens: this.windows.file.tokens,
      documents: this.windows.file.ends.length,
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
    const sample = pose ? await this.skipping(pose, windows, epochs) : await this.sample(this.windows, windows)
    return { sample, cursor: { epoch, index } }
  }

  /**
   * The validation windows in groups of `rows`. The last group is filled up by repeating its first window; `count` says
   * how many of its rows are to be counted.
   */
  async *validation(rows: number): AsyncGenerator<{ sample: Sample; count: number }> {
    if (!this.held) return
    const { from, windows } = this.held
    for (let at = 0; at < windows.length; at += rows) {
      const group = [...windows.subarray(at, at + rows)]
      const count = group.length
      while (group.length < rows) group.push(group[0]!)
      yield { sample: await this.sample(from, group), count }
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
    const { windows: from, settings } = this
    const { file } = from
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
    const origin = windows.map((window) => `${describe(from, window)} and what follows there`)
    return { tokens: { dims, data }, options: { positions: { dims, data: positions } }, origin }
  }

  private async sample(from: Windows, windows: readonly number[]): Promise<Sample> {
    const { context, packing, eosId, fields } = this.settings
    const dims = [windows.length, context]
    const data = new Int32Array(windows.length * context).fill(eosId ?? 0)
    const places = windows.map((window) => from.place(window))
    const parts = await Promise.all(places.map(({ at, length }) => from.file.read(at, length)))
    parts.forEach((ids, row) => data.set(ids, row * context))
    const origin = windows.map((window) => describe(from, window))
    const like = (values: Int32Array): Tokens => ({ dims, data: values })
    const apart = packing === 'documents'
    if (!apart && !fields) return { tokens: like(data), options: {}, origin }

    const { ends, prompts } = from.file
    const labels = data.slice()
    const positions = new Int32Array(data.length)
    const first = new Int32Array(data.length)
    places.forEach(({ at, length }, row) => {
      let document = documentAt(ends, at)
      let start = 0
      for (let t = 0; t < context; t++) {
        const n = row * context + t
        const filling = t >= length
        if (t === length || (!filling && at + t === ends[document])) {
          document++
          start = t
          if (apart) labels[n] = -100
        }
        if (filling || (fields && t - start < prompts[document]!)) labels[n] = -100
        positions[n] = t - start
        first[n] = start
      }
    })
    const options = { labels: like(labels), ...(apart && { positions: like(positions), first: like(first) }) }
    return { tokens: like(data), options, origin }
  }
}

function describe(from: Windows, window: number): string {
  const { at, length } = from.place(window)
  return `window ${window} (${nameOf(from.file, documentAt(from.file.ends, at))}, tokens ${at}..${at + length - 1})`
}
