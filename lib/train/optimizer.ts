import { PADDING, type Parameter, type Parameters, type Segment } from '../model/parameters.js'
import type { Gradients } from '../model/tape.js'
import type { Buffer, Device } from '../runtime/device.js'
import { adamw, adamw8bit, add, cast, clip, fill, sumSquares } from '../runtime/ops.gen.js'
import type { Plan } from '../runtime/plan.js'
import { Recorder } from '../runtime/recorder.js'
import { DTYPE_BYTES, type PlainDType, setPurpose, Tensor, tensorBytes } from '../runtime/tensor.js'
import { MEMORY_DEFAULTS, type MemorySettings } from './memory.js'
import { type SegmentStates, StateLayout, type StateName } from './states.js'

export interface AdamWSettings {
  betas: readonly [number, number]
  eps: number
  /** Decoupled, on every parameter. */
  weightDecay: number
  /** Gradients with a larger norm are scaled down to it; 0 for none. */
  maxGradNorm: number
  /** Of stochastic rounding; default 0. */
  seed?: number
  memory?: MemorySettings
}

export interface Update {
  /** What the passes left in `loss`. */
  loss: number
  /** 2-norm of all gradients, before clipping. */
  gradNorm: number
  /** False where the loss or the norm is not finite: nothing was changed, or with fused updates not all. */
  applied: boolean
}

/** Floats of the scalar buffer: `hyper` (8, csrc/ops.def: clip), the loss, the sum of squares, that of a segment. */
const SCALARS = 11
const LOSS_AT = 8
const SQUARES_AT = 9
const SEGMENT_SQUARES_AT = 10

/**
 * AdamW (arXiv 1711.05101, one group over all parameters) on the device: gradients, moments and what bfloat16 weights
 * are updated in (see MemoryOptions), in the layout of the weights. Of these it knows the segments that are trained. Whether an update may be applied is decided on the
 * device, so that a NaN reaches neither weights nor moments.
 *
 * A step is `begin`, the passes with `gradients`, `end`.
 */
export class AdamW {
  readonly gradients: Gradients
  /** (1) f32: the passes of a step leave their loss here. */
  readonly loss: Tensor
  /** Updates that were applied: t of the bias corrections. */
  applied = 0

  private readonly memory: MemorySettings
  private readonly device: Device
  /** Where each layout begins among all elements: rounding by chance draws another number for each of them. */
  private readonly starts = new Map<Parameters, number>()
  private readonly segmentOf = new Map<Parameter, Segment>()
  private readonly layout: StateLayout
  private readonly states: Buffer
  private readonly scalars: Buffer
  /** Of a segment each; with fused updates of the vectors only. */
  private readonly buffers = new Map<Segment, Tensor>()
  private readonly plan: Plan | undefined
  private readonly owned: Buffer[] = []

  constructor(
    private readonly segments: readonly Segment[],
    private readonly settings: AdamWSettings,
    onRefused: (message: string) => void = () => undefined,
  ) {
    const device = (this.device = segments[0]!.of.device)
    this.memory = settings.memory ?? MEMORY_DEFAULTS
    let elements = 0
    for (const segment of segments) {
      for (const one of segment.parameters) this.segmentOf.set(one, segment)
      if (this.starts.has(segment.of)) continue
      this.starts.set(segment.of, elements)
      elements += segment.of.elements
    }
    this.layout = new StateLayout(segments, this.memory)
    try {
      this.states = this.memory.offloadOptimizer
        ? this.own(device.allocHost(this.layout.bytes, 'optimizer states', onRefused))
        : this.own(device.alloc(this.layout.bytes, 'optimizer states'))
      this.scalars = this.own(device.alloc(SCALARS * 4, 'training scalars'))
      this.allocGradients()
    } catch (error) {
      for (const buffer of this.owned) buffer.dispose()
      throw error
    }
    this.loss = this.scalar(LOSS_AT)
    this.gradients = this.fused ? this.fusedGradients() : { of: (parameter) => this.gradientOf(parameter) }
    if (!this.fused) this.plan = this.record()
  }

  get fused(): boolean {
    return this.memory.gradients === 'fused'
  }

  /** Bytes of the gradients that are held from the backward pass to the update. */
  get gradientBytes(): number {
    return [...this.buffers.values()].reduce((sum, { bytes }) => sum + bytes, 0)
  }

