// The update of csrc/adamw.h once more, element by element, with every operation rounded to f32: the ops must give these
// bits on every device. What is not arithmetic is written from its definition instead: the map of the 8-bit states is a
// list of 256 values here, and the nearest of them is looked for.
import { fromBf16Bits, type HostTensor } from './harness.js'

const f = Math.fround
const floats = new Float32Array(1)
const words = new Uint32Array(floats.buffer)

export function bitsOf(x: number): number {
  floats[0] = x
  return words[0]!
}

export function fromBits(bits: number): number {
  words[0] = bits
  return floats[0]!
}

/** Arguments of adamw; those of adamw_8bit have the scales as well. */
export interface Update {
  p: HostTensor
  master: HostTensor | undefined
  low: HostTensor | undefined
  g: HostTensor
  m: HostTensor
  v: HostTensor
  hyper: HostTensor
  beta1: number
  beta2: number
  eps: number
  weight_decay: number
  seed: number
  first: number
}
export type Update8bit = Update & { m_scale: HostTensor; v_scale: HostTensor }

const MASK = (1n << 64n) - 1n
const GOLDEN = 0x9e3779b97f4a7c15n

function mixed(key: bigint): bigint {
  let x = key & MASK
  x = ((x ^ (x >> 30n)) * 0xbf58476d1ce4e5b9n) & MASK
  x = ((x ^ (x >> 27n)) * 0x94d049bb133111ebn) & MASK
  return x ^ (x >> 31n)
}

/** 32 random bits for an element: those of the weights, or those of the moments. */
export function randomBits(seed: number, step: number, use: 'weights' | 'moments', element: number): number {
  const key = mixed(BigInt(seed) + GOLDEN) + BigInt(bitsOf(step)) * GOLDEN
  const stream = mixed(use === 'weights' ? key : key + 1n)
  const [spread, salt] = [Number(stream & 0xffffffffn), Number(stream >> 32n)]
  const upper = Math.imul(Math.floor(element / 2 ** 32), Number(GOLDEN >> 32n))
  let x = (element ^ spread) >>> 0
  x = (Math.imul(x ^ (x >>> 16), 0x7feb352d) + salt + upper) >>> 0
  x = Math.imul(x ^ (x >>> 15), 0x846ca68b) >>> 0
  return (x ^ (x >>> 16)) >>> 0
}

const soundBits = (x: number): number => (Number.isNaN(x) ? 0x7fc00000 : bitsOf(x))

/** p and low of a master. */
export const split = (master: number): [p: number, low: number] => {
  const bits = soundBits(master)
  return [fromBf16Bits((bits + 0x8000) >>> 16), bits & 0xffff]
}

/** The master that p and low are. */
export const joined = (p: number, low: number): number =>
  fromBits((bitsOf(p) + (low < 0x8000 ? low : low - 0x10000)) >>> 0)

const roundUp = (x: number, random: number): number => fromBf16Bits((soundBits(x) + random) >>> 16)

/** Weights, masters and the like after an update, and the moments before they are stored. */
function updated(u: Update, mOf: (i: number) => number, vOf: (i: number) => number) {
  const [rate, correction1, correction2, , scale, , , step] = [...u.hyper.values] as [number, ...number[]]
  const keep = f(1 - rate * u.weight_decay)
  const size = f(rate / correction1!)
  const inverseRoot = f(1 / f(Math.sqrt(correction2!)))
  const [rest1, rest2, beta2, eps] = [f(1 - u.beta1), f(1 - u.beta2), f(u.beta2), f(u.eps)]
  const p = new Float64Array(u.p.size)
  const master = new Float64Array(u.p.size)
  const low = new Float64Array(u.p.size)
  const m = new Float64Array(u.p.size)
  const v = new Float64Array(u.p.size)
  for (let i = 0; i < p.length; i++) {
    const g = f(u.g.values[i]! * scale!)
    m[i] = f(mOf(i) + f(rest1 * f(g - mOf(i))))
    v[i] = f(f(beta2 * vOf(i)) + f(rest2 * f(g * g)))
    const p0 = u.p.values[i]!
    const before = u.master ? u.master.values[i]! : u.low ? joined(p0, u.low.values[i]!) : p0
    const root = f(f(f(Math.sqrt(v[i]!)) * inverseRoot) + eps)
    const after = f(f(before * keep) - f(size * f(m[i]! / root)))
    if (u.p.dtype === 'f32') p[i] = after
    else if (u.master || u.low) {
      ;[p[i], low[i]] = split(after)
      master[i] = after
    } else p[i] = roundUp(after, randomBits(u.seed, step!, 'weights', u.first + i) >>> 16)
  }
  return { p, ...(u.master && { master }), ...(u.low && { low }), m, v }
}

