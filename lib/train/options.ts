import { didYouMean, quote } from '../errors.js'
import { type LoraOptions, type LoraSettings, readLora } from '../model/lora.js'
import type { Device } from '../runtime/device.js'
import { MEMORY_DEFAULTS, type MemoryOptions, type MemorySettings } from './memory.js'
import type { ExampleFields } from '../files/text.js'
import type { TokenProgress } from './data.js'
import type { Packing } from './data.js'
import type { PoseOptions, PoseSettings } from './pose.js'
import { type Schedule, schedules } from './schedule.js'
import type { Trainer } from './trainer.js'

/**
 * What `onProgress` is told about. Before the first step, `{ stage: 'hash' | 'tokenize', bytes, totalBytes }` with the
 * bytes of the data files (`tokenize` only where the cache has nothing) and `resume` with the checkpoint's path and
 * step; later `checkpoint` with the path and step of each one written, and `warning` with what is unusual.
 *
 * @category Training
 */
export type TrainerProgress =
  | TokenProgress
  | {
      /** Written, or taken up. */
      stage: 'checkpoint' | 'resume'
      /** The checkpoint's folder. */
      path: string
      /** Steps done in it. */
      step: number
    }
  | {
      /** Also kept in `warnings`. */
      stage: 'warning'
      /** One line for people. */
      message: string
    }

/**
 * Options of {@link Trainer}. The defaults are the paper's recipe (arXiv 2306.15595, section 3.1) but for the batch,
 * which is 64 or 128 windows there: batchSize x accumulate.
 *
 * @category Training
 */
export interface TrainerOptions {
  /** Files or folders of documents (.txt, .jsonl, .ndjson, .parquet); needed by `run`. */
  data?: string | readonly string[]
  /** Tokens in a window; needed by `run`. At most the model's context window. */
  context?: number
  /** Steps of the whole run, those before a resume included; default 1000. */
  steps?: number
  /** Windows in a micro-batch; default 1. */
  batchSize?: number
  /** Micro-batches in a step, whose gradients are added up; default 1. */
  accumulate?: number
  /** Peak of the schedule; default 2e-5. */
  learningRate?: number
  /** Decay of AdamW's two moments (arXiv 1711.05101), each in [0, 1); default [0.9, 0.95]. */
  betas?: readonly [number, number]
  /** Added to the root of the second moment; default 1e-8. */
  eps?: number
  /** Decoupled weight decay of every parameter; default 0. */
  weightDecay?: number
  /** Gradients with a larger 2-norm are scaled down to it; default 0: none are. */
  maxGradNorm?: number
  /** Steps of linear rise from a tenth of the peak; default 20. */
  warmupSteps?: number
  /** After the warm-up: 'constant' (default), or a 'linear' or 'cosine' fall to `finalFraction` at step `steps`. */
  schedule?: Schedule
  /** What 'linear' and 'cosine' leave of the peak at the end; default 0.1. */
  finalFraction?: number
  /** Decides the order of the windows, the validation split, and rounding by chance; default 0. */
  seed?: number
  /** Trains an adapter of low rank, and leaves the model's weights as they are; `{}` for the defaults. */
  lora?: LoraOptions
  /**
   * What a step keeps in memory, and in which form; default: everything, in full. 'auto': the first of the sets that
   * {@link fit} finds for the device among those that compute the same.
   */
  memory?: MemoryOptions | 'auto'
  /** 'concat' (default): documents follow each other in a window. 'documents': they do not see each other. */
  packing?: Packing
  /** Windows are parts of longer texts, with the positions that they have there: PoSE. */
  pose?: PoseOptions
  /** End-of-sequence token after each document; default true where the tokenizer or the config names one. */
  appendEos?: boolean
  /** Field or column that holds the text; default 'text'. */
  field?: string
  /**
   * Trains on examples, in place of texts: the names of the fields of a prompt and of its completion (.jsonl, .parquet). Only
   * the completion, and the end-of-sequence token behind it, are learned. A window holds whole examples, as many as follow
   * each other and fit, and is filled up; those longer than `context` are left out, with a warning.
   */
  fields?: ExampleFields
  /** Folder for tokenised data; default $XDG_CACHE_HOME/ropewalk/tokens or ~/.cache/ropewalk/tokens. */
  cacheDir?: string
  /** A fraction (below 1) or number of windows to keep out of training, or files of their own. Default: none. */
  validation?: number | string | readonly string[]
  /** Steps between evaluations; default 100 where there is a `validation` or `evaluate`. */
  evalEvery?: number
  /** Called at evaluations; its figures go into the result's `validation`. It may use the model, not the trainer. */
  evaluate?: (trainer: Trainer) => Promise<Record<string, number>>
  /** Folder of checkpoints and metrics.jsonl; one run at a time. Default: nothing is written. */
  output?: string
  /** Steps between checkpoints; default 100. The end of a run and an abort always save. */
  saveEvery?: number
  /** Healthy checkpoints that stay, at least 2; default 2. */
  keep?: number
  /** Updates skipped in a row, for a loss or gradient that is not finite, after which the run stops; default 10. */
  maxSkipped?: number
  /**
   * Goes on exactly where a checkpoint was written. true: the newest healthy one in `output`, or from the start where
   * there is none. A path: that checkpoint, or the newest healthy one in that folder.
   */
  resume?: boolean | string
  /** Denominator of `mfu`, in FLOP/s; default: what a large matrix product reaches here, measured before the run. */
  peakFlops?: number
  /** Called with news between steps. */
  onProgress?: (progress: TrainerProgress) => void
}

