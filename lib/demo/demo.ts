import { readFile } from 'node:fs/promises'
import { availableParallelism, cpus } from 'node:os'
import { join } from 'node:path'
import { kmax } from '../eval/passkey.js'
import { loadTokenizer } from '../files/tokenizer.js'
import { Llama, Trainer, version } from '../index.js'
import type { Finding } from '../report/page.js'
import { PACKAGE_ROOT } from '../runtime/native.js'
import { Corpus, Dice, type PasskeyPrompt } from './data.js'
import { findings } from './findings.js'
import { losses, mean, meanLosses, retrieves, standardError } from './measure.js'

/** The base model that ships with the package; `npm run demo:base` trains it anew. */
export const BASE = join(PACKAGE_ROOT, 'lib', 'demo', 'checkpoint')

export type Method = 'extrapolated' | 'interpolated' | 'tuned' | 'direct'

/** `short` is for the progress bar. */
export const METHODS: readonly { method: Method; label: string; short: string }[] = [
  { method: 'extrapolated', label: 'the base, extrapolated', short: 'base' },
  { method: 'interpolated', label: 'PI, no fine-tuning', short: 'PI' },
  { method: 'tuned', label: 'PI, fine-tuned', short: 'PI tuned' },
  { method: 'direct', label: 'no PI, fine-tuned the same', short: 'no PI' },
]

/** How the extensions are trained and measured. A step is one window; both fine-tuned models get the same ones. */
export interface Recipe {
  /** By how much the window is stretched, and for how many steps it is fine-tuned then. */
  extensions: readonly { factor: number; steps: number }[]
  learningRate: number
  /** Texts for the perplexity, and prompts for each place of the key. */
  texts: number
  trials: number
}

/**
 * Chosen in trials of the model with PI at 4x, with the windows of seed 1 (bench/LOG.md): a window a step, and a learning
 * rate at which copying came back sooner than at twice that. Steps are what two minutes allow; 8x needs more of them.
 */
export const RECIPE: Recipe = {
  ...{ extensions: [{ factor: 4, steps: 2600 }], learningRate: 1e-3, texts: 24, trials: 8 },
}

/** A look in a fifth of the time. */
export const QUICK: Recipe = { ...RECIPE, extensions: [{ factor: 4, steps: 300 }] }

/** Depths of the key that are tried, from the end of the prompt to its beginning. */
const PLACES = 8
/** Points of a perplexity curve. */
const BINS = 32
/** Prompts at a context that is shorter than the window. */
const PROMPTS_PER_TRIAL = 3
/** Both teach to tell a token's neighbours apart again, which interpolation has blurred and retrieval rests on. */
const FINE_TUNING_MIXTURE = { people: [3, 10], passkeys: 0.45, refrains: 0.45, packed: true } as const
const PEOPLE = 8

export interface Measurement {
  method: Method
  /** Perplexity of tokens with `from` to `to` tokens before them, with a 95 % interval over the texts. */
  perplexity: { from: number; to: number; value: number; low: number; high: number }[]
  /** The same in steps of a 32nd of the window, `context` being the middle. */
  curve: { context: number; perplexity: number }[]
  /** Keys found in prompts of `context` tokens, wherever the key is. */
  passkeyByContext: { context: number; trials: number; accuracy: number }[]
  /** Keys found in prompts of the whole window, by the key's distance from the end in tokens. */
  passkeyByDistance: { distance: number; trials: number; accuracy: number }[]
  /** The largest distance up to which at least 20 % are found at every distance tried; 0 for none (the paper's k_max). */
  kmax: number
  /** Mean training loss of the first and last tenth of the steps. */
  training?: { steps: number; tokens: number; firstLoss: number; lastLoss: number }
}

export interface Extension {
  factor: number
  window: number
  methods: Measurement[]
  findings: Finding[]
}

export interface DemoResult {
  version: string
  date: string
  machine: string
  seed: number
  seconds: number
  base: { parameters: number; window: number; trainedTokens: number }
  recipe: Recipe
  extensions: Extension[]
}

export interface DemoOptions {
  /** Of texts, prompts and training windows; the base model is always the same. Default 1. */
  seed?: number
  recipe?: Recipe
  base?: string
  signal?: AbortSignal
  /** `done` goes from 0 to 1 in proportion to the work. */
  onProgress?: (done: number, task: string) => void
}