  /** Bytes of moments, masters and scalars, on the device or the host. */
  get stateBytes(): number {
    return this.states.bytes + this.scalars.bytes
  }

  /** Those of them that are in the host's memory. */
  get hostBytes(): number {
    return this.states.host ? this.states.bytes : 0
  }

  /** Floating-point operations of an update; those of a fused one are in the pass. */
  get flops(): number {
    return this.plan?.flops ?? 0
  }

  /** Bytes that its operations read and write, as `flops`. */
  get traffic(): number {
    return this.plan?.traffic ?? 0
  }

  /** Bytes that an update, fused or not, reads and writes: weights and states once each, gradients read for their norm too. */
  get updateTraffic(): { device: number; host: number } {
    const { segments, states, layout } = this
    let device = 0
    for (const one of segments) {
      device += 2 * one.elements * (DTYPE_BYTES[one.of.dtype] + DTYPE_BYTES[this.gradientDtype(one)])
    }
    return states.host ? { device, host: 2 * layout.bytes } : { device: device + 2 * layout.bytes, host: 0 }
  }

  /** The states of every parameter, for checkpoints: 'm.model.embed_tokens.weight', and so on. */
  *entries(): IterableIterator<{ name: string; state: StateName; tensor: Tensor }> {
    for (const segment of this.segments) {
      for (const parameter of segment.parameters) {
        const states = this.layout.ofParameter(segment, parameter, this.states)
        for (const [state, tensor] of states) yield { name: `${state}.${parameter.name}`, state, tensor }
      }
    }
  }

  /** The state before the first update: moments 0, masters as the weights are now. */
  async reset(): Promise<void> {
    const recorder = new Recorder(this.device, 'optimizer start')
    // All bytes 0 is the start of every kind of moment. Of gradients too: the padding between parameters is never
    // written, and it counts in the norm.
    const all = new Tensor(this.states, 0, 'f32', [this.states.bytes / 4])
    for (const y of [all, ...this.buffers.values()]) fill(recorder, { y, value: 0 })
    for (const segment of this.segments) {
      const { master } = this.layout.of(segment, this.states)
      if (master) cast(recorder, { x: weightsOf(segment), y: master })
    }
    const plan = recorder.plan()
    try {
      await plan.run()
    } finally {
      plan.dispose()
    }
    this.applied = 0
  }

  /** Before the passes of a step. */
  async begin(learningRate: number): Promise<void> {
    const [beta1, beta2] = this.settings.betas
    const t = this.applied + 1
    const scalars = new Float32Array(SCALARS)
    scalars.set([learningRate, 1 - beta1 ** t, 1 - beta2 ** t, this.settings.maxGradNorm, 0, 0, 0, t])
    await this.device.upload(new Tensor(this.scalars, 0, 'f32', [SCALARS]), scalars)
  }

  /** After them: applies the gradients, unless they or the loss are not finite. */
  async end(): Promise<Update> {
    await this.plan?.run()
    const scalars = await this.device.downloadFloats(new Tensor(this.scalars, 0, 'f32', [SCALARS]))
    const loss = scalars[LOSS_AT]!
    const gradNorm = Math.sqrt(scalars[SQUARES_AT]!)
    const applied = this.fused ? Number.isFinite(loss) && Number.isFinite(gradNorm) : scalars[6] === 1
    if (applied) this.applied++
    return { loss, gradNorm, applied }
  }

  dispose(): void {
    this.plan?.dispose()
    for (const buffer of this.owned) buffer.dispose()
  }

  private own(buffer: Buffer): Buffer {
    this.owned.push(buffer)
    return buffer
  }

  /** One block for all, or with fused updates for the vectors, whose gradients come from all layers. */
  private allocGradients(): void {
    const held = this.segments.filter(({ name }) => !this.fused || name === 'vectors')
    const dtypes = held.map((segment) => this.gradientDtype(segment))
    const bytes = held.map(({ elements }, i) => elements * DTYPE_BYTES[dtypes[i]!])
    const total = bytes.reduce((sum, one) => sum + one, 0)
    if (total === 0) return
    const buffer = this.own(this.device.alloc(total, 'gradients'))
    let at = 0
    held.forEach((segment, i) => {
      this.buffers.set(segment, new Tensor(buffer, at, dtypes[i]!, [segment.elements]))
      at += bytes[i]!
    })
  }