/** Options with their defaults. */
export interface Settings {
  data: readonly string[] | undefined
  context: number | undefined
  steps: number
  batchSize: number
  accumulate: number
  learningRate: number
  betas: readonly [number, number]
  eps: number
  weightDecay: number
  maxGradNorm: number
  warmupSteps: number
  schedule: Schedule
  finalFraction: number
  seed: number
  lora: LoraSettings | undefined
  memory: MemorySettings
  /** Whether `memory` is still to be found. */
  autoMemory: boolean
  packing: Packing
  pose: PoseSettings | undefined
  appendEos: boolean | undefined
  field: string
  fields: ExampleFields | undefined
  cacheDir: string | undefined
  validation: number | readonly string[] | undefined
  evalEvery: number
  evaluate: TrainerOptions['evaluate']
  output: string | undefined
  saveEvery: number
  keep: number
  maxSkipped: number
  resume: boolean | string
  peakFlops: number | undefined
  onProgress: (progress: TrainerProgress) => void
}

type Check = (value: unknown, name: string) => void

/** A number in a range; `what` says which numbers. */
function number(what: string, holds: (value: number) => boolean): Check {
  return (value, name) => {
    if (typeof value !== 'number') throw new TypeError(`${name} is ${quote(value)}, but must be a number`)
    if (!holds(value)) throw new RangeError(`${name} is ${value}, but must be ${what}`)
  }
}

const whole = (least: number): Check =>
  number(`a whole number >= ${least}`, (value) => Number.isSafeInteger(value) && value >= least)
const atLeastZero = number('a finite number >= 0', (value) => value >= 0 && value < Infinity)
const aboveZero = number('a finite number > 0', (value) => value > 0 && value < Infinity)
const beta = number('in [0, 1)', (value) => value >= 0 && value < 1)

const text: Check = (value, name) => {
  if (typeof value !== 'string') throw new TypeError(`${name} is ${quote(value)}, but must be a string`)
  if (value === '') throw new RangeError(`${name} is an empty string`)
}

const flag: Check = (value, name) => {
  if (typeof value !== 'boolean') throw new TypeError(`${name} is ${quote(value)}, but must be true or false`)
}

const callback: Check = (value, name) => {
  if (typeof value !== 'function') throw new TypeError(`${name} is ${quote(value)}, but must be a function`)
}

const paths: Check = (value, name) => {
  if (!Array.isArray(value)) return text(value, name)
  if (value.length === 0) throw new RangeError(`${name} is an empty list`)
  value.forEach((path, i) => text(path, `${name}[${i}]`))
}

const oneOf =
  (...known: readonly string[]): Check =>
  (value, name) => {
    text(value, name)
    if (known.includes(value as string)) return
    throw new RangeError(
      `${name} is ${quote(value)}, but must be one of ${known.join(', ')}${didYouMean(value as string, known)}`,
    )
  }

