import type { Parameters } from '../model/parameters.js'
import type { Buffer } from '../runtime/device.js'
import { adamw, cast, clip, fill, sumSquares } from '../runtime/ops.gen.js'
import type { Plan } from '../runtime/plan.js'
import { Recorder } from '../runtime/recorder.js'
import { Tensor } from '../runtime/tensor.js'

export interface AdamWSettings {
  betas: readonly [number, number]
  eps: number
  /** Decoupled, on every parameter. */
  weightDecay: number
  /** Gradients with a larger norm are scaled down to it; 0 for none. */
  maxGradNorm: number
}

export interface Update {
  /** What the passes left in `loss`. */
  loss: number
  /** 2-norm of all gradients, before clipping. */
  gradNorm: number
  /** False where the loss or the norm is not finite: nothing was changed. */
  applied: boolean
}

/** Floats of the scalar buffer: `hyper` (8, csrc/ops.def: clip), the loss, the sum of squares. */
const SCALARS = 10
const LOSS_AT = 8
const SQUARES_AT = 9

/**
 * AdamW (arXiv 1711.05101, one group over all parameters) on the device: gradients, moments and, with bfloat16 weights,
 * float32 masters, each one flat buffer in the layout of the weights. Whether an update may be applied is decided on
 * the device, so that a NaN reaches neither weights nor moments.
 */
export class AdamW {
  /** f32, written by the backward pass. */
  readonly gradients: Buffer
  /** First and second moment, f32. */
  readonly m: Buffer
  readonly v: Buffer
  /** What the weights are before rounding to bfloat16; absent with float32 weights. */
  readonly masters: Buffer | undefined
  /** (1) f32: the passes of a step leave their loss here. */
  readonly loss: Tensor
  /** Updates that were applied: t of the bias corrections. */
  applied = 0

  private readonly scalars: Buffer
  private readonly plan: Plan

  constructor(
    private readonly weights: Parameters,
    private readonly settings: AdamWSettings,
  ) {
    const { device, elements, dtype } = weights
    const owned: Buffer[] = []
    const alloc = (bytes: number, name: string): Buffer => {
      const buffer = device.alloc(bytes, name)
      owned.push(buffer)
      return buffer
    }
    try {
      this.gradients = alloc(elements * 4, 'gradients (f32)')
      this.m = alloc(elements * 4, 'first moments (f32)')
      this.v = alloc(elements * 4, 'second moments (f32)')
      this.masters = dtype === 'f32' ? undefined : alloc(elements * 4, 'master weights (f32)')
      this.scalars = alloc(SCALARS * 4, 'training scalars')
    } catch (error) {
      for (const buffer of owned) buffer.dispose()
      throw error
    }
    this.loss = this.scalar(LOSS_AT)
    this.plan = this.record()
  }

  /** Bytes of the gradients. */
  get gradientBytes(): number {
    return this.gradients.bytes
  }

  /** Bytes of moments, masters and scalars. */
  get stateBytes(): number {
    return this.m.bytes + this.v.bytes + (this.masters?.bytes ?? 0) + this.scalars.bytes
  }

  /** Floating-point operations of an update. */
  get flops(): number {
    return this.plan.flops
  }

  /** The state before the first update: moments 0, masters as the weights are now. */
  async reset(): Promise<void> {
    const { weights } = this
    const recorder = new Recorder(weights.device, 'optimizer start')
    // gradients too: the padding between parameters is never written, and it counts in the norm
    for (const buffer of [this.gradients, this.m, this.v]) fill(recorder, { y: weights.flat(buffer, 'f32'), value: 0 })
    if (this.masters) {
      cast(recorder, { x: weights.flat(weights.buffer, weights.dtype), y: weights.flat(this.masters, 'f32') })
    }
    const plan = recorder.plan()
    try {
      await plan.run()
    } finally {
      plan.dispose()
    }
    this.applied = 0
  }

  /** Applies the gradients, unless they or the loss are not finite. */
  async update(learningRate: number): Promise<Update> {
    const { device } = this.weights
    const [beta1, beta2] = this.settings.betas
    const t = this.applied + 1
    const corrections = [1 - beta1 ** t, 1 - beta2 ** t]
    const hyper = Float32Array.of(learningRate, ...corrections, this.settings.maxGradNorm, 0, 0, 0, t)
    await device.upload(new Tensor(this.scalars, 0, 'f32', [8]), hyper)
    await this.plan.run()
    const scalars = await device.downloadFloats(new Tensor(this.scalars, 0, 'f32', [SCALARS]))
    const applied = scalars[6] === 1
    if (applied) this.applied = t
    return { loss: scalars[LOSS_AT]!, gradNorm: scalars[5]!, applied }
  }

  dispose(): void {
    this.plan.dispose()
    for (const buffer of [this.gradients, this.m, this.v, this.masters, this.scalars]) buffer?.dispose()
  }

  private record(): Plan {
    const { weights, settings } = this
    const recorder = new Recorder(weights.device, 'update')
    const g = weights.flat(this.gradients, 'f32')
    const squares = this.scalar(SQUARES_AT)
    const hyper = new Tensor(this.scalars, 0, 'f32', [8])
    sumSquares(recorder, { x: g, y: squares })
    clip(recorder, { sum_squares: squares, loss: this.loss, hyper })
    adamw(recorder, {
      p: weights.flat(weights.buffer, weights.dtype),
      master: this.masters && weights.flat(this.masters, 'f32'),
      g,
      m: weights.flat(this.m, 'f32'),
      v: weights.flat(this.v, 'f32'),
      hyper,
      beta1: settings.betas[0],
      beta2: settings.betas[1],
      eps: settings.eps,
      weight_decay: settings.weightDecay,
      seed: 0,
      first: 0,
    })
    return recorder.plan()
  }

  private scalar(at: number): Tensor {
    return new Tensor(this.scalars, at * 4, 'f32', [1])
  }
}
