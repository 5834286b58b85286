import type { Llama } from '../index.js'
import type { PasskeyPrompt } from './data.js'

/** Tokens in one pass: enough for full speed, few enough that an abort is soon noticed. */
const BATCH = 8192

interface Hooks {
  signal?: AbortSignal | undefined
  /** Called with the number of rows of each batch when it is done. */
  onRows?: ((rows: number) => void) | undefined
}

/** What happens to rows of one length, batch by batch. */
async function inBatches<T extends { length: number }>(
  rows: readonly T[],
  time: number,
  { signal, onRows }: Hooks,
  body: (batch: readonly T[], start: number) => Promise<void>,
): Promise<void> {
  const size = Math.max(1, Math.floor(BATCH / time))
  for (let start = 0; start < rows.length; start += size) {
    signal?.throwIfAborted()
    const batch = rows.slice(start, start + size)
    await body(batch, start)
    onRows?.(batch.length)
  }
}

/**
 * Negative log-likelihood of every token of texts of one length (N,T): entry t is about token t + 1, which has t + 1
 * tokens before it. One pass measures all contexts up to T at once, on the same texts.
 */
export async function losses(
  model: Pick<Llama, 'tokenLosses'>,
  texts: readonly number[][],
  hooks: Hooks = {},
): Promise<Float32Array[]> {
  const result: Float32Array[] = []
  const time = texts[0]!.length
  await inBatches(texts, time, hooks, async (batch) => {
    const { data } = await model.tokenLosses(batch)
    for (let row = 0; row < batch.length; row++) result.push(data.slice(row * time, (row + 1) * time - 1))
  })
  return result
}

/** Mean loss of the tokens that have from `from` to `to` tokens before them, a mean for each text. */
export function meanLosses(rows: readonly Float32Array[], from: number, to: number): number[] {
  return rows.map((row) => {
    let sum = 0
    for (let t = from; t <= to; t++) sum += row[t - 1]!
    return sum / (to - from + 1)
  })
}

/**
 * Whether greedy decoding answers each prompt with its key. The key is fed along with the prompt, in one pass: where at
 * every one of its tokens the model's first choice is that token, greedy decoding would have chosen the same token, and
 * seen the same text at the next. Where it is not at one of them, decoding would have gone wrong there at the latest.
 */
export async function retrieves(
  model: Pick<Llama, 'logits'>,
  prompts: readonly PasskeyPrompt[],
  hooks: Hooks = {},
): Promise<boolean[]> {
  const result: boolean[] = []
  const time = Math.max(...prompts.map(({ ids, answer }) => ids.length + answer.length))
  // What follows the answer is filled up; nothing before it can see that.
  const rows = prompts.map(({ ids, answer }) => {
    const row = [...ids, ...answer]
    return row.concat(Array<number>(time - row.length).fill(0))
  })
  await inBatches(rows, time, hooks, async (batch, start) => {
    const { dims, data } = await model.logits(batch)
    const vocab = dims[2]!
    for (let row = 0; row < batch.length; row++) {
      const { ids, answer } = prompts[start + row]!
      const said = answer.map((_, i) => {
        const at = (row * time + ids.length - 1 + i) * vocab
        return argmax(data.subarray(at, at + vocab))
      })
      result.push(said.every((id, i) => id === answer[i]))
    }
  })
  return result
}

function argmax(values: Float32Array): number {
  let best = 0
  for (let i = 1; i < values.length; i++) if (values[i]! > values[best]!) best = i
  return best
}

export const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length

/** Standard error of the mean; 0 for a single value. */
export function standardError(values: readonly number[]): number {
  if (values.length < 2) return 0
  const center = mean(values)
  const squares = values.reduce((sum, value) => sum + (value - center) ** 2, 0)
  return Math.sqrt(squares / (values.length - 1) / values.length)
}