const CHECKS: Record<keyof TrainerOptions, Check> = {
  data: paths,
  context: whole(2),
  steps: whole(1),
  batchSize: whole(1),
  accumulate: whole(1),
  learningRate: atLeastZero,
  betas: (value, name) => {
    if (!Array.isArray(value) || value.length !== 2)
      throw new TypeError(`${name} is ${quote(value)}, but must be two numbers`)
    value.forEach((entry, i) => beta(entry, `${name}[${i}]`))
  },
  eps: aboveZero,
  weightDecay: atLeastZero,
  maxGradNorm: atLeastZero,
  warmupSteps: whole(0),
  schedule: oneOf(...schedules),
  finalFraction: number('in [0, 1]', (value) => value >= 0 && value <= 1),
  seed: whole(0),
  memory: (value, name) => {
    if (value === 'auto') return
    if (typeof value !== 'object' || value === null)
      throw new TypeError(`${name} is ${quote(value)}, but must be an object or 'auto'`)
    checkKnown(value, MEMORY_CHECKS, `${name}.`)
  },
  lora: (value, name) => readLora(value as LoraOptions, name),
  packing: oneOf('concat', 'documents'),
  pose: (value, name) => {
    if (typeof value !== 'object' || value === null)
      throw new TypeError(`${name} is ${quote(value)}, but must be an object`)
    checkKnown(value, { length: whole(2), chunks: whole(2) }, `${name}.`)
    if ((value as Partial<PoseOptions>).length === undefined) throw new TypeError(`${name}.length is missing`)
  },
  appendEos: flag,
  field: text,
  fields: (value, name) => {
    if (typeof value !== 'object' || value === null)
      throw new TypeError(`${name} is ${quote(value)}, but must be an object { prompt, completion }`)
    checkKnown(value, { prompt: text, completion: text }, `${name}.`)
    for (const part of ['prompt', 'completion'] as const)
      if ((value as Partial<ExampleFields>)[part] === undefined) throw new TypeError(`${name}.${part} is missing`)
  },
  cacheDir: text,
  validation: (value, name) => {
    if (typeof value !== 'number') return paths(value, name)
    if (value > 0 && (value < 1 || Number.isSafeInteger(value))) return
    throw new RangeError(`${name} is ${value}, but must be a fraction in (0, 1), a whole number of windows, or files`)
  },
  evalEvery: whole(1),
  evaluate: callback,
  output: text,
  saveEvery: whole(1),
  keep: number('a whole number >= 2', (value) => value >= 2 && (value === Infinity || Number.isSafeInteger(value))),
  maxSkipped: whole(1),
  resume: (value, name) => (typeof value === 'string' ? text(value, name) : flag(value, name)),
  peakFlops: aboveZero,
  onProgress: callback,
}

const MEMORY_CHECKS: Record<keyof MemoryOptions, Check> = {
  checkpointLayers: whole(0),
  keepAttention: flag,
  offloadCheckpoints: flag,
  mlpRows: whole(0),
  attentionGroups: whole(1),
  logitsRows: whole(0),
  gradients: oneOf('float32', 'bfloat16', 'fused'),
  masters: oneOf('float32', 'remainder', 'stochastic'),
  moments: oneOf('float32', 'bfloat16', '8bit'),
  offloadOptimizer: flag,
}

/** Throws where an option is unknown or not what it must be. */
function checkKnown(options: object, checks: Record<string, Check>, prefix = ''): void {
  for (const [name, value] of Object.entries(options)) {
    if (!Object.hasOwn(checks, name)) {
      const known = Object.keys(checks)
      throw new TypeError(
        `unknown option ${quote(prefix + name)}${didYouMean(name, known) || `; known are ${known.join(', ')}`}`,
      )
    }
    if (value !== undefined) checks[name]!(value, prefix + name)
  }
}

/** Throws where windows of PoSE cannot be made. */
function checkPose({ length, chunks }: PoseSettings, { context, packing, validation, fields }: TrainerOptions): void {
  if (fields)
    throw new RangeError('pose takes parts of longer texts, but fields makes whole examples: give one of them')
  if (context !== undefined && length < context) {
    throw new RangeError(`pose.length is ${length}, but context is ${context}: positions are to be spread, not pressed`)
  }
  if (context !== undefined && chunks > context) {
    throw new RangeError(`pose.chunks is ${chunks}, but context is ${context}: a chunk has at least one token`)
  }
  if (packing === 'documents') {
    throw new RangeError(
      "packing is 'documents', whose positions restart with each, but pose spreads those of a window: use 'concat'",
    )
  }
  if (typeof validation === 'number') {
    throw new RangeError(
      `validation is ${validation}, but with pose a training window takes tokens from further on, which may be a ` +
        "validation window's: give validation files of their own",
    )
  }
}

