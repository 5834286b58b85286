import type { LlamaConfig } from '../model/config.js'
import { rotationTable } from '../rope.js'

/** Distances up to this one are "near"; entry 0 is the token itself. */
export const NEAR = 8

/** Scores of one range of distances, as they come in. */
export class ScoreSum {
  count = 0
  max = -Infinity
  min = Infinity
  /** The most that these queries and keys could score at any distance. */
  bound = 0
  private mean = 0
  private squares = 0

  add(score: number, bound: number): void {
    this.count++
    if (score > this.max) this.max = score
    if (score < this.min) this.min = score
    if (bound > this.bound) this.bound = bound
    const difference = score - this.mean
    this.mean += difference / this.count
    this.squares += difference * (score - this.mean)
  }

  /** Takes in another sum. */
  merge(other: ScoreSum): void {
    if (other.count === 0) return
    const count = this.count + other.count
    const difference = other.mean - this.mean
    this.squares += other.squares + (difference * difference * this.count * other.count) / count
    this.mean += (difference * other.count) / count
    this.count = count
    this.max = Math.max(this.max, other.max)
    this.min = Math.min(this.min, other.min)
    this.bound = Math.max(this.bound, other.bound)
  }

  values(): { count: number; max: number; min: number; mean: number; deviation: number; bound: number } {
    const { count, max, min, mean, squares, bound } = this
    return { count, max, min, mean, deviation: Math.sqrt(squares / count), bound }
  }
}

/** What one layer's heads do, summed over documents and queries. */
export class LayerSums {
  readonly near: Float64Array[]
  readonly ranges: ScoreSum[]
  /** Of the first key, which many heads attend to when nothing else fits. */
  readonly first = new ScoreSum()
  queries = 0

  constructor(
    heads: number,
    ranges: number,
    readonly width: number,
  ) {
    this.near = Array.from({ length: heads }, () => new Float64Array(NEAR + 1))
    this.ranges = Array.from({ length: ranges }, () => new ScoreSum())
  }
}

/** cos and sin of the model's positions 0 .. T - 1, each (T, D/2). */
export function rotation(config: LlamaConfig, time: number): { cos: Float32Array; sin: Float32Array } {
  const { rope, headDim, maxPositionEmbeddings } = config
  return rotationTable(rope, headDim, { maxPositionEmbeddings, positions: time })
}

/**
 * Adds a layer's scores q . k / sqrt(D) after rotation, in float64, of the queries at the listed positions. q (T,H,D) and
 * k (T,K,D) come unrotated. `pause` is awaited after each head.
 */
export async function addScores(
  sums: LayerSums,
  config: LlamaConfig,
  { q, k }: { q: Float32Array; k: Float32Array },
  table: { cos: Float32Array; sin: Float32Array },
  queries: readonly number[],
  pause: () => Promise<void>,
): Promise<void> {
  const { heads, kvHeads, headDim } = config
  const time = k.length / (kvHeads * headDim)
  const half = headDim / 2
  const keys = new Float64Array(time * headDim)
  const lengths = new Float64Array(time * half)
  const query = new Float64Array(headDim)
  const queryLengths = new Float64Array(half)
  const scores = new Float64Array(time)
  const scale = 1 / Math.sqrt(headDim)
  for (let group = 0; group < kvHeads; group++) {
    for (let t = 0; t < time; t++) {
      const key = keys.subarray(t * headDim, (t + 1) * headDim)
      turn(k, (t * kvHeads + group) * headDim, table, t, key, lengths.subarray(t * half, (t + 1) * half))
    }
    for (let head = (group * heads) / kvHeads; head < ((group + 1) * heads) / kvHeads; head++) {
      for (const t of queries) {
        turn(q, (t * heads + head) * headDim, table, t, query, queryLengths)
        let most = -Infinity
        for (let s = 0; s <= t; s++) {
          let [score, bound] = [0, 0]
          for (let i = 0, at = s * headDim; i < headDim; i++) score += query[i]! * keys[at + i]!
          for (let j = 0, at = s * half; j < half; j++) bound += queryLengths[j]! * lengths[at + j]!
          score *= scale
          scores[s] = score
          if (score > most) most = score
          const sum = s === 0 ? sums.first : sums.ranges[Math.floor((t - s) / sums.width)]!
          sum.add(score, bound * scale)
        }
        let total = 0
        for (let s = 0; s <= t; s++) total += Math.exp(scores[s]! - most)
        const near = sums.near[head]!
        for (let n = 0; n <= NEAR; n++) near[n]! += Math.exp(scores[t - n]! - most) / total
      }
      await pause()
    }
  }
  sums.queries += queries.length
}

/** The vector at x[from ..] turned to position t (pairs j, j + D/2), and the lengths of its pairs. */
function turn(
  x: Float32Array,
  from: number,
  { cos, sin }: { cos: Float32Array; sin: Float32Array },
  t: number,
  out: Float64Array,
  lengths: Float64Array,
): void {
  const half = lengths.length
  for (let j = 0; j < half; j++) {
    const [a, b] = [x[from + j]!, x[from + half + j]!]
    const [c, s] = [cos[t * half + j]!, sin[t * half + j]!]
    out[j] = a * c - b * s
    out[half + j] = b * c + a * s
    lengths[j] = Math.hypot(out[j]!, out[half + j]!)
  }
}
