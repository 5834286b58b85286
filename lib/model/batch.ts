import { quote } from '../errors.js'
import { rotationTable } from '../rope.js'
import { fromBfloat16, toBfloat16 } from '../runtime/bfloat16.js'
import type { Device } from '../runtime/device.js'
import type { LlamaConfig } from './config.js'
import type { Tensor } from '../runtime/tensor.js'
import type { BatchTensors } from './forward.js'

/**
 * A tensor on the host, with the fields that onnxruntime-common has.
 *
 * @category Models
 */
export interface HostTensor<Data = Float32Array | Uint16Array | Int32Array> {
  /** Element type: float32 in a Float32Array, bfloat16 (the upper half of a float32) in a Uint16Array, or int32. */
  type: 'float32' | 'bfloat16' | 'int32'
  /** Length of each dimension. */
  dims: readonly number[]
  /** The elements, in row-major order. */
  data: Data
}

/**
 * Token ids (B,T): an array of rows of one length, or an int32 tensor.
 *
 * @category Models
 */
export type Tokens =
  | readonly (readonly number[])[]
  | {
      /** [B, T] */
      dims: readonly number[]
      /** The ids, row after row. */
      data: Int32Array
    }

/**
 * How a batch is read. With all of them the defaults, each row is one text whose tokens see all before them.
 *
 * @category Models
 */
export interface BatchOptions {
  /** (B,T) as in transformers: what each token is, -100 to ignore it; position t predicts entry t + 1. Default: tokens. */
  labels?: Tokens
  /** (B,T) position of each token; default 0 .. T-1. Packed documents restart at 0. */
  positions?: Tokens
  /** (B,T) first index in its row that each token may attend to, 0 .. t; default 0. Keeps packed documents apart. */
  first?: Tokens
}

/** A checked batch on the host. */
export interface Batch {
  rows: number
  time: number
  ids: Int32Array
  /** Shifted: entry n is the label of the prediction at n, -1 for none. */
  labels: Int32Array
  positions: Int32Array
  first: Int32Array
  /** Number of predictions that count. */
  targets: number
}

function matrix(value: Tokens, name: string): { rows: number; time: number; data: Int32Array } {
  if (Array.isArray(value)) {
    const rows = value as readonly (readonly number[])[]
    const time = rows[0]?.length ?? 0
    if (!Array.isArray(rows[0]) && !ArrayBuffer.isView(rows[0])) {
      throw new TypeError(`${name} must be an array of rows of token ids (B,T), or { dims: [B, T], data: Int32Array }`)
    }
    if (time === 0) throw new RangeError(`${name}: there are no tokens`)
    const data = new Int32Array(rows.length * time)
    rows.forEach((row, b) => {
      if (!Array.isArray(row) && !ArrayBuffer.isView(row))
        throw new TypeError(`${name}[${b}] is ${quote(row)}, not a row`)
      if (row.length !== time) {
        throw new RangeError(`${name}: row ${b} has ${row.length} entries, row 0 has ${time}; all must be equally long`)
      }
      for (let t = 0; t < time; t++) {
        const entry = row[t]
        if (!Number.isInteger(entry) || Math.abs(entry as number) > 0x7fffffff) {
          throw new TypeError(`${name}[${b}][${t}] is ${quote(entry)}, but must be an integer`)
        }
        data[b * time + t] = entry as number
      }
    })
    return { rows: rows.length, time, data }
  }
  const tensor = value as { dims?: readonly number[]; data?: Int32Array } | undefined
  const [rows = 0, time = 0, ...more] = tensor?.dims ?? []
  if (!(tensor?.data instanceof Int32Array) || more.length > 0) {
    throw new TypeError(`${name} must be an array of rows of token ids (B,T), or { dims: [B, T], data: Int32Array }`)
  }
  if (
    !Number.isInteger(rows) ||
    !Number.isInteger(time) ||
    rows < 1 ||
    time < 1 ||
    tensor.data.length !== rows * time
  ) {
    throw new RangeError(`${name}: dims are (${rows},${time}), but data has ${tensor.data.length} entries`)
  }
  return { rows, time, data: Int32Array.from(tensor.data) }
}

/** Checks tokens and options against the model; throws TypeError or RangeError naming the entry and the limit. */
export function readBatch(tokens: Tokens, config: LlamaConfig, options: BatchOptions = {}): Batch {
  const { rows, time, data: ids } = matrix(tokens, 'tokens')
  const size = rows * time
  ids.forEach((id, n) => {
    if (id < 0 || id >= config.vocabSize) {
      throw new RangeError(
        `tokens[${Math.floor(n / time)}][${n % time}] is ${id}, but ids of this model run from 0 to ${config.vocabSize - 1}`,
      )
    }
  })
  const like = (value: Tokens | undefined, name: string): Int32Array | undefined => {
    if (value === undefined) return undefined
    const other = matrix(value, name)
    if (other.rows !== rows || other.time !== time) {
      throw new RangeError(`${name} is (${other.rows},${other.time}), but tokens are (${rows},${time})`)
    }
    return other.data
  }
  const given = like(options.labels, 'labels') ?? ids
  const labels = new Int32Array(size).fill(-1)
  let targets = 0
  for (let n = 0; n < size; n++) {
    const label = n % time === time - 1 ? -100 : given[n + 1]!
    if (label === -100) continue
    if (label < 0 || label >= config.vocabSize) {
      throw new RangeError(
        `labels[${Math.floor(n / time)}][${(n % time) + 1}] is ${label}, but labels are ids below ${config.vocabSize} or -100`,
      )
    }
    labels[n] = label
    targets++
  }
  const positions = like(options.positions, 'positions') ?? Int32Array.from({ length: size }, (_, n) => n % time)
  const first = like(options.first, 'first') ?? new Int32Array(size)
  for (let n = 0; n < size; n++) {
    if (positions[n]! < 0) throw new RangeError(`positions[${Math.floor(n / time)}][${n % time}] is ${positions[n]}`)
    if (first[n]! < 0 || first[n]! > n % time) {
      throw new RangeError(
        `first[${Math.floor(n / time)}][${n % time}] is ${first[n]}, but must lie in 0 .. ${n % time}`,
      )
    }
  }
  return { rows, time, ids, labels, positions, first, targets }
}

