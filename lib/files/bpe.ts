/**
 * Byte-pair encoding of one word, exactly as the Rust tokenizers library merges: always the pair of lowest rank, the
 * leftmost of equals, O(n log n) in the length of the word. The JavaScript library's own needs 4 s for a megabyte of
 * LLaMA-2 text, because there a whole document is one word.
 */
export type BpeModel = {
  vocab: Map<string, number>
  merges: readonly (readonly [string, string])[]
  unkToken: string | null
  fuseUnk: boolean
  byteFallback: boolean
  ignoreMerges: boolean
}

const space = '\u2581'
const cachedLength = 64
const cacheSize = 50_000

/** A function from a word to its token ids. Throws RangeError where a merge names a token that the vocabulary lacks. */
export function bpeEncoder(model: BpeModel): (word: string) => readonly number[] {
  const { vocab, byteFallback, ignoreMerges, fuseUnk } = model
  const pairs = new PairTable(model)
  const unk = model.unkToken === null ? undefined : vocab.get(model.unkToken)
  const utf8 = new TextEncoder()
  const byteIds = Array.from({ length: 256 }, (_, byte) => vocab.get(byteToken(byte)))
  const cache = new Map<string, readonly number[]>()

  const addSymbols = (word: string, ids: Int32Array): number => {
    let count = 0
    let afterUnk = false
    for (const character of word) {
      const id = vocab.get(character)
      const bytes = id === undefined && byteFallback ? Array.from(utf8.encode(character), (byte) => byteIds[byte]) : []
      if (id !== undefined) ids[count++] = id
      else if (bytes.length > 0 && bytes.every((byte) => byte !== undefined)) {
        for (const byte of bytes) ids[count++] = byte as number
      } else if (unk !== undefined) {
        if (!(afterUnk && fuseUnk)) ids[count++] = unk
        afterUnk = true
        continue
      }
      afterUnk = false
    }
    return count
  }
  const encodeWord = (word: string): readonly number[] => {
    if (ignoreMerges) {
      const whole = vocab.get(word)
      if (whole !== undefined) return [whole]
    }
    // a UTF-16 unit has at most 3 bytes of UTF-8
    const ids = new Int32Array(word.length * 3)
    return merge(ids.subarray(0, addSymbols(word, ids)), pairs)
  }
  const encodeCached = (word: string): readonly number[] => {
    if (word.length > cachedLength) return encodeWord(word)
    let ids = cache.get(word)
    if (ids === undefined) {
      ids = encodeWord(word)
      if (cache.size >= cacheSize) cache.clear()
      cache.set(word, ids)
    }
    return ids
  }
  if (!splitsAtSpace(model)) return encodeCached
  return (word) => {
    const ids: number[] = []
    for (const [part] of word.matchAll(/\u2581*[^\u2581]+|\u2581+/gu)) for (const id of encodeCached(part)) ids.push(id)
    return ids
  }
}

/**
 * Where no token has U+2581 behind another character, no merge can cross a place before one: cutting the word there
 * changes nothing, and documents become words that a cache knows.
 */
function splitsAtSpace({ vocab, merges, ignoreMerges }: BpeModel): boolean {
  if (ignoreMerges || !vocab.has(space)) return false
  return merges.every(([left, right]) => !/[^\u2581]\u2581/u.test(left + right))
}

function byteToken(byte: number): string {
  return `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`
}

/** Symbols as a doubly linked list in arrays; candidates in a heap of rank * 2^32 + position. */
function merge(ids: Int32Array, pairs: PairTable): number[] {
  const n = ids.length
  const next = Int32Array.from(ids, (_, i) => (i + 1 < n ? i + 1 : -1))
  const previous = Int32Array.from(ids, (_, i) => i - 1)
  // each symbol is queued once at the start, and each of at most n - 1 merges queues two
  const heap = new Heap(3 * n)
  const offer = (at: number): void => {
    if (at < 0 || next[at] < 0) return
    const rank = pairs.rank(ids[at], ids[next[at]])
    if (rank >= 0) heap.push(rank * 2 ** 32 + at)
  }
  for (let i = 0; i < n; i++) offer(i)
  while (heap.size > 0) {
    const key = heap.pop()
    const rank = Math.floor(key / 2 ** 32)
    const at = key - rank * 2 ** 32
    const right = next[at]
    // the pair may have been merged away, or grown, since it was queued
    if (ids[at] < 0 || right < 0 || pairs.rank(ids[at], ids[right]) !== rank) continue
    ids[at] = pairs.merged[rank]
    ids[right] = -1
    next[at] = next[right]
    if (next[at] >= 0) previous[next[at]] = at
    offer(previous[at])
    offer(at)
  }
  const result: number[] = []
  for (let i = 0; i < n; i++) if (ids[i] >= 0) result.push(ids[i])
  return result
}

/** (left id, right id) -> rank, by open addressing: a Map of string keys takes most of the library's time. */
class PairTable {
  /** The id that the merge of each rank makes. */
  readonly merged: Int32Array
  private readonly keys: Int32Array
  private readonly ranks: Int32Array
  private readonly mask: number

  constructor({ vocab, merges }: BpeModel) {
    const size = 2 ** Math.ceil(Math.log2(2 * merges.length + 2))
    this.mask = size - 1
    this.keys = new Int32Array(2 * size)
    this.ranks = new Int32Array(size).fill(-1)
    this.merged = new Int32Array(merges.length)
    merges.forEach(([left, right], rank) => {
      const [a, b, both] = [left, right, left + right].map((token) => {
        const id = vocab.get(token)
        if (id === undefined)
          throw new RangeError(`merge ${rank} (${left} ${right}): the vocabulary has no token "${token}"`)
        return id
      })
      this.merged[rank] = both
      const slot = this.slot(a, b)
      this.keys[2 * slot] = a
      this.keys[2 * slot + 1] = b
      // a pair that is listed twice has its last rank, as in a dictionary
      this.ranks[slot] = rank
    })
  }

  /** -1 where the pair does not merge. */
  rank(a: number, b: number): number {
    return this.ranks[this.slot(a, b)]
  }

  private slot(a: number, b: number): number {
    let slot = (Math.imul(a, 0x9e3779b1) ^ Math.imul(b, 0x85ebca6b)) >>> 0
    slot = (slot ^ (slot >>> 15)) & this.mask
    while (this.ranks[slot] >= 0 && (this.keys[2 * slot] !== a || this.keys[2 * slot + 1] !== b)) {
      slot = (slot + 1) & this.mask
    }
    return slot
  }
}

/** A binary heap of numbers, smallest first. */
class Heap {
  size = 0
  private readonly keys: Float64Array

  constructor(capacity: number) {
    this.keys = new Float64Array(capacity)
  }

  push(key: number): void {
    let at = this.size++
    while (at > 0) {
      const parent = (at - 1) >> 1
      if (this.keys[parent] <= key) break
      this.keys[at] = this.keys[parent]
      at = parent
    }
    this.keys[at] = key
  }

  pop(): number {
    const top = this.keys[0]
    const key = this.keys[--this.size]
    let at = 0
    for (;;) {
      let child = 2 * at + 1
      if (child >= this.size) break
      if (child + 1 < this.size && this.keys[child + 1] < this.keys[child]) child++
      if (this.keys[child] >= key) break
      this.keys[at] = this.keys[child]
      at = child
    }
    this.keys[at] = key
    return top
  }
}
