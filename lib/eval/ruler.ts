import { didYouMean, quote } from '../errors.js'
import type { Tokenizer } from '../files/tokenizer.js'
import { PromptCache } from '../model/prompt-cache.js'
import { wilson } from './interval.js'
import type { PasskeyModel } from './passkey.js'
import { type Builder, builderOf, fewestWords, type RulerPrompt, type RulerTask, rulerTasks } from './ruler-tasks.js'
import { Draw } from './ruler-words.js'

/**
 * Options of {@link ruler}.
 *
 * @category Evaluation
 */
export interface RulerOptions {
  /** Prompt and answer together, in tokens. */
  context: number
  /** Default: all of them. */
  tasks?: readonly RulerTask[]
  /** Prompts of each task; default 20 (RULER's own runs have 500). */
  trials?: number
  /** Of the prompts; the same seed gives the same ones. Default 0. */
  seed?: number
  /** A text that needles are hidden in (RULER takes essays by Paul Graham); default: its sentence of noise. */
  haystack?: string
  /** Different words for the lists of cwe (RULER takes English ones); default: 253 English words and, in longer
   * lists, made-up ones of three syllables. */
  words?: readonly string[]
  /** Solved examples before the question of vt and cwe; default 1, as in RULER. */
  shots?: 0 | 1
  /** Ends the evaluation between two tokens; it rejects with the signal's reason. */
  signal?: AbortSignal
  /** Called after each prompt; `accuracy` is that of the task so far. */
  onProgress?: (done: { done: number; total: number; task: RulerTask; accuracy: number }) => void
}

/**
 * A prompt of {@link ruler}, and what came of it.
 *
 * @category Evaluation
 */
export interface RulerTrial {
  /** Length of the prompt, in tokens. */
  promptTokens: number
  /** Tokens that the answer could have. */
  answerTokens: number
  /** What a right answer contains. */
  references: string[]
  /** What the model wrote, up to the last reference where it gave them all. */
  answer: string
  /** The share of the references that the answer contains. */
  score: number
}

/**
 * What came of one task of {@link ruler}.
 *
 * @category Evaluation
 */
export interface RulerTaskResult {
  /** Its name. */
  task: RulerTask
  /** Prompts. */
  trials: number
  /** Mean of their scores. */
  accuracy: number
  /** 95 % interval of accuracy (Wilson); rather too wide for tasks in which an answer can be right in part. */
  interval: [number, number]
  /** Prompt by prompt. */
  records: RulerTrial[]
}

/**
 * What {@link ruler} gives.
 *
 * @category Evaluation
 */
export interface RulerResult {
  /** As in the options. */
  context: number
  /** As in the options. */
  seed: number
  /** Whether needles were hidden in noise or in the text of the options. */
  haystack: 'noise' | 'text'
  /** As in the options. */
  shots: 0 | 1
  /** In the order of the options. */
  tasks: RulerTaskResult[]
  /** Mean over the tasks, each counting the same. */
  accuracy: number
}

/**
 * RULER's synthetic tasks (arXiv 2404.06654) at any length: needles in a haystack (`niah_single_1` to `_3`,
 * `niah_multikey_1` to `_3`, `niah_multivalue`, `niah_multiquery`), variable tracking (`vt`), common words (`cwe`) and
 * frequent words (`fwe`). Prompts are as long as `context` allows, the answer included. The score of an answer, which is
 * generated greedily, is the share of references that it contains, in whatever case (RULER's string_match_all). `model`
 * is a {@link Llama} with a tokenizer.
 *
 * Templates and numbers are those of NVIDIA/RULER for a base model. What differs: the random draws; no two needles of a
 * prompt share a key or a value; without `haystack`, needles that RULER hides in essays are hidden in its sentence of
 * noise, which is easier; keys are of 15,900 pairs of words, and cwe's are 253 English words and, beyond those,
 * made-up ones, where RULER has a dictionary; an answer has more tokens than RULER gives it where a tokenizer needs more for the references.
 *
 * Throws TypeError or RangeError for options out of range and where the context is too short for a task, RopewalkError
 * ERR_NOT_FOUND or ERR_TOKENIZER where the model has no usable tokenizer.
 *
 * @category Evaluation
 */
export async function ruler(model: PasskeyModel, options: RulerOptions): Promise<RulerResult> {
  const { context, tasks = rulerTasks, trials = 20, seed = 0, shots = 1, signal } = options
  checkOptions(options)
  const text = options.haystack?.split(/\s+/).filter((word) => word !== '')
  const words = options.words && [...new Set(options.words)]
  const tokenizer = await model.tokenizer()
  const count = (text: string): number => tokenizer.encode(text).length
  const results: RulerTaskResult[] = []
  using cache = new PromptCache(context)
  for (const task of tasks) {
    const builder = builderOf(task, { context, shots, text, words, count })
    const records: RulerTrial[] = []
    const fit = new Fit(builder, tokenizer, context, task)
    let sum = 0
    for (let trial = 0; trial < trials; trial++) {
      signal?.throwIfAborted()
      const { ids, references, answerTokens } = fit.prompt(seedOf(seed, task, trial))
      const answer = await respond(model, ids, answerTokens, references, cache, signal)
      const score = matched(answer, references)
      sum += score
      records.push({ promptTokens: ids.length, answerTokens, references, answer, score })
      const done = results.length * trials + trial + 1
      options.onProgress?.({ done, total: tasks.length * trials, task, accuracy: sum / (trial + 1) })
    }
    const accuracy = sum / trials
    results.push({ task, trials, accuracy, interval: wilson(accuracy, trials), records })
  }
  const accuracy = results.reduce((sum, { accuracy }) => sum + accuracy, 0) / results.length
  return { context, seed, haystack: text ? 'text' : 'noise', shots, tasks: results, accuracy }
}

