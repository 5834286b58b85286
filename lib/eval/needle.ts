import { uniform } from '../model/generate.js'
import { PromptCache } from '../model/prompt-cache.js'
import { wilson } from './interval.js'
import { ANSWER, answer, type PasskeyModel, placePasskey, randomKey } from './passkey.js'

/**
 * Options of {@link needle}.
 *
 * @category Evaluation
 */
export interface NeedleOptions {
  /** Prompt and answer together, in tokens: one row of cells each. */
  contexts: readonly number[]
  /** Where in the text the key stands, from 0 (its beginning) to 1 (its end); default 0, 0.1 ... 1. */
  depths?: readonly number[]
  /** Prompts with a key of their own for each cell; default 5. */
  trials?: number
  /** Of the keys; the same seed gives the same prompts. Default 0. */
  seed?: number
  /** Ends the evaluation between two tokens; it rejects with the signal's reason. */
  signal?: AbortSignal
  /** Called after each prompt; `accuracy` is that of all prompts so far. */
  onProgress?: (done: { done: number; total: number; context: number; depth: number; accuracy: number }) => void
}

/**
 * What came of one context and depth.
 *
 * @category Evaluation
 */
export interface NeedleCell {
  /** Prompt and answer together, in tokens. */
  context: number
  /** As in the options. */
  depth: number
  /** Mean length of the prompts, in tokens. */
  promptTokens: number
  /** Mean distance of the key's first token from the end of the prompt, in tokens. */
  distance: number
  /** Prompts. */
  trials: number
  /** Prompts whose answer began with the key. */
  successes: number
  /** successes / trials */
  accuracy: number
  /** 95 % interval of accuracy (Wilson). */
  interval: [number, number]
}

/**
 * What {@link needle} gives.
 *
 * @category Evaluation
 */
export interface NeedleResult {
  /** As in the options. */
  contexts: number[]
  /** As in the options. */
  depths: number[]
  /** As in the options. */
  seed: number
  /** By context, then by depth, in the order of the options. */
  cells: NeedleCell[]
  /** Of all prompts. */
  accuracy: number
}

/**
 * Passkey retrieval by length and depth, the heat map known as "needle in a haystack": the prompts of {@link passkey},
 * with the key at given depths of texts of given lengths. `model` is a {@link Llama} with a tokenizer.
 *
 * Throws TypeError or RangeError for options out of range and where a context is too short for the prompt, RopewalkError
 * ERR_NOT_FOUND or ERR_TOKENIZER where the model has no usable tokenizer.
 *
 * @category Evaluation
 */
export async function needle(model: PasskeyModel, options: NeedleOptions): Promise<NeedleResult> {
  const { contexts, depths = Array.from({ length: 11 }, (_, i) => i / 10), trials = 5, seed = 0, signal } = options
  checkOptions(contexts, depths, trials, seed)
  const tokenizer = await model.tokenizer()
  const random = uniform(seed)
  const total = contexts.length * depths.length * trials
  const cells: NeedleCell[] = []
  let done = 0
  let hits = 0
  using cache = new PromptCache(Math.max(...contexts))
  for (const context of contexts) {
    for (const depth of depths) {
      const cell = { context, depth, promptTokens: 0, distance: 0, trials, successes: 0 }
      for (let trial = 0; trial < trials; trial++) {
        signal?.throwIfAborted()
        const key = randomKey(random)
        const room = context - ANSWER
        const prompt = placePasskey(tokenizer, key, Math.round((1 - depth) * room), room)
        cell.promptTokens += prompt.ids.length / trials
        cell.distance += prompt.distance / trials
        if ((await answer(model, prompt.ids, cache, signal)).startsWith(key)) {
          cell.successes++
          hits++
        }
        options.onProgress?.({ done: ++done, total, context, depth, accuracy: hits / done })
      }
      const accuracy = cell.successes / trials
      cells.push({ ...cell, accuracy, interval: wilson(accuracy, trials) })
    }
  }
  return { contexts: [...contexts], depths: [...depths], seed, cells, accuracy: hits / total }
}

function checkOptions(contexts: readonly number[], depths: readonly number[], trials: number, seed: number): void {
  for (const [name, list] of Object.entries({ contexts, depths })) {
    if (!Array.isArray(list) || list.length === 0) throw new TypeError(`${name} must be a list of numbers`)
  }
  for (const context of contexts) {
    if (!Number.isInteger(context) || context < 1)
      throw new RangeError(`contexts: ${context} must be a whole number >= 1`)
  }
  for (const depth of depths) {
    if (!(depth >= 0 && depth <= 1)) throw new RangeError(`depths: ${depth} must lie from 0 to 1`)
  }
  if (!Number.isInteger(trials) || trials < 1) throw new RangeError(`trials is ${trials}, must be a whole number >= 1`)
  if (!Number.isInteger(seed) || seed < 0) throw new RangeError(`seed is ${seed}, must be a whole number >= 0`)
}
