import { formatBytes } from '../errors.js'
import { aligned } from '../runtime/arena.js'
import type { Buffer, Device } from '../runtime/device.js'
import { cast, dequantize } from '../runtime/ops.gen.js'
import { Recorder } from '../runtime/recorder.js'
import {
  DTYPE_BYTES,
  isQuantized,
  type PlainDType,
  type QuantizedDType,
  Tensor,
  tensorBytes,
} from '../runtime/tensor.js'

/** Elements to which every parameter is padded: a block of 8-bit moments, and whole cache lines in all dtypes. */
export const PADDING = 256

export interface Parameter {
  readonly name: string
  /** Another one after Parameters.own and Parameters.dequantize. */
  value: Tensor
  /** What is added to products with this matrix. */
  adapter?: LowRank | undefined
}

/** A change of a matrix (O,I) by a product of low rank r, scale b a: LoRA, arXiv 2106.09685. */
export interface LowRank {
  /** (r,I) */
  a: Parameter
  /** (O,r) */
  b: Parameter
  scale: number
}

/** Parameters that are updated together: a stretch of the layout. */
export interface Segment {
  /** 'vectors', or what the names of matrices have in common: 'model.layers.3'. */
  readonly name: string
  /** Whose layout it is a part of. */
  readonly of: Parameters
  /** First element in the layout, and how many, padding included. */
  readonly first: number
  readonly elements: number
  readonly parameters: readonly Parameter[]
}

/** Whether a matrix is one of those that can be quantised: the projections of the blocks, as in QLoRA. */
export const isQuantizable = (name: string): boolean => /\.layers\.\d+\..*_proj\.weight$/.test(name)

/** Where weights are that do not lie in one buffer of their own. */
export interface Placement {
  /** Where each parameter is in a file, used in place. */
  files?: ReadonlyMap<string, Tensor> | undefined
  /** The form of those that can be quantised; they have memory of their own, files or not. */
  quantization?: QuantizedDType | undefined
}

/**
 * All parameters of a model, one after the other in one buffer, padded with zeros: first the matrices, then the vectors.
 * Gradients and optimizer states use the same layout, so that one operation updates all of a layer. Until they are to be
 * changed, the weights may instead lie in the model's files, used in place. Quantised matrices come last in the layout,
 * and are kept in a buffer of their own, not in this one.
 */
export class Parameters {
  /** Of the whole layout, padding included. */
  readonly elements: number
  /** Another one when what is recorded of these weights no longer holds: they have moved, or an adapter came or went. */
  version = 0
  private memory: Buffer | undefined
  private packed: Buffer | undefined
  private readonly byName = new Map<string, Parameter>()
  private readonly offsets = new Map<string, number>()
  private form: QuantizedDType | undefined
  /** Of the beginning of the layout, before what is quantised. */
  private plainElements: number

  /** Values are garbage until they are read; quantised ones too. */
  constructor(
    readonly device: Device,
    readonly dtype: PlainDType,
    shapes: readonly { name: string; dims: readonly number[] }[],
    { files, quantization }: Placement = {},
  ) {
    this.form = quantization
    const packs = (name: string): boolean => quantization !== undefined && isQuantizable(name)
    const order = (shape: { name: string; dims: readonly number[] }): number =>
      packs(shape.name) ? 2 : Number(shape.dims.length < 2)
    let at = 0
    let plain = 0
    let bytes = 0
    const places = new Map<string, number>()
    for (const { name, dims } of [...shapes].sort((a, b) => order(a) - order(b))) {
      this.offsets.set(name, at)
      const size = dims.reduce((product, dim) => product * dim, 1)
      at += Math.ceil(size / PADDING) * PADDING
      if (!packs(name)) plain = at
      else {
        places.set(name, bytes)
        bytes += aligned(tensorBytes(quantization!, size))
      }
    }
    this.elements = at
    this.plainElements = plain
    if (!files) this.memory = this.alloc(plain)
    if (quantization) this.packed = device.alloc(bytes, `weights (${quantization})`)
    for (const { name, dims } of shapes) {
      const value = packs(name)
        ? new Tensor(this.packed!, places.get(name)!, quantization!, dims)
        : (files?.get(name) ?? this.at(this.buffer, dtype, name, dims))
      this.byName.set(name, { name, value })
    }
  }

  /** How the matrices of the blocks are kept, where that is not as the others. */
  get quantization(): QuantizedDType | undefined {
    return this.form
  }

  /** Of all weights, those in files with the padding that they would have in memory. */
  get bytes(): number {
    return this.plainElements * DTYPE_BYTES[this.dtype] + (this.packed?.bytes ?? 0)
  }

  /** Whether the weights lie in files, and cannot be changed. */
  get mapped(): boolean {
    return this.memory === undefined
  }

  /** The memory that all of them are in, but for quantised ones. */
  get buffer(): Buffer {
    if (!this.memory) throw new Error('these weights are used in place, in their files: own() gives them memory')
    return this.memory
  }

