import { didYouMean, quote } from '../errors.js'
import { cast, matmulNn, scale as scaled } from '../runtime/ops.gen.js'
import { Recorder } from '../runtime/recorder.js'
import type { Tensor } from '../runtime/tensor.js'
import { type LlamaConfig, parameterShapes } from './config.js'
import { uniform } from './generate.js'
import { type Parameter, Parameters, type Segment } from './parameters.js'

/** Matrices of a block that can have an adapter, in the order of their use. */
export const loraTargets: readonly LoraTarget[] = [
  'q_proj',
  'k_proj',
  'v_proj',
  'o_proj',
  'gate_proj',
  'up_proj',
  'down_proj',
]
/** Parts of the base that can be trained beside adapters. */
export const loraParts = ['embed', 'norm', 'head'] as const

/**
 * One of the matrices of every layer, by the end of its name.
 *
 * @category Training
 */
export type LoraTarget = 'q_proj' | 'k_proj' | 'v_proj' | 'o_proj' | 'gate_proj' | 'up_proj' | 'down_proj'

/**
 * LoRA (arXiv 2106.09685): of a matrix W (O,I) only a change of low rank is trained, W + (alpha / rank) B A, with A
 * (rank,I) and B (O,rank) in float32; B starts at 0 and A as in PEFT. There is no dropout.
 *
 * @category Training
 */
export interface LoraOptions {
  /** Default 8. */
  rank?: number
  /** Default 16; the change is scaled by alpha / rank. */
  alpha?: number
  /** Default q_proj, k_proj, v_proj, o_proj. */
  targets?: readonly LoraTarget[]
  /**
   * What else is trained, whole: 'embed' (the embedding, also the output matrix where they are tied), 'norm' (all norms),
   * 'head' (lm_head). A longer context needs the first two (LongLoRA, arXiv 2309.12307). Default: nothing.
   */
  alsoTrain?: readonly (typeof loraParts)[number][]
}

export type LoraSettings = Required<LoraOptions>

/** Options with their defaults, in one order; throws where they are not what they must be. */
export function readLora(options: LoraOptions, name = 'lora'): LoraSettings {
  if (typeof options !== 'object' || options === null || Array.isArray(options)) {
    throw new TypeError(`${name} is ${quote(options)}, but must be an object`)
  }
  const known = ['rank', 'alpha', 'targets', 'alsoTrain']
  for (const key of Object.keys(options)) {
    if (known.includes(key)) continue
    throw new TypeError(
      `unknown option ${quote(`${name}.${key}`)}${didYouMean(key, known) || `; known are ${known.join(', ')}`}`,
    )
  }
  const { rank = 8, alpha = 16, targets = loraTargets.slice(0, 4), alsoTrain = [] } = options
  for (const [key, value] of Object.entries({ rank, alpha })) {
    if (typeof value !== 'number') throw new TypeError(`${name}.${key} is ${quote(value)}, but must be a number`)
  }
  if (!Number.isSafeInteger(rank) || rank < 1) {
    throw new RangeError(`${name}.rank is ${rank}, but must be a whole number >= 1`)
  }
  if (!(alpha > 0 && alpha < Infinity))
    throw new RangeError(`${name}.alpha is ${alpha}, but must be a finite number > 0`)
  return {
    rank,
    alpha,
    targets: choose(targets, loraTargets, `${name}.targets`, 1),
    alsoTrain: choose(alsoTrain, loraParts, `${name}.alsoTrain`, 0),
  }
}

/** The given ones in the order of the known ones. */
function choose<T extends string>(given: readonly T[], known: readonly T[], name: string, least: number): T[] {
  if (!Array.isArray(given)) throw new TypeError(`${name} is ${quote(given)}, but must be a list`)
  if (given.length < least) throw new RangeError(`${name} is an empty list: give one of ${known.join(', ')}`)
  for (const one of given as unknown[]) {
    if (known.includes(one as T)) continue
    const hint = typeof one === 'string' ? didYouMean(one, known) : ''
    throw new RangeError(`${name} has ${quote(one)}${hint || `, but known are ${known.join(', ')}`}`)
  }
  return known.filter((one) => given.includes(one))
}

/** Whether a parameter of the base is one of those that `alsoTrain` names. */
export function isTrained(name: string, dims: readonly number[], alsoTrain: LoraSettings['alsoTrain']): boolean {
  const part = dims.length < 2 ? 'norm' : name === 'lm_head.weight' ? 'head' : name.includes('embed') && 'embed'
  return part !== false && alsoTrain.includes(part)
}

const targetOf = (name: string): string | undefined => /\.(\w+_proj)\.weight$/.exec(name)?.[1]

