import type { Tokenizer } from '../files/tokenizer.js'
import { uniform } from '../model/generate.js'
import type { Llama } from '../model/llama.js'
import { PromptCache } from '../model/prompt-cache.js'

/**
 * Options of {@link passkey}.
 *
 * @category Evaluation
 */
export interface PasskeyOptions {
  /** Prompt and answer together, in tokens. */
  context: number
  /**
   * Number of nominal distances, spread evenly: context / distances, 2 * context / distances ... context. The key is as far
   * from the end as whole sentences of filler allow; of distances with the same prompt the largest is evaluated. Default 32.
   */
  distances?: number
  /** Prompts with a key of their own at each distance; default 10. */
  trials?: number
  /** Of the keys; the same seed gives the same prompts. Default 0. */
  seed?: number
  /** Ends the evaluation between two tokens; it rejects with the signal's reason. */
  signal?: AbortSignal
  /** Called after each prompt; `accuracy` is that of all prompts so far. */
  onProgress?: (done: { done: number; total: number; distance: number; accuracy: number }) => void
}

/**
 * What came of one distance.
 *
 * @category Evaluation
 */
export interface PasskeyDistance {
  /** Nominal distance k of the key from the end of the prompt, in tokens. */
  distance: number
  /** Mean of the real distances: filler comes in whole repetitions, and neither end of the prompt can hold the key. */
  tokens: number
  /** Prompts at this distance. */
  trials: number
  /** Prompts whose answer began with the key. */
  successes: number
  /** successes / trials */
  accuracy: number
}

/**
 * What {@link passkey} gives.
 *
 * @category Evaluation
 */
export interface PasskeyResult {
  /** As in the options. */
  context: number
  /** As in the options. */
  seed: number
  /** Length of the longest prompt, in tokens. */
  promptTokens: number
  /** By distance, the nearest first; fewer than asked for where several have the same prompt. */
  distances: PasskeyDistance[]
  /** The paper's effective context: the largest k such that accuracy is at least 20 % at every k' <= k; 0 for none. */
  kmax: number
  /** Of all prompts. */
  accuracy: number
}

/** What the evaluation needs of a model. */
export type PasskeyModel = Pick<Llama, 'config' | 'generate' | 'tokenizer'>

const TASK =
  'There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about ' +
  'the important information there.'
const FILLER = 'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.'
const QUESTION = 'What is the pass key? The pass key is'

/** Tokens for the answer: five digits, a space before them, and some to spare. */
export const ANSWER = 8

/** Five digits. */
export const randomKey = (random: () => number): string => String(10000 + Math.floor(random() * 90000))

/** The paper's prompt, with the filler `before` and `after` times around the key. */
export function passkeyPrompt(key: string, before: number, after: number): string {
  const filler = (times: number): string[] => (times > 0 ? [Array<string>(times).fill(FILLER).join(' ')] : [])
  const line = `The pass key is ${key}. Remember it. ${key} is the pass key.`
  return [TASK, ...filler(before), line, ...filler(after), QUESTION].join('\n')
}

/** The largest distance up to which, and at which, accuracy is at least 20 %; 0 where it is not at the smallest. */
export function kmax(distances: readonly Pick<PasskeyDistance, 'distance' | 'accuracy'>[]): number {
  let largest = 0
  for (const { distance, accuracy } of [...distances].sort((a, b) => a.distance - b.distance)) {
    if (accuracy < 0.2) break
    largest = distance
  }
  return largest
}

/** A prompt as token ids, and how far the key's first token is from the end, in tokens. */
export interface EncodedPrompt {
  ids: number[]
  distance: number
}

/** A prompt with as much filler as there is room for, and how much of it stands before and after the key. */
export interface PlacedPrompt extends EncodedPrompt {
  before: number
  after: number
}

/**
 * `passkeyPrompt` encoded. The filler repeats, and so does its encoding: what one more repetition adds is found on short
 * prompts and then inserted, since encoding hundreds of long prompts would take longer than the model does.
 */
export function encodePasskey(
  tokenizer: Pick<Tokenizer, 'encode'>,
  key: string,
  before: number,
  after: number,
): EncodedPrompt {
  const encode = (digits: string, b: number, a: number): number[] => tokenizer.encode(passkeyPrompt(digits, b, a))
  const b = Math.min(before, 2)
  const a = Math.min(after, 2)
  const short = encode(key, b, a)
  const left = before > b ? repetition(short, encode(key, b + 1, a)) : undefined
  const right = after > a ? repetition(short, encode(key, b, a + 1)) : undefined
  const regular = (before === b || left) && (after === a || right) && (left?.at ?? 0) <= (right?.at ?? Infinity)
  // The same prompt but for the key's first digit parts from it where the key begins.
  const other = `${key[0] === '9' ? 1 : Number(key[0]) + 1}${key.slice(1)}`
  if (!regular) {
    const ids = encode(key, before, after)
    return { ids, distance: ids.length - commonPrefix(ids, encode(other, before, after)) }
  }
  const ids: number[] = []
  const add = (part: readonly number[], times = 1): void => {
    for (let n = 0; n < times; n++) for (const id of part) ids.push(id)
  }
  const [first, second] = [left?.at ?? 0, right?.at ?? short.length]
  add(short.slice(0, first))
  if (left) add(left.block, before - b)
  add(short.slice(first, second))
  if (right) add(right.block, after - a)
  add(short.slice(second))
  const tail = short.length - commonPrefix(short, encode(other, b, a))
  return { ids, distance: tail + (right ? right.block.length * (after - a) : 0) }
}