/** Device tensors for batches of `rows` x `time` tokens. */
export function allocBatch(device: Device, config: LlamaConfig, rows: number, time: number): BatchTensors {
  const size = rows * time
  const half = config.headDim / 2
  return {
    ids: device.tensor('i32', [size], 'token ids'),
    labels: device.tensor('i32', [size], 'labels'),
    weight: device.tensor('f32', [size], 'loss weights'),
    pos: device.tensor('i32', [rows, time], 'positions'),
    first: device.tensor('i32', [rows, time], 'first visible positions'),
    // One row for each position that can occur in a batch at the same time.
    cos: device.tensor('f32', [size, half], 'rotation table (cos)'),
    sin: device.tensor('f32', [size, half], 'rotation table (sin)'),
  }
}

export function freeTensors(tensors: object): void {
  for (const tensor of Object.values(tensors) as Tensor[]) (tensor.storage as { dispose?: () => void }).dispose?.()
}

/**
 * Rows of the rotation table and, for each token, which one is its own. `whole`, the length of the text (dynamic and longrope depend
 * on it) is that of the positions where it is not given.
 */
export function rotationRows(
  config: LlamaConfig,
  positions: Int32Array,
  whole?: number,
): { key: string; rows: number; index: Int32Array; table: () => { cos: Float32Array; sin: Float32Array } } {
  const window = { maxPositionEmbeddings: config.maxPositionEmbeddings }
  let last = 0
  for (const position of positions) last = Math.max(last, position)
  const length = whole ?? last + 1
  if (last < positions.length) {
    const table = () => rotationTable(config.rope, config.headDim, { ...window, length, positions: last + 1 })
    return { key: `0..${last}`, rows: last + 1, index: positions, table }
  }
  // Positions that skip (a shifted chunk, a single token of a long text): only those that occur.
  const distinct = [...new Set(positions)].sort((a, b) => a - b)
  const row = new Map(distinct.map((position, i) => [position, i]))
  const index = Int32Array.from(positions, (position) => row.get(position)!)
  const table = () => rotationTable(config.rope, config.headDim, { ...window, length, positions: distinct })
  return { key: distinct.join(','), rows: distinct.length, index, table }
}

/**
 * Uploads a batch. `weight` (N) is what each prediction counts; by default 1 / targets, so that the loss is the mean.
 * `tables` remembers what the rotation tables hold, so that they are sent only when they change.
 */
export async function uploadBatch(
  device: Device,
  config: LlamaConfig,
  tensors: BatchTensors,
  batch: Batch,
  tables: { key?: string },
  weight?: Float32Array,
): Promise<void> {
  const { key, rows, index, table } = rotationRows(config, batch.positions)
  const uploads = [
    device.upload(tensors.ids, batch.ids),
    device.upload(tensors.labels, batch.labels),
    device.upload(tensors.weight, weight ?? meanWeights(batch)),
    device.upload(tensors.pos, index),
    device.upload(tensors.first, batch.first),
  ]
  if (tables.key !== key) {
    const { cos, sin } = table()
    uploads.push(device.upload(tensors.cos.rows(0, rows), cos), device.upload(tensors.sin.rows(0, rows), sin))
    tables.key = key
  }
  await Promise.all(uploads)
}

/** 1 / targets for every prediction that counts, 0 for the others. */
export function meanWeights({ labels, targets }: Batch): Float32Array {
  return Float32Array.from(labels, (label) => (label < 0 ? 0 : 1 / targets))
}

/** Throws where nothing is predicted. */
export function requireTargets(batch: Batch): void {
  if (batch.targets === 0) {
    throw new RangeError(
      'no label counts: every row needs at least two tokens, and a label that is not -100 after the first',
    )
  }
}

/** Of the predictions that count. */
export function mean(nll: Float32Array, { targets }: Batch): number {
  let sum = 0
  for (const value of nll) sum += value
  return sum / targets
}

/** The elements in another dtype, float32 rounded to the nearest bfloat16. */
export function convert(name: string, tensor: HostTensor, dtype: 'float32' | 'bfloat16'): Float32Array | Uint16Array {
  const { type, data } = tensor
  if (type === 'float32' && data instanceof Float32Array) {
    return dtype === 'float32' ? data.slice() : Uint16Array.from(data, toBfloat16)
  }
  if (type === 'bfloat16' && data instanceof Uint16Array) {
    return dtype === 'bfloat16' ? data.slice() : Float32Array.from(data, fromBfloat16)
  }
  throw new TypeError(
    `${name}: type is ${quote(type)} with ${data.constructor.name}; expected float32 with Float32Array or bfloat16 with Uint16Array`,
  )
}