  /** Copies mapped weights into memory of their own, where they can be changed. Plans keep to those of their record. */
  async own(): Promise<void> {
    if (this.mapped) await this.move(this.plainElements)
  }

  /** Makes quantised matrices plain ones, of the dtype of the others. All are in memory of their own then. */
  async dequantize(): Promise<void> {
    if (!this.form) return
    await this.move(this.elements)
    this.packed!.dispose()
    this.packed = this.form = undefined
    this.plainElements = this.elements
  }

  /** Into a new buffer, with those that are in the first `elements` of the layout. */
  private async move(elements: number): Promise<void> {
    const memory = this.alloc(elements)
    const moved = [...this].filter(({ name }) => this.offsets.get(name)! < elements)
    try {
      const recorder = new Recorder(this.device, 'weights into memory')
      for (const { name, value } of moved) {
        const y = this.in(memory, this.dtype, name)
        if (isQuantized(value.dtype)) dequantize(recorder, { x: value, y })
        else cast(recorder, { x: value, y })
      }
      const plan = recorder.plan()
      try {
        await plan.run()
      } finally {
        plan.dispose()
      }
      await this.clearPadding(memory, moved)
    } catch (error) {
      memory.dispose()
      throw error
    }
    const before = new Set(moved.map(({ value }) => value.storage as Buffer))
    for (const parameter of moved) parameter.value = this.in(memory, this.dtype, parameter.name)
    for (const buffer of before) buffer.dispose()
    this.memory = memory
    this.version++
  }

  get(name: string): Parameter {
    const parameter = this.byName.get(name)
    if (!parameter) throw new RangeError(`no parameter is called ${name}`)
    return parameter
  }

  has(name: string): boolean {
    return this.byName.has(name)
  }

  [Symbol.iterator](): IterableIterator<Parameter> {
    return this.byName.values()
  }

  /** Number of weights, padding not counted. */
  get count(): number {
    let count = 0
    for (const { value } of this) count += value.size
    return count
  }

  /** The whole of a buffer that has this layout, padding included, up to what is quantised. */
  flat(buffer: Buffer, dtype: PlainDType): Tensor {
    return new Tensor(buffer, 0, dtype, [this.plainElements])
  }

  /** The part of a buffer in this layout that belongs to a parameter. */
  in(buffer: Buffer, dtype: PlainDType, name: string): Tensor {
    return this.at(buffer, dtype, name, this.get(name).value.dims)
  }

  /** The first element of a parameter in the layout. */
  offset(name: string): number {
    return this.offsets.get(this.get(name).name)!
  }

  /** The layout, in order: embedding, layers, output matrix, and all vectors together. */
  segments(): Segment[] {
    const groups = new Map<string, Parameter[]>()
    for (const parameter of [...this].sort((a, b) => this.offset(a.name) - this.offset(b.name))) {
      const { name, value } = parameter
      const group = value.dims.length < 2 ? 'vectors' : (/^.*?layers\.\d+/.exec(name)?.[0] ?? name)
      groups.set(group, [...(groups.get(group) ?? []), parameter])
    }
    const all = Array.from(groups, ([name, parameters]) => ({
      name,
      of: this,
      parameters,
      first: this.offset(parameters[0]!.name),
    }))
    return all.map((group, i) => ({ ...group, elements: (all[i + 1]?.first ?? this.elements) - group.first }))
  }

  /** The part of a buffer in this layout that belongs to a segment. */
  part(buffer: Buffer, dtype: PlainDType, { first, elements }: Segment): Tensor {
    return new Tensor(buffer, first * DTYPE_BYTES[dtype], dtype, [elements])
  }

  /** Zeros between the parameters, so that norms and updates over the flat buffer see nothing else. */
  async clearPadding(buffer = this.buffer, parameters: Iterable<Parameter> = this): Promise<void> {
    const bytes = DTYPE_BYTES[this.dtype]
    for (const { name, value } of parameters) {
      if (buffer === this.memory && isQuantized(value.dtype)) continue
      const gap = Math.ceil(value.size / PADDING) * PADDING - value.size
      if (gap === 0) continue
      const at = (this.offsets.get(name)! + value.size) * bytes
      await this.device.upload(new Tensor(buffer, at, this.dtype, [gap]), new Uint8Array(gap * bytes))
    }
  }

  /** Frees memory of their own. */
  dispose(): void {
    this.memory?.dispose()
    this.packed?.dispose()
    this.memory = this.packed = undefined
  }

  private alloc(elements: number): Buffer {
    const bytes = elements * DTYPE_BYTES[this.dtype]
    const narrower = `dtype "bfloat16" takes ${formatBytes(bytes / 2)} less`
    const remedy = this.dtype === 'f32' ? narrower : 'Free memory of the device, or use a smaller model'
    return this.device.alloc(bytes, `weights (${this.dtype})`, remedy)
  }

  private at(buffer: Buffer, dtype: PlainDType, name: string, dims: readonly number[]): Tensor {
    return new Tensor(buffer, this.offsets.get(name)! * DTYPE_BYTES[dtype], dtype, dims)
  }
}
