import { integers } from './shuffle.js'

/**
 * Positional skip-wise training (PoSE, arXiv 2309.10400): a window of `context` tokens is made of chunks of a longer
 * text, with gaps between them, so that short windows train the positions of long ones. Chunks come from one document,
 * each further on than the one before, where it is long enough; positions skip by gaps of their own. As in the authors'
 * code, chunks are of random lengths, the first position is 0, and the last token of a chunk predicts the first one of
 * the next. Each window is drawn anew in every epoch. Files of `validation` are read without skips.
 *
 * @category Training
 */
export interface PoseOptions {
  /** Positions lie below it, in tokens: the context to be trained. At most the model's context window. */
  length: number
  /** Default 2. */
  chunks?: number
}

export type PoseSettings = Required<PoseOptions>

/** A stretch of a window. */
export interface Chunk {
  /** First token in the window, first token in the data, and first position. */
  at: number
  token: number
  position: number
  length: number
}

/**
 * The chunks of a window of `context` tokens that begins at `start`, in a document with `room` tokens from there on. They
 * are a function of the seed and the `streams`.
 */
export function chunksOf(
  { length, chunks }: PoseSettings,
  context: number,
  { start, room }: { start: number; room: number },
  seed: number,
  ...streams: number[]
): Chunk[] {
  const below = integers(seed, ...streams)
  const longest = Math.floor((context + 1) / chunks)
  const result: Chunk[] = []
  let at = 0
  // How much text, and how many positions, have been left out so far.
  let gap = 0
  let skip = 0
  for (let i = 0; i < chunks; i++) {
    if (i > 0) {
      gap += below(Math.max(0, room - context - gap) + 1)
      skip += below(length - context - skip + 1)
    }
    const count = i === chunks - 1 ? context - at : 1 + below(longest)
    result.push({ at, token: start + at + gap, position: at + skip, length: count })
    at += count
  }
  return result
}
