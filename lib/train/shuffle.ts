/**
 * Random order that any program can repeat: sfc32 (Chris Doty-Humphrey's Small Fast Counting generator, 32 bits), its
 * state filled by splitmix32 from the seed's halves and the stream numbers, 12 values thrown away. An order is a
 * function of its arguments alone, so a run that resumes needs no generator state, only the numbers.
 */
function generator(seed: number, ...streams: number[]): () => number {
  const words = [seed, Math.floor(seed / 2 ** 32), ...streams].map((word) => word >>> 0)
  let mixed = 0x9e3779b9
  const next = (): number => {
    mixed = (mixed + 0x9e3779b9) | 0
    let z = mixed
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad)
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97)
    return (z ^ (z >>> 15)) >>> 0
  }
  for (const word of words) {
    mixed = (mixed ^ word) | 0
    mixed = next() | 0
  }
  let [a, b, c, d] = [next() | 0, next() | 0, next() | 0, 1]
  const draw = (): number => {
    const t = (((a + b) | 0) + d) | 0
    d = (d + 1) | 0
    a = b ^ (b >>> 9)
    b = (c + (c << 3)) | 0
    c = (c << 21) | (c >>> 11)
    c = (c + t) | 0
    return t >>> 0
  }
  for (let i = 0; i < 12; i++) draw()
  return draw
}

/** Gives whole numbers below a bound of at most 2^32, without bias: a function of the seed, the streams and the calls. */
export function integers(seed: number, ...streams: number[]): (range: number) => number {
  const draw = generator(seed, ...streams)
  return (range) => {
    // what is left over above a whole number of ranges would make small numbers likelier
    const limit = 2 ** 32 - (2 ** 32 % range)
    let value = draw()
    while (value >= limit) value = draw()
    return value % range
  }
}

/** `items` shuffled in place (Fisher-Yates, from the end), without bias. The same seed and stream give the same order. */
export function shuffle(items: Uint32Array, seed: number, stream: number): Uint32Array {
  const below = integers(seed, stream)
  for (let i = items.length - 1; i > 0; i--) {
    const j = below(i + 1)
    const item = items[i]!
    items[i] = items[j]!
    items[j] = item
  }
  return items
}

/** 0 .. count - 1 in random order. */
export function permutation(count: number, seed: number, stream: number): Uint32Array {
  return shuffle(
    Uint32Array.from({ length: count }, (_, i) => i),
    seed,
    stream,
  )
}
