// The formats of csrc/quantized.h once more, element by element, every operation rounded to f32: the ops must give these
// bytes on every device. The nearest value of a list is looked for by going through it.
import { roundBf16, type HostTensor } from './harness.js'

export type Format = 'nf4' | 'int8'
export const FORMATS: readonly Format[] = ['nf4', 'int8']

const f = Math.fround

/** arXiv 2305.14314, appendix E. */
export const NF4 = [
  ...[-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453],
  ...[-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0],
  ...[0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
  ...[0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
]

const positive = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1].flatMap((decade, i) =>
  Array.from({ length: 2 ** i }, (_, j) => f(decade * (0.1 + (0.9 * (j + 0.5)) / 2 ** i))),
)
/** Of the distances of absmax from their mean. */
export const ABSMAX_MAP = [...positive.map((x) => -x).reverse(), 0, ...positive, 1]

/** The last of the list's numbers whose predecessor is further from x. */
function nearest(list: readonly number[], x: number): number {
  let at = 0
  while (at + 1 < list.length && x > f(f(list[at]! + list[at + 1]!) * 0.5)) at++
  return at
}

/** Half away from nothing: to even. */
function roundToEven(x: number): number {
  const down = Math.floor(x)
  return x - down > 0.5 || (x - down === 0.5 && down % 2 !== 0) ? down + 1 : down
}

/** Larger magnitudes win, NaN over all. */
const largest = (values: ArrayLike<number>): number => {
  let most = 0
  for (let i = 0; i < values.length; i++) {
    const x = Math.abs(values[i]!)
    if (Number.isNaN(x) || x > most) most = x
    if (Number.isNaN(most)) break
  }
  return most
}

const bytesOf = (floats: number[]): Uint8Array => new Uint8Array(Float32Array.from(floats).buffer)
const join = (...parts: ArrayLike<number>[]): Uint8Array => Uint8Array.from(parts.flatMap((part) => Array.from(part)))

/** Blocks of 64, the last one filled up with 0. */
const blocksOf = (x: ArrayLike<number>): Float64Array[] =>
  Array.from({ length: Math.ceil(x.length / 64) }, (_, block) =>
    Float64Array.from({ length: 64 }, (_, i) => x[64 * block + i] ?? 0),
  )

/** The bytes of quantised values, which are f32. */
export function quantized(format: Format, x: ArrayLike<number>): Uint8Array {
  const blocks = blocksOf(x)
  const absmax = blocks.map(largest)
  if (format === 'int8') {
    const scales = absmax.map((most) => f(most / 127))
    const codes = blocks.flatMap((block, b) =>
      Array.from(block, (value) => {
        const steps = f(value / (scales[b]! > 0 ? scales[b]! : 1))
        return Number.isNaN(steps) ? 127 : roundToEven(Math.max(-127, Math.min(127, steps))) & 255
      }),
    )
    return join(codes, bytesOf(scales))
  }
  const codes = blocks.flatMap((block, b) => {
    const numbers = Array.from(block, (value) => nearest(NF4, f(value / (absmax[b]! > 0 ? absmax[b]! : 1))))
    return Array.from({ length: 32 }, (_, i) => numbers[2 * i]! * 16 + numbers[2 * i + 1]!)
  })
  const groups = Array.from({ length: Math.ceil(blocks.length / 256) }, (_, g) => absmax.slice(256 * g, 256 * g + 256))
  const add = (a: number, b: number): number => a + b
  const mean = f(groups.map((group) => group.reduce(add, 0)).reduce(add, 0) / blocks.length)
  const scales = groups.map((group) => largest(group.map((most) => f(most - mean))))
  const kept = groups.flatMap((group, g) =>
    group.map((most) => nearest(ABSMAX_MAP, f(f(most - mean) / (scales[g]! > 0 ? scales[g]! : 1)))),
  )
  while (kept.length % 4 !== 0) kept.push(0)
  return join(codes, kept, bytesOf([...scales, mean]))
}

/** What `size` quantised values stand for, in f32. */
export function dequantized(format: Format, bytes: Uint8Array, size: number): Float64Array {
  const blocks = Math.ceil(size / 64)
  const floats = (at: number): Float32Array => new Float32Array(bytes.slice(at).buffer)
  if (format === 'int8') {
    const scales = floats(64 * blocks)
    return Float64Array.from({ length: size }, (_, i) => f(((bytes[i]! << 24) >> 24) * scales[Math.floor(i / 64)]!))
  }
  const kept = bytes.subarray(32 * blocks)
  const scales = floats(32 * blocks + 4 * Math.ceil(blocks / 4))
  const mean = scales.at(-1)!
  return Float64Array.from({ length: size }, (_, i) => {
    const block = Math.floor(i / 64)
    const absmax = f(f(ABSMAX_MAP[kept[block]!]! * scales[Math.floor(block / 256)]!) + mean)
    const byte = bytes[i >> 1]!
    return f(NF4[i % 2 === 0 ? byte >> 4 : byte & 15]! * absmax)
  })
}

/** A tensor of bytes for the harness. */
export const packed = (format: Format, dims: number[], bytes: Uint8Array): HostTensor => ({
  dtype: format,
  dims,
  size: dims.reduce((size, dim) => size * dim, 1),
  values: Float64Array.from(bytes),
  poisoned: false,
})

/** Values of these, quantised, and what products with them are to use: dequantised in the dtype of the other factor. */
export function quantizedTensor(
  format: Format,
  dims: number[],
  values: (i: number) => number,
  F: HostTensor['dtype'],
): { b: HostTensor; values: Float64Array } {
  const size = dims.reduce((size, dim) => size * dim, 1)
  const bytes = quantized(
    format,
    Float64Array.from({ length: size }, (_, i) => f(values(i))),
  )
  const all = dequantized(format, bytes, size)
  return { b: packed(format, dims, bytes), values: F === 'bf16' ? all.map(roundBf16) : all }
}
