// Numbers for the tests of ops: seeded ones, odd sizes, the roundings of each dtype, and tensors on the host.
import { type DType, isQuantized } from '../../lib/runtime/tensor.js'

/** Mulberry32: small, seeded, the same everywhere. */
export class Random {
  constructor(private state: number) {}

  /** In [0, 1). */
  next(): number {
    this.state = (this.state + 0x6d2b79f5) | 0
    let x = Math.imul(this.state ^ (this.state >>> 15), 1 | this.state)
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x
    return ((x ^ (x >>> 14)) >>> 0) / 4294967296
  }

  /** A whole number from low to high, both included. */
  int(low: number, high: number): number {
    return low + Math.floor(this.next() * (high - low + 1))
  }

  uniform(low = -1, high = 1): number {
    return low + (high - low) * this.next()
  }

  normal(): number {
    return Math.sqrt(-2 * Math.log(1 - this.next())) * Math.cos(2 * Math.PI * this.next())
  }

  pick<T>(from: readonly T[]): T {
    return from[this.int(0, from.length - 1)]!
  }
}

/** Sizes at and around the widths of vectors (4, 8, 16) and tiles (64, 128), primes, and 1. */
export const ODD = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 97, 127, 128, 129]

/** Every residue of a division by 16, beyond some whole vectors: 33 .. 48. */
export const RESIDUES = Array.from({ length: 16 }, (_, i) => 33 + i)

/** Flat sizes around what a block of the CUDA kernels takes at a time, 256 threads with 4 or 8 elements each. */
export const BLOCKS = [1016, 1023, 1024, 1025, 1031, ...Array.from({ length: 17 }, (_, i) => 2040 + i)]

/** Flat sizes that nobody has chosen. */
export const DRAWN = (() => {
  const random = new Random(0xd1ce)
  return Array.from({ length: 40 }, () => random.int(130, 3000))
})()

const scratch32 = new Float32Array(1)
const scratchBits = new Uint32Array(scratch32.buffer)

/** The upper half of the f32, rounded to nearest, ties to even. */
export function toBf16Bits(x: number): number {
  scratch32[0] = x
  const bits = scratchBits[0]!
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >>> 16) | 0x40
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff
}

export function fromBf16Bits(bits: number): number {
  scratchBits[0] = (bits << 16) >>> 0
  return scratch32[0]!
}

export const roundBf16 = (x: number): number => fromBf16Bits(toBf16Bits(x))

export type Round = (x: number) => number
const identity: Round = (x) => x
export const rounding = (dtype: DType): Round =>
  dtype === 'bf16' ? roundBf16 : dtype === 'f32' ? Math.fround : identity

/** What a reference computes in: `r` after every operation, `store(dtype)` where the op's own storage is narrower. */
export interface Precision {
  exact: boolean
  r: Round
  store: (dtype: DType) => Round
}
export const EXACT: Precision = { exact: true, r: identity, store: () => identity }
export const NAIVE: Precision = { exact: false, r: Math.fround, store: rounding }

/**
 * A tensor on the host; its values are already rounded to the dtype, those of a quantised one are its bytes. Without
 * values it is an output to be written.
 */
export interface HostTensor {
  dtype: DType
  dims: number[]
  size: number
  values: Float64Array
  poisoned: boolean
}

const product = (dims: readonly number[]): number => dims.reduce((size, dim) => size * dim, 1)

export function tensor(dtype: DType, dims: number[], values: ArrayLike<number> | ((i: number) => number)): HostTensor {
  const size = product(dims)
  const round = rounding(dtype)
  const host = new Float64Array(size)
  for (let i = 0; i < size; i++) host[i] = round(typeof values === 'function' ? values(i) : values[i]!)
  return { dtype, dims, size, values: host, poisoned: false }
}

export const output = (dtype: DType, dims: number[]): HostTensor => ({
  dtype,
  dims,
  size: product(dims),
  values: new Float64Array(0),
  poisoned: true,
})

export function encode({ dtype, values }: HostTensor): Uint8Array {
  if (dtype === 'f32') return new Uint8Array(Float32Array.from(values).buffer)
  if (dtype === 'i32') return new Uint8Array(Int32Array.from(values).buffer)
  if (dtype === 'u16') return new Uint8Array(Uint16Array.from(values).buffer)
  if (dtype === 'u8' || isQuantized(dtype)) return Uint8Array.from(values)
  const bits = new Uint16Array(values.length)
  for (let i = 0; i < bits.length; i++) bits[i] = toBf16Bits(values[i]!)
  return new Uint8Array(bits.buffer)
}

export function decode(dtype: DType, bytes: Uint8Array): Float64Array {
  const own = bytes.slice().buffer
  if (dtype === 'f32') return Float64Array.from(new Float32Array(own))
  if (dtype === 'i32') return Float64Array.from(new Int32Array(own))
  if (dtype === 'u16') return Float64Array.from(new Uint16Array(own))
  if (dtype === 'u8' || isQuantized(dtype)) return Float64Array.from(new Uint8Array(own))
  return Float64Array.from(new Uint16Array(own), fromBf16Bits)
}