/** Throws where options exclude each other. */
function checkMemory(memory: MemorySettings, accumulate: number): void {
  if (memory.gradients === 'fused' && accumulate > 1) {
    throw new RangeError(
      `memory.gradients is "fused", but accumulate is ${accumulate}: gradients of several micro-batches have to be held ` +
        "until the update. Use memory.gradients 'bfloat16' or 'float32', or accumulate 1 with a larger batchSize",
    )
  }
  for (const name of ['keepAttention', 'offloadCheckpoints'] as const) {
    if (memory[name] && memory.checkpointLayers === 0) {
      throw new RangeError(
        `memory.${name} is set, but memory.checkpointLayers is 0: there are no checkpoints. Set it to 1`,
      )
    }
  }
}

/** Throws where weights would be trained that are quantised. */
export function requirePlain(quantization: string | undefined, { lora }: Pick<Settings, 'lora'>): void {
  if (quantization === undefined || lora) return
  throw new RangeError(
    `the weights are quantised (${quantization}), too coarse for updates: train an adapter beside them (lora: {}), or ` +
      'leave quantize away to train all weights',
  )
}

/** Throws on a CPU that keeps activations as a GPU does: what it trains is held to float32. */
export function requireExact(device: Device): void {
  if (device.gpu || device.activationsFor('bf16') === 'f32') return
  throw new RangeError(
    'the model was loaded with activations in bfloat16, which on a CPU are for evaluation and generation: load it ' +
      'without the option `activations` to train it',
  )
}

const list = (value: string | readonly string[] | undefined): readonly string[] | undefined =>
  typeof value === 'string' ? [value] : value && [...value]

/** An object without what is undefined in it. */
const given = <T extends object>(options: T | undefined): Partial<T> =>
  Object.fromEntries(Object.entries(options ?? {}).filter(([, value]) => value !== undefined)) as Partial<T>

/** Checks options and fills in defaults. Throws TypeError or RangeError that names the option, its value and the rule. */
export function readOptions(options: TrainerOptions): Settings {
  if (typeof options !== 'object' || options === null)
    throw new TypeError(`options are ${quote(options)}, but must be an object`)
  checkKnown(options, CHECKS)
  const { validation, evaluate, output, resume = false } = options
  if (options.evalEvery !== undefined && validation === undefined && evaluate === undefined) {
    throw new TypeError('evalEvery is given, but neither validation nor evaluate: there is nothing to evaluate')
  }
  if (resume === true && output === undefined) {
    throw new TypeError('resume is true, but there is no output folder to look in: set output, or give a path')
  }
  if (options.fields && options.field !== undefined) {
    throw new TypeError(
      `field is ${quote(options.field)}, but fields is given as well: a document has the one or the other`,
    )
  }
  const autoMemory = options.memory === 'auto'
  const memory = { ...MEMORY_DEFAULTS, ...(options.memory !== 'auto' && given(options.memory)) }
  checkMemory(memory, options.accumulate ?? 1)
  const pose = options.pose && { chunks: 2, ...given(options.pose), length: options.pose.length }
  if (pose) checkPose(pose, options)
  return {
    data: list(options.data),
    context: options.context,
    steps: options.steps ?? 1000,
    batchSize: options.batchSize ?? 1,
    accumulate: options.accumulate ?? 1,
    learningRate: options.learningRate ?? 2e-5,
    betas: options.betas ? [...options.betas] : [0.9, 0.95],
    eps: options.eps ?? 1e-8,
    weightDecay: options.weightDecay ?? 0,
    maxGradNorm: options.maxGradNorm ?? 0,
    warmupSteps: options.warmupSteps ?? 20,
    schedule: options.schedule ?? 'constant',
    finalFraction: options.finalFraction ?? 0.1,
    seed: options.seed ?? 0,
    lora: options.lora && readLora(options.lora),
    memory,
    autoMemory,
    packing: options.packing ?? 'concat',
    pose,
    appendEos: options.appendEos,
    field: options.field ?? 'text',
    fields: options.fields && { prompt: options.fields.prompt, completion: options.fields.completion },
    cacheDir: options.cacheDir,
    validation: typeof validation === 'number' ? validation : list(validation),
    evalEvery: options.evalEvery ?? 100,
    evaluate,
    output,
    saveEvery: options.saveEvery ?? 100,
    keep: options.keep ?? 2,
    maxSkipped: options.maxSkipped ?? 10,
    resume,
    peakFlops: options.peakFlops,
    onProgress: options.onProgress ?? (() => undefined),
  }
}
