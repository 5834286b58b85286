/** Uniform numbers in [0, 1): splitmix32, a counter through a mixing function. */
export function uniform(seed: number): () => number {
  let state = (seed ^ Math.floor(seed / 2 ** 32)) >>> 0
  return () => {
    state = (state + 0x9e3779b9) | 0
    let z = state
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad)
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97)
    return ((z ^ (z >>> 15)) >>> 0) / 2 ** 32
  }
}

/** Normal numbers of mean 0 and variance 1 (Box-Muller). */
export function normals(count: number, seed: number): Float64Array {
  const random = uniform(seed)
  const values = new Float64Array(count)
  for (let i = 0; i < count; i += 2) {
    // 1 - u keeps the logarithm finite
    const radius = Math.sqrt(-2 * Math.log(1 - random()))
    const angle = 2 * Math.PI * random()
    values[i] = radius * Math.cos(angle)
    if (i + 1 < count) values[i + 1] = radius * Math.sin(angle)
  }
  return values
}