/** The share of the references that a text contains, in whatever case. */
export function matched(text: string, references: readonly string[]): number {
  const said = text.toLowerCase()
  return references.filter((reference) => said.includes(reference.toLowerCase())).length / references.length
}

/** What the model writes; more could not change the score once all references are there. */
async function respond(
  model: PasskeyModel,
  prompt: readonly number[],
  maxTokens: number,
  references: readonly string[],
  cache: PromptCache,
  signal?: AbortSignal,
): Promise<string> {
  let text = ''
  for await (const token of model.generate({ prompt, maxTokens, cache, ...(signal ? { signal } : {}) })) {
    text += token.text
    if (matched(text, references) === 1) break
  }
  return text
}

/** A prompt whose draws depend on nothing but the seed, the task and its number: FNV-1a. */
export function seedOf(seed: number, task: RulerTask, trial: number): number {
  let hash = 0x811c9dc5
  for (const byte of Buffer.from(`${seed} ${task} ${trial}`)) hash = Math.imul(hash ^ byte, 0x01000193)
  return hash >>> 0
}

interface FittedPrompt extends Pick<RulerPrompt, 'references'> {
  ids: number[]
  answerTokens: number
}

/** Finds the largest prompts that leave room for their answers. */
export class Fit {
  /** The size to begin with, and the tokens that one more of it adds. */
  private size: number | undefined
  private unit = 1

  constructor(
    private readonly builder: Builder,
    private readonly tokenizer: Pick<Tokenizer, 'encode'>,
    private readonly context: number,
    private readonly task: string,
  ) {}

  /** Throws RangeError where the smallest prompt is too long. */
  prompt(seed: number): FittedPrompt {
    const { smallest, largest = Infinity } = this.builder
    if (this.size === undefined) {
      const bare = this.encode(seed, smallest)
      this.requireRoom(bare)
      this.size = Math.min(largest, smallest + 16)
      this.unit = Math.max(1, (this.encode(seed, this.size).ids.length - bare.ids.length) / (this.size - smallest || 1))
    }
    // Each step goes by the tokens that are missing or too many; it ends where the next one has been tried.
    const tried = new Set<number>()
    let best: FittedPrompt | undefined
    for (let size = this.size; !tried.has(size);) {
      tried.add(size)
      const prompt = this.encode(seed, size)
      const spare = this.context - prompt.answerTokens - prompt.ids.length
      if (spare >= 0 && prompt.ids.length >= (best?.ids.length ?? 0)) {
        best = prompt
        this.size = size
      }
      const step = Math.floor(spare / this.unit)
      size = Math.min(largest, Math.max(smallest, size + step))
    }
    if (best) return best
    const bare = this.encode(seed, smallest)
    this.requireRoom(bare)
    return bare
  }

  private encode(seed: number, size: number): FittedPrompt {
    const { text, references } = this.builder.build(new Draw(seed), size)
    const answer = this.tokenizer.encode(` ${references.join(', ')}`, { addSpecialTokens: false })
    const answerTokens = Math.max(this.builder.answerTokens, answer.length + 8)
    return { ids: this.tokenizer.encode(text), references, answerTokens }
  }

  private requireRoom({ ids, answerTokens }: FittedPrompt): void {
    if (ids.length + answerTokens <= this.context) return
    throw new RangeError(
      `context is ${this.context} tokens, but the smallest prompt of ${this.task} has ${ids.length} and its answer takes ` +
        `${answerTokens}: use a larger context, or leave this task out`,
    )
  }
}

function checkOptions({ context, tasks, trials = 1, seed = 0, haystack, words, shots = 1 }: RulerOptions): void {
  for (const [name, value] of Object.entries({ context, trials })) {
    if (!Number.isInteger(value) || value < 1) throw new RangeError(`${name} is ${value}, must be a whole number >= 1`)
  }
  if (!Number.isInteger(seed) || seed < 0) throw new RangeError(`seed is ${seed}, must be a whole number >= 0`)
  if (shots !== 0 && shots !== 1) throw new RangeError(`shots is ${quote(shots)}, must be 0 or 1`)
  if (tasks !== undefined) {
    if (!Array.isArray(tasks) || tasks.length === 0) throw new TypeError('tasks must be a list of names')
    for (const task of tasks as readonly string[]) {
      if (!(rulerTasks as readonly string[]).includes(task))
        throw new RangeError(`there is no task ${quote(task)}${didYouMean(task, rulerTasks)}: ${rulerTasks.join(', ')}`)
    }
  }
  if (haystack !== undefined && (typeof haystack !== 'string' || haystack.trim() === '')) {
    throw new TypeError('haystack must be a text with words in it')
  }
  if (words !== undefined) {
    if (!Array.isArray(words) || !words.every((word) => typeof word === 'string' && word.trim() !== '')) {
      throw new TypeError('words must be a list of words')
    }
    const [different, fewest] = [new Set(words).size, fewestWords({ context })]
    if ((tasks ?? rulerTasks).includes('cwe') && different < fewest) {
      throw new RangeError(`words has ${different} different words, but cwe needs ${fewest}: give more words`)
    }
  }
}