/** Extends the base model by each factor in four ways and measures all of them on the same texts and prompts. */
export async function runDemo(options: DemoOptions = {}): Promise<DemoResult> {
  const { seed = 1, recipe = RECIPE, base = BASE, signal, onProgress } = options
  const started = performance.now()
  const corpus = new Corpus(await loadTokenizer(base))
  // Two lanes, on half of the cores each, take less time than one after the other on all of them.
  const threads = Math.max(1, Math.floor(availableParallelism() / 2))
  using model = await Llama.load(base, { dtype: 'float32', threads })
  const work = new Work(recipe, model.contextWindow, signal, onProgress)
  const { contextWindow: window, parameterCount: parameters } = model
  const extensions: Extension[] = []
  for (const { factor, steps } of recipe.extensions) {
    const trial = new Trial(corpus, recipe, seed, window, factor, work)
    using interpolated = await Llama.load(base, { dtype: 'float32', rope: { type: 'linear', factor }, threads })
    using direct = await stretched(model, window * factor, threads)
    const methods = await together([
      [() => trial.measure(model, 'extrapolated'), () => trial.tune(direct, steps, 'direct')],
      [() => trial.measure(interpolated, 'interpolated'), () => trial.tune(interpolated, steps, 'tuned')],
    ])
    extensions.push({ factor, window: window * factor, methods, findings: findings(methods, window, window * factor) })
  }
  return {
    version,
    date: new Date().toISOString().slice(0, 10),
    machine: `${cpus()[0]?.model.trim() ?? 'unknown CPU'}, ${availableParallelism()} cores; two lanes of ${model.device.description}`,
    seed,
    seconds: Math.round((performance.now() - started) / 100) / 10,
    base: { parameters, window, trainedTokens: await trainedTokens(base) },
    recipe,
    extensions,
  }
}

/** The same weights and positions in a config that promises a larger window: what direct fine-tuning begins with. */
async function stretched(model: Llama, window: number, threads: number): Promise<Llama> {
  const raw = { ...model.config.raw, max_position_embeddings: window, original_max_position_embeddings: window }
  const copy = await Llama.create(raw, { threads })
  for (const { name } of model.parameters()) await copy.write(name, await model.read(name))
  return copy
}

/** Runs lanes side by side, the tasks of each in turn. Rejects when all have ended: a model at work cannot be disposed of. */
async function together(lanes: readonly (readonly (() => Promise<Measurement>)[])[]): Promise<Measurement[]> {
  const run = async (tasks: readonly (() => Promise<Measurement>)[]): Promise<Measurement[]> => {
    const results: Measurement[] = []
    for (const task of tasks) results.push(await task())
    return results
  }
  const ended = lanes.map(run)
  await Promise.allSettled(ended)
  const results = (await Promise.all(ended)).flat()
  return METHODS.map(({ method }) => results.find((entry) => entry.method === method)!)
}

async function trainedTokens(base: string): Promise<number> {
  const { tokens } = JSON.parse(await readFile(join(base, 'training.json'), 'utf8')) as { tokens: number }
  return tokens
}

/** Ends of the bands in which perplexity is told: window / 2, window ... up to `end`, each twice the one before. */
const doublings = (from: number, end: number): number[] => (from > end ? [] : [from, ...doublings(2 * from, end)])

/** One factor: the texts and prompts that all four models are measured on, and how two of them are trained. */
class Trial {
  private readonly target: number
  private readonly texts: number[][]
  private readonly prompts: { context: number; list: PasskeyPrompt[] }[]
  private readonly placed: PasskeyPrompt[]

  constructor(
    private readonly corpus: Corpus,
    private readonly recipe: Recipe,
    private readonly seed: number,
    private readonly window: number,
    private readonly factor: number,
    private readonly work: Work,
  ) {
    const { texts, trials } = recipe
    const dice = new Dice(seed * 1000 + factor)
    this.target = window * factor
    this.texts = Array.from({ length: texts }, () => corpus.prose(dice, PEOPLE, this.target))
    this.prompts = doublings(window, this.target).map((context) => ({
      context,
      list: Array.from({ length: PROMPTS_PER_TRIAL * trials }, () => corpus.prompt(dice, context)),
    }))
    this.placed = Array.from({ length: PLACES * trials }, (_, n) =>
      corpus.prompt(dice, this.target, Math.floor(n / trials) / (PLACES - 1)),
    )
  }

