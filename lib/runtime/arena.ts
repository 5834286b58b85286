/** Something that needs `bytes` of the arena during the operations `first` .. `last` (inclusive). */
export interface Lifetime {
  bytes: number
  first: number
  last: number
}

export interface Arena {
  /** Byte offset of each lifetime, in the order given. */
  offsets: number[]
  /** Exact size of the arena. */
  bytes: number
  /** Largest sum of bytes alive at one operation: no placement can need less. */
  lowerBound: number
  /** The first operation at which `lowerBound` is reached. */
  peakAt: number
}

/** Offsets are multiples of this: a cache line, a full 128-byte GPU segment, and what cudaMalloc promises. */
export const ALIGNMENT = 256

const aligned = (bytes: number): number => Math.ceil(bytes / ALIGNMENT) * ALIGNMENT

/**
 * Places lifetimes in one block of memory: the largest first, each at the lowest offset at which it overlaps nothing
 * that lives at the same time (greedy by size, as in arXiv 2001.03288). Two that never live together may share bytes.
 */
export function planArena(lifetimes: readonly Lifetime[]): Arena {
  const order = lifetimes.map((_, i) => i)
  order.sort((a, b) => lifetimes[b]!.bytes - lifetimes[a]!.bytes || lifetimes[a]!.first - lifetimes[b]!.first || a - b)
  const offsets = lifetimes.map(() => 0)
  const placed: number[] = [] // sorted by offset
  let total = 0
  for (const i of order) {
    const { bytes, first, last } = lifetimes[i]!
    const size = aligned(bytes)
    let offset = 0
    for (const j of placed) {
      const other = lifetimes[j]!
      if (other.last < first || other.first > last) continue
      if (offsets[j]! >= offset + size) break // sorted: nothing further on can overlap
      offset = Math.max(offset, offsets[j]! + aligned(other.bytes))
    }
    offsets[i] = offset
    total = Math.max(total, offset + size)
    let low = 0
    for (let high = placed.length; low < high;) {
      const middle = (low + high) >> 1
      if (offsets[placed[middle]!]! <= offset) low = middle + 1
      else high = middle
    }
    placed.splice(low, 0, i)
  }
  const { lowerBound, peakAt } = peak(lifetimes)
  return { offsets, bytes: total, lowerBound, peakAt }
}

function peak(lifetimes: readonly Lifetime[]): { lowerBound: number; peakAt: number } {
  const change = new Map<number, number>()
  for (const { bytes, first, last } of lifetimes) {
    change.set(first, (change.get(first) ?? 0) + aligned(bytes))
    change.set(last + 1, (change.get(last + 1) ?? 0) - aligned(bytes))
  }
  let alive = 0
  let lowerBound = 0
  let peakAt = 0
  for (const at of [...change.keys()].sort((a, b) => a - b)) {
    alive += change.get(at)!
    if (alive > lowerBound) {
      lowerBound = alive
      peakAt = at
    }
  }
  return { lowerBound, peakAt }
}
