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

/** @internal The next place where a tensor may lie. */
export const aligned = (bytes: number): number => Math.ceil(bytes / ALIGNMENT) * ALIGNMENT

/**
 * Places lifetimes in one block of memory: the largest first, each at the lowest offset at which it overlaps nothing
 * that lives at the same time (greedy by size, as in arXiv 2001.03288). Two that never live together may share bytes.
 */
export function planArena(lifetimes: readonly Lifetime[]): Arena {
  const order = lifetimes.map((_, i) => i)
  order.sort((a, b) => lifetimes[b]!.bytes - lifetimes[a]!.bytes || lifetimes[a]!.first - lifetimes[b]!.first || a - b)
  const offsets = lifetimes.map(() => 0)
  const placed = new Calendar(lifetimes.reduce((end, { last }) => Math.max(end, last + 1), 1))
  let total = 0
  for (const i of order) {
    const lifetime = lifetimes[i]!
    const size = aligned(lifetime.bytes)
    let offset = 0
    const others = placed.during(lifetime).sort((a, b) => offsets[a]! - offsets[b]!)
    for (const j of others) {
      if (offsets[j]! >= offset + size) break // sorted: nothing further on can overlap
      offset = Math.max(offset, offsets[j]! + aligned(lifetimes[j]!.bytes))
    }
    offsets[i] = offset
    total = Math.max(total, offset + size)
    placed.add(i, lifetime)
  }
  const { lowerBound, peakAt } = peak(lifetimes)
  return { offsets, bytes: total, lowerBound, peakAt }
}

/** Which lifetimes of those added so far overlap another one: most of a long plan's never meet. */
class Calendar {
  /** By the operation at which they begin. */
  private readonly beginning: (number[] | undefined)[]
  /** A segment tree over the operations: each lifetime stands at the few nodes that make it up. */
  private readonly covering: (number[] | undefined)[]
  private readonly leaves: number

  constructor(operations: number) {
    this.leaves = 2 ** Math.ceil(Math.log2(operations))
    this.beginning = new Array(operations)
    this.covering = new Array(2 * this.leaves)
  }

  add(index: number, { first, last }: Lifetime): void {
    append(this.beginning, first, index)
    let [low, high] = [first + this.leaves, last + 1 + this.leaves]
    for (; low < high; low >>= 1, high >>= 1) {
      if (low & 1) append(this.covering, low++, index)
      if (high & 1) append(this.covering, --high, index)
    }
  }

  /** Those alive at the first operation, and those that begin after it. */
  during({ first, last }: Lifetime): number[] {
    const found: number[] = []
    for (let node = first + this.leaves; node > 0; node >>= 1) {
      const here = this.covering[node]
      if (here) for (const index of here) found.push(index)
    }
    for (let at = first + 1; at <= last; at++) {
      const here = this.beginning[at]
      if (here) for (const index of here) found.push(index)
    }
    return found
  }
}

function append(lists: (number[] | undefined)[], at: number, value: number): void {
  const list = lists[at]
  if (list) list.push(value)
  else lists[at] = [value]
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