  async measure(model: Llama, method: Method): Promise<Measurement> {
    const { target, window, recipe, work } = this
    const { short } = METHODS.find((known) => known.method === method)!
    const hooks = (length: number) => ({
      signal: work.signal,
      onRows: (rows: number) => work.add(cost(rows * length, length), `${this.factor}x ${short}: measuring`),
    })
    const nll = await losses(model, this.texts, hooks(target))
    const band = (to: number, from: number) => {
      const values = meanLosses(nll, from, to)
      const [center, margin] = [mean(values), 1.96 * standardError(values)]
      return { from, to, value: Math.exp(center), low: Math.exp(center - margin), high: Math.exp(center + margin) }
    }
    const perplexity = doublings(window / 2, target).map((to) => band(Math.min(to, target - 1), to / 2 + 1))
    const width = target / BINS
    const curve = Array.from({ length: BINS }, (_, n) => ({
      context: (n + 0.5) * width,
      perplexity: band(Math.min((n + 1) * width, target - 1), n * width + 1).value,
    }))
    const passkeyByContext: Measurement['passkeyByContext'] = []
    for (const { context, list } of this.prompts) {
      const found = await retrieves(model, list, hooks(context))
      passkeyByContext.push({ context, trials: found.length, accuracy: mean(found.map(Number)) })
    }
    const found = await retrieves(model, this.placed, hooks(target))
    const passkeyByDistance = Array.from({ length: PLACES }, (_, place) => {
      const range = [place * recipe.trials, (place + 1) * recipe.trials] as const
      const distance = Math.round(mean(this.placed.slice(...range).map((prompt) => prompt.distance)))
      return { distance, trials: recipe.trials, accuracy: mean(found.slice(...range).map(Number)) }
    })
    return { method, perplexity, curve, passkeyByContext, passkeyByDistance, kmax: kmax(passkeyByDistance) }
  }

  /** Fine-tunes a model for so many windows, then measures it. */
  async tune(model: Llama, steps: number, method: Method): Promise<Measurement> {
    const { recipe, target, corpus, work } = this
    const { learningRate } = recipe
    const warmupSteps = Math.min(20, steps)
    const dice = new Dice(this.seed * 1000 + 500 + this.factor)
    const history: number[] = []
    {
      using trainer = new Trainer(model, { steps, learningRate, warmupSteps, schedule: 'cosine', maxGradNorm: 1 })
      for (let step = 1; step <= steps; step++) {
        work.signal?.throwIfAborted()
        const { loss } = await trainer.step([corpus.window(dice, target, FINE_TUNING_MIXTURE)])
        history.push(loss)
        work.add(TRAINING * cost(target, target), `${this.factor}x fine-tuning, step ${step} of ${steps}`)
      }
    }
    const tenth = Math.ceil(steps / 10)
    const [firstLoss, lastLoss] = [mean(history.slice(0, tenth)), mean(history.slice(-tenth))]
    const training = { steps, tokens: steps * target, firstLoss, lastLoss }
    return { ...(await this.measure(model, method)), training }
  }
}

/** What tokens cost in rows of a length, in forward passes of short rows; a training step is three of them. */
const cost = (tokens: number, length: number): number => tokens * (1 + length / 2048)
const TRAINING = 3

/** How much of the whole is done. */
class Work {
  private readonly total: number
  private done = 0

  constructor(
    { extensions, texts, trials }: Recipe,
    window: number,
    readonly signal: AbortSignal | undefined,
    private readonly onProgress: DemoOptions['onProgress'],
  ) {
    this.total = 0
    for (const { factor, steps } of extensions) {
      const target = factor * window
      const shorter = doublings(window, target).map((context) => cost(PROMPTS_PER_TRIAL * trials * context, context))
      const measured = cost((texts + PLACES * trials) * target, target) + shorter.reduce((a, b) => a + b)
      this.total += METHODS.length * measured + 2 * TRAINING * cost(steps * target, target)
    }
  }

  add(units: number, task: string): void {
    this.done += units
    this.onProgress?.(Math.min(1, this.done / this.total), task)
  }
}