/** Where `longer` has a block that `shorter` has not, all else being equal; undefined where more differs. */
function repetition(
  shorter: readonly number[],
  longer: readonly number[],
): { at: number; block: number[] } | undefined {
  const at = commonPrefix(shorter, longer)
  const size = longer.length - shorter.length
  if (size <= 0 || !shorter.slice(at).every((id, i) => longer[at + size + i] === id)) return undefined
  return { at, block: longer.slice(at, at + size) }
}

function commonPrefix(a: readonly number[], b: readonly number[]): number {
  let n = 0
  while (n < a.length && a[n] === b[n]) n++
  return n
}

/** The longest prompt of at most `room` tokens whose key is about `distance` tokens from its end. Throws RangeError. */
export function placePasskey(
  tokenizer: Pick<Tokenizer, 'encode'>,
  key: string,
  distance: number,
  room: number,
): PlacedPrompt {
  const bare = encodePasskey(tokenizer, key, 0, 0)
  if (bare.ids.length > room) {
    throw new RangeError(
      `context is ${room + ANSWER} tokens, but the passkey prompt has ${bare.ids.length} without any filler and its answer ` +
        `takes ${ANSWER}: use a larger context`,
    )
  }
  const unit = encodePasskey(tokenizer, key, 0, 3).ids.length - encodePasskey(tokenizer, key, 0, 2).ids.length
  // Estimates of the first repetitions may be off by the tokens at line ends, so the sum is checked on the real prompt.
  for (let total = Math.floor((room - bare.ids.length) / unit) + 1; total > 0; total--) {
    const after = Math.min(total, Math.max(0, Math.round((distance - bare.distance) / unit)))
    const before = total - after
    const prompt = encodePasskey(tokenizer, key, before, after)
    if (prompt.ids.length <= room) return { ...prompt, before, after }
  }
  return { ...bare, before: 0, after: 0 }
}

/** The nominal distances, without those whose prompt a larger one has too: it would be asked, and counted, again. */
function differentDistances(tokenizer: Pick<Tokenizer, 'encode'>, context: number, distances: number): number[] {
  const byLayout = new Map<string, number>()
  for (let n = 1; n <= distances; n++) {
    const distance = Math.round((n * context) / distances)
    const { before, after } = placePasskey(tokenizer, ANY_KEY, distance, context - ANSWER)
    byLayout.set(`${before} ${after}`, distance)
  }
  return [...byLayout.values()]
}

/** Where the key stands does not depend on its digits. */
const ANY_KEY = '31415'

/**
 * Passkey retrieval (arXiv 2305.16300) as in the paper (2306.15595, section 3.3): a random five-digit key in a long
 * irrelevant text, at evenly spread distances from the end; greedy generation must begin with the key. Distances are
 * nominal: the key is as far from the end as whole sentences of filler allow. `model` is a {@link Llama} with a tokenizer.
 *
 * Throws RangeError for options out of range and where the context is too short for the prompt, RopewalkError
 * ERR_NOT_FOUND or ERR_TOKENIZER where the model has no usable tokenizer.
 *
 * @category Evaluation
 */
export async function passkey(model: PasskeyModel, options: PasskeyOptions): Promise<PasskeyResult> {
  const { context, distances = 32, trials = 10, seed = 0, signal } = options
  const whole = { context, distances, trials }
  for (const [name, value] of Object.entries(whole)) {
    if (!Number.isInteger(value) || value < 1) throw new RangeError(`${name} is ${value}, must be a whole number >= 1`)
  }
  if (!Number.isInteger(seed) || seed < 0) throw new RangeError(`seed is ${seed}, must be a whole number >= 0`)
  const tokenizer = await model.tokenizer()
  const random = uniform(seed)
  const results: PasskeyDistance[] = []
  let promptTokens = 0
  let hits = 0
  // Prompts have the filler before the key in common.
  using cache = new PromptCache(context)
  const different = differentDistances(tokenizer, context, distances)
  const total = different.length * trials
  for (const distance of different) {
    const row: PasskeyDistance = { distance, tokens: 0, trials, successes: 0, accuracy: 0 }
    for (let trial = 0; trial < trials; trial++) {
      signal?.throwIfAborted()
      const key = randomKey(random)
      const prompt = placePasskey(tokenizer, key, distance, context - ANSWER)
      promptTokens = Math.max(promptTokens, prompt.ids.length)
      row.tokens += prompt.distance / trials
      if ((await answer(model, prompt.ids, cache, signal)).startsWith(key)) {
        row.successes++
        hits++
      }
      row.accuracy = row.successes / (trial + 1)
      const done = results.length * trials + trial + 1
      options.onProgress?.({ done, total, distance, accuracy: hits / done })
    }
    results.push(row)
  }
  const accuracy = hits / total
  return { context, seed, promptTokens, distances: results, kmax: kmax(results), accuracy }
}

/** What the model says next, greedily, up to five characters and without spaces before them. */
export async function answer(
  model: PasskeyModel,
  prompt: readonly number[],
  cache: PromptCache,
  signal?: AbortSignal,
): Promise<string> {
  let text = ''
  for await (const token of model.generate({ prompt, cache, maxTokens: ANSWER, ...(signal ? { signal } : {}) })) {
    text = (text + token.text).trimStart()
    if (text.length >= 5) break
  }
  return text
}
