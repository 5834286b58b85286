/**
 * Element types of device tensors. Activations and weights are f32 or bf16; token ids and positions are i32; an
 * optimizer's 8-bit states are u8, and what bf16 weights leave of their f32 masters is u16.
 */
export type PlainDType = 'f32' | 'bf16' | 'i32' | 'u8' | 'u16'
/** Weights in blocks of 64 elements that share a scale (csrc/quantized.h). */
export type QuantizedDType = 'nf4' | 'int8'
export type DType = PlainDType | QuantizedDType

/** Of one element; quantised ones have no bytes of their own. */
export const DTYPE_BYTES: Readonly<Record<PlainDType, number>> = { f32: 4, bf16: 2, i32: 4, u8: 1, u16: 2 }
export const DTYPE_CODE: Readonly<Record<DType, number>> = {
  ...{ f32: 0, bf16: 1, i32: 2, u8: 3, u16: 4 },
  ...{ nf4: 5, int8: 6 },
}

export const isFloat = (dtype: DType): boolean => dtype === 'f32' || dtype === 'bf16'
export const isQuantized = (dtype: DType): dtype is QuantizedDType => dtype === 'nf4' || dtype === 'int8'

/** Of a tensor; as Tensor::bytes in csrc/ops.h. */
export function tensorBytes(dtype: DType, elements: number): number {
  if (!isQuantized(dtype)) return elements * DTYPE_BYTES[dtype]
  const blocks = Math.ceil(elements / 64)
  if (dtype === 'int8') return 68 * blocks
  return 32 * blocks + 4 * Math.ceil(blocks / 4) + 4 * Math.ceil(blocks / 256) + 4
}

/** What the offset of a quantised tensor is a multiple of. */
const QUANTIZED_ALIGNMENT = 16

/** Where a tensor's bytes are: a buffer that a device allocated, or a place in a plan's arena that the planner chooses. */
export interface Storage {
  readonly bytes: number
  readonly name: string
  /** Whether it is in the host's memory, not the device's own. */
  readonly host: boolean
}

/** What a place in the arena is for, where that is worth telling apart in a picture of memory. */
export type Purpose = 'checkpoint' | 'gradient' | 'logits' | 'activation'

/** A place in the arena of the plan being recorded. It lives from the first to the last operation that names it. */
export class Scratch implements Storage {
  purpose: Purpose = 'activation'

  constructor(
    readonly bytes: number,
    readonly name: string,
    /** Whether it is in memory of the host, which only copies use. */
    readonly host = false,
  ) {}
}

/** A dense, row-major tensor on a device: a view of `dims` elements from byte `offset` of a storage. */
export class Tensor {
  readonly size: number

  constructor(
    readonly storage: Storage,
    readonly offset: number,
    readonly dtype: DType,
    readonly dims: readonly number[],
  ) {
    this.size = dims.reduce((product, dim) => product * dim, 1)
    if (isQuantized(dtype) && offset % QUANTIZED_ALIGNMENT !== 0) {
      throw new RangeError(`${storage.name}: ${this.describe()} at byte ${offset}: it must be a multiple of 16`)
    }
    if (offset + this.bytes > storage.bytes) {
      throw new RangeError(`${storage.name}: ${this.describe()} at byte ${offset} exceeds ${storage.bytes} bytes`)
    }
  }

  get bytes(): number {
    return tensorBytes(this.dtype, this.size)
  }

  /** The same elements under other dims. */
  view(...dims: number[]): Tensor {
    const size = dims.reduce((product, dim) => product * dim, 1)
    if (size !== this.size) throw new RangeError(`${this.describe()} cannot be viewed as (${dims.join(',')})`)
    return new Tensor(this.storage, this.offset, this.dtype, dims)
  }

  /** Rows `start` .. `start + count` of the first dimension; not of a quantised tensor. */
  rows(start: number, count: number): Tensor {
    const [rows = 1, ...rest] = this.dims
    if (isQuantized(this.dtype)) throw new TypeError(`${this.describe()} is quantised as a whole: it has no rows`)
    if (start < 0 || count < 1 || start + count > rows) {
      throw new RangeError(`rows ${start}..${start + count} do not lie inside ${this.describe()}`)
    }
    const stride = (this.size / rows) * DTYPE_BYTES[this.dtype]
    return new Tensor(this.storage, this.offset + start * stride, this.dtype, [count, ...rest])
  }

  describe(): string {
    return `${this.storage.name} ${this.dtype} (${this.dims.join(',')})`
  }
}

/** Says what a scratch tensor is for; others are what their buffer is. */
export function setPurpose({ storage }: Tensor, purpose: Purpose): void {
  if (storage instanceof Scratch) storage.purpose = purpose
}