/** All that adamw writes. */
export function updateBits(u: Update): Record<string, Float64Array> {
  const after = updated(
    u,
    (i) => u.m.values[i]!,
    (i) => u.v.values[i]!,
  )
  if (u.m.dtype === 'f32') return after
  const step = u.hyper.values[7]!
  const random = (i: number): number => randomBits(u.seed, step, 'moments', u.first + i)
  return {
    ...after,
    m: after.m.map((x, i) => roundUp(x, random(i) & 0xffff)),
    v: after.v.map((x, i) => roundUp(x, random(i) >>> 16)),
  }
}

/** bitsandbytes' create_dynamic_map, sorted, from its definition: 256 values in f64. */
function dynamicMap(signed: boolean): number[] {
  const values = [0, 1]
  for (let i = 0; i < 7; i++) {
    const items = 2 ** (signed ? i : i + 1)
    for (let j = 0; j < items; j++) {
      const value = 10 ** (i - 6) * (0.1 + (0.9 * (j + 0.5)) / items)
      values.push(value)
      if (signed) values.push(-value)
    }
  }
  return values.sort((a, b) => a - b)
}
const SIGNED = dynamicMap(true)
const UNSIGNED = dynamicMap(false)
export const ZERO_OF_SIGNED = SIGNED.indexOf(0)

/** The values of the bytes of m and v, by byte, in f64. */
export const M_VALUES = Array.from({ length: 256 }, (_, byte) => SIGNED[(byte + ZERO_OF_SIGNED) % 256]!)
export const V_VALUES = UNSIGNED

/**
 * The map's value of a byte, as the ops compute it: slope y + offset in f32. It differs from the list by the rounding
 * of three operations on numbers up to ten times as large.
 */
function decoded(kind: 'm' | 'v', byte: number): number {
  const index = kind === 'm' ? ((byte + 127) % 256) - 127 : byte
  const lead = kind === 'm' ? 1 : 2
  const y = Math.abs(index) + lead - 0.5
  const decade = Math.floor(Math.log2(y / lead))
  let value: number
  if (decade < 0 || decade > 6) {
    const slope = f(1 / (kind === 'm' ? 128 : 255))
    value = f(f(slope * y) - f(f(lead - 0.5) * slope))
  } else {
    const items = lead * 2 ** decade
    const ten = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1][decade]!
    value = f(f(f((0.9 * ten) / items) * y) + f(-0.8 * ten))
  }
  return index < 0 ? -value : value
}
export const M_DECODED = Array.from({ length: 256 }, (_, byte) => decoded('m', byte))
export const V_DECODED = Array.from({ length: 256 }, (_, byte) => decoded('v', byte))

/** Bytes whose values are nearest to x of a block's scale 1: one, or two where x lies at the middle of them. */
export function nearestBytes(kind: 'm' | 'v', x: number): number[] {
  const values = kind === 'm' ? SIGNED : UNSIGNED
  let [low, high] = [0, 255]
  while (high - low > 1) {
    const middle = (low + high) >> 1
    if (values[middle]! <= x) low = middle
    else high = middle
  }
  const [below, above] = [x - values[low]!, values[high]! - x]
  // a few roundings to f32 of x and of the bound that it is compared with
  const tie = Math.abs(above - below) <= 4e-6 * Math.max(Math.abs(x), 1e-7)
  const found = tie ? [low, high] : [below < above ? low : high]
  if (kind === 'm') return found.map((index) => (index - ZERO_OF_SIGNED + 256) % 256)
  return x > 0 ? found.map((index) => Math.max(index, 1)) : found
}

/** All that adamw_8bit writes, but m and v as numbers, before they are stored. */
export function update8bit(u: Update8bit): Record<string, Float64Array> {
  const of = (values: number[], bytes: HostTensor, scales: HostTensor) => (i: number) =>
    f(values[bytes.values[i]!]! * scales.values[Math.floor(i / 256)]!)
  const after = updated(u, of(M_DECODED, u.m, u.m_scale), of(V_DECODED, u.v, u.v_scale))
  const largest = (x: Float64Array): Float64Array =>
    Float64Array.from({ length: x.length / 256 }, (_, block) => {
      const magnitudes = x.subarray(256 * block, 256 * (block + 1)).map(Math.abs)
      return Math.min(Math.max(...magnitudes), fromBits(0x7f7fffff)) // NaN where one of them is
    })
  return { ...after, m_scale: largest(after.m), v_scale: largest(after.v) }
}