/** Throws RangeError where a model cannot have such an adapter. */
export function checkLora(config: LlamaConfig, { rank, targets, alsoTrain }: LoraSettings): void {
  for (const { name, dims } of parameterShapes(config)) {
    const most = Math.min(...dims)
    if (!targets.some((target) => target === targetOf(name)) || rank <= most) continue
    throw new RangeError(
      `lora.rank is ${rank}, but ${name} is (${dims.join(',')}): a product of rank above ${most} is no smaller than that`,
    )
  }
  if (config.tied && alsoTrain.includes('head')) {
    throw new RangeError("lora.alsoTrain has 'head', but this model's output matrix is its embedding: use 'embed'")
  }
}

/** The adapter of a model: its matrices in one buffer of float32, hung on the base's parameters. */
export class Lora {
  readonly parameters: Parameters
  /** Of a folder with the adapter, but for headers. */
  readonly savedBytes: number
  private readonly adapted: readonly Parameter[]

  /** Throws what `checkLora` throws. All of its values are garbage until `initialize`, or until they are read. */
  constructor(
    private readonly base: Parameters,
    config: LlamaConfig,
    readonly settings: LoraSettings,
    /** PEFT's use_rslora: scaled by alpha / sqrt(rank). */
    readonly rankStabilized = false,
  ) {
    checkLora(config, settings)
    const { rank, targets } = settings
    this.adapted = [...base].filter(({ name }) => targets.some((target) => target === targetOf(name)))
    const shapes = this.adapted.flatMap(({ name, value }) => {
      const [rows, columns] = value.dims as [number, number]
      return [
        { name: adapterName(name, 'A'), dims: [rank, columns] },
        { name: adapterName(name, 'B'), dims: [rows, rank] },
      ]
    })
    this.parameters = new Parameters(base.device, 'f32', shapes)
    for (const parameter of this.adapted) {
      const [a, b] = (['A', 'B'] as const).map((side) => this.parameters.get(adapterName(parameter.name, side)))
      parameter.adapter = { a: a!, b: b!, scale: this.scale }
    }
    base.version++
    const { tied } = config
    // PEFT wants a tied embedding twice.
    const copies = ({ dims }: Tensor): number => (tied && dims.length > 1 ? 2 : 1)
    const ofBase = this.trained.reduce((sum, { value }) => sum + value.bytes * copies(value), 0)
    this.savedBytes = ofBase + this.parameters.buffer.bytes
  }

  get scale(): number {
    const { rank, alpha } = this.settings
    return alpha / (this.rankStabilized ? Math.sqrt(rank) : rank)
  }

  /** Parameters of the base that are trained, saved and loaded with the adapter. */
  get trained(): Parameter[] {
    return [...this.base].filter(({ name, value }) => isTrained(name, value.dims, this.settings.alsoTrain))
  }

  /** What training changes, in the layouts that it lies in. */
  segments(): Segment[] {
    const trained = new Set(this.trained)
    const ofBase = this.base.segments().filter(({ parameters }) => parameters.every((one) => trained.has(one)))
    return [...ofBase, ...this.parameters.segments()]
  }

  /** As PEFT does: A uniform in +-1 / sqrt(I), which it calls kaiming_uniform_ with a = sqrt(5); B zeros. */
  async initialize(seed: number): Promise<void> {
    const random = uniform(seed)
    for (const { name, value } of this.parameters) {
      const data = new Float32Array(value.size)
      if (name.includes('lora_A')) {
        const bound = 1 / Math.sqrt(value.dims[1]!)
        for (let i = 0; i < data.length; i++) data[i] = bound * (2 * random() - 1)
      }
      await this.base.device.upload(value, data)
    }
    await this.parameters.clearPadding()
  }

  /** Adds the adapter to the base, whose weights must have memory of their own: in float32, rounded once. */
  async merge(): Promise<void> {
    const recorder = new Recorder(this.base.device, 'merge')
    for (const { name, value, adapter } of this.adapted) {
      const { a, b, scale } = adapter!
      const { y: scaledB } = scaled(recorder, { x: b.value, a: scale, y: recorder.scratch('f32', b.value.dims, name) })
      const inPlace = value.dtype === 'f32'
      const sum = inPlace ? value : recorder.scratch('f32', value.dims, name)
      if (!inPlace) cast(recorder, { x: value, y: sum })
      matmulNn(recorder, { a: scaledB, b: a.value, add: sum, c: sum })
      if (!inPlace) cast(recorder, { x: sum, y: value })
    }
    const plan = recorder.plan()
    try {
      await plan.run()
    } finally {
      plan.dispose()
    }
  }

  /** Takes it off the base, and frees it. */
  dispose(): void {
    for (const parameter of this.adapted) parameter.adapter = undefined
    this.base.version++
    this.parameters.dispose()
  }
}

/** model.layers.0.self_attn.q_proj.weight -> model.layers.0.self_attn.q_proj.lora_A.weight */
export const adapterName = (name: string, side: 'A' | 'B'): string => name.replace(/weight$/, `lora_${side}.weight`)