  /** The output matrix's gradient is added up over parts of the rows, and kept in f32; vectors are small. */
  private gradientDtype({ name }: Segment): PlainDType {
    const narrow = this.memory.gradients === 'bfloat16' && /\.layers\.\d+$/.test(name)
    return narrow ? 'bf16' : 'f32'
  }

  private gradientOf(parameter: Parameter, whole?: Tensor): Tensor | undefined {
    const segment = this.segmentOf.get(parameter)
    const gradient = segment && (whole ?? this.buffers.get(segment))
    if (!gradient) return undefined
    const start = segment.of.offset(parameter.name) - segment.first
    const offset = gradient.offset + tensorBytes(gradient.dtype, start)
    return new Tensor(gradient.storage, offset, gradient.dtype, parameter.value.dims)
  }

  /** Gradients that live in the pass's own memory, from their first contribution to their segment's update. */
  private fusedGradients(): Gradients {
    const alive = new Map<Segment, Tensor>()
    let recording: Recorder | undefined
    const gradientsOf = (segment: Segment): Tensor => {
      let gradient = this.buffers.get(segment) ?? alive.get(segment)
      if (!gradient) {
        gradient = recording!.scratch('f32', [segment.elements], `gradients of ${segment.name}`)
        setPurpose(gradient, 'gradient')
        // zeros between the parameters
        if (segment.parameters.some(({ value }) => value.size % PADDING !== 0)) {
          fill(recording!, { y: gradient, value: 0 })
        }
        alive.set(segment, gradient)
      }
      return gradient
    }
    return {
      begin: (recorder) => {
        recording = recorder
        alive.clear()
      },
      of: (parameter) => {
        const segment = this.segmentOf.get(parameter)
        return segment && this.gradientOf(parameter, gradientsOf(segment))
      },
      complete: (parameters, recorder) => {
        for (const segment of new Set(parameters.map((parameter) => this.segmentOf.get(parameter)))) {
          const gradient = segment && alive.get(segment)
          if (!gradient) continue
          this.recordSegment(recorder, segment, gradient)
          alive.delete(segment)
        }
      },
      end: (recorder) => {
        for (const [segment, gradient] of this.buffers) this.recordSegment(recorder, segment, gradient)
      },
    }
  }

  private recordSegment(recorder: Recorder, segment: Segment, g: Tensor): void {
    const squares = this.scalar(SEGMENT_SQUARES_AT)
    const total = this.scalar(SQUARES_AT)
    sumSquares(recorder, { x: g, y: squares })
    add(recorder, { a: total, b: squares, y: total })
    clip(recorder, { sum_squares: squares, loss: this.loss, hyper: this.hyper })
    this.update(recorder, segment, g)
  }

  private record(): Plan {
    const recorder = new Recorder(this.device, 'update')
    const squares = this.scalar(SQUARES_AT)
    let first = true
    for (const g of this.buffers.values()) {
      sumSquares(recorder, { x: g, add: first ? undefined : squares, y: squares })
      first = false
    }
    clip(recorder, { sum_squares: squares, loss: this.loss, hyper: this.hyper })
    for (const [segment, g] of this.buffers) this.update(recorder, segment, g)
    return recorder.plan()
  }

  private update(recorder: Recorder, segment: Segment, g: Tensor): void {
    const { settings, hyper } = this
    const { m, v, m_scale, v_scale, master, low }: SegmentStates = this.layout.of(segment, this.states)
    const p = weightsOf(segment)
    const scalars = {
      beta1: settings.betas[0],
      beta2: settings.betas[1],
      eps: settings.eps,
      weight_decay: settings.weightDecay,
      seed: settings.seed ?? 0,
      first: this.starts.get(segment.of)! + segment.first,
    }
    const common = { p, master, low, g, m: m!, v: v!, hyper, ...scalars }
    if (m_scale && v_scale) adamw8bit(recorder, { ...common, m_scale, v_scale })
    else adamw(recorder, common)
  }

  private get hyper(): Tensor {
    return new Tensor(this.scalars, 0, 'f32', [8])
  }

  private scalar(at: number): Tensor {
    return new Tensor(this.scalars, at * 4, 'f32', [1])
  }
}

const weightsOf = (segment: Segment): Tensor => segment.of.part(segment.of.buffer, segment.of.dtype, segment)
