import { type Batch, freeTensors } from '../model/batch.js'
import type { LlamaConfig } from '../model/config.js'
import type { Parameters } from '../model/parameters.js'
import { disposePass, type Pass, type PassKind, type PassOptions, recordPass, runPass } from '../model/passes.js'
import type { Buffer } from '../runtime/device.js'
import { dot } from '../runtime/ops.gen.js'
import type { Plan } from '../runtime/plan.js'
import { activationOptions, MEMORY_DEFAULTS } from './memory.js'
import type { AdamW, Update } from './optimizer.js'

/** What a training run computes, recorded for micro-batches of one shape; all passes share one arena and one batch. */
export class TrainingPasses {
  /** Exact bytes of activations and temporaries at their peak. */
  readonly arenaBytes: number
  /** Exact bytes of pinned memory of the host. */
  readonly hostBytes: number
  /** Exact bytes of tokens, labels and rotation tables. */
  readonly batchBytes: number
  /** Floating-point operations of a step. */
  readonly flops: number
  /** Of the weights that they were recorded for. */
  readonly version: number
  /** Those of them that a step which keeps everything would take too. */
  readonly modelFlops: number
  /** Bytes that the operations of a step read and write. */
  readonly traffic: number

  private readonly passes = new Map<PassKind, Pass>()
  private readonly arena: Buffer
  private readonly hostArena: Buffer | undefined

  /** Throws RopewalkError ERR_OUT_OF_MEMORY, with nothing left allocated, where the arena does not fit. */
  constructor(
    private readonly config: LlamaConfig,
    private readonly weights: Parameters,
    private readonly optimizer: AdamW,
    readonly rows: number,
    readonly time: number,
    /** Micro-batches of a step. */
    readonly accumulate: number,
    /** Whether validation runs between steps. */
    readonly validates: boolean,
    private readonly memory = MEMORY_DEFAULTS,
    onRefused: (message: string) => void = () => undefined,
  ) {
    this.version = weights.version
    const kinds: PassKind[] = ['gradients']
    if (accumulate > 1) kinds.push('accumulate')
    if (validates) kinds.push('loss')
    let share: PassOptions['share']
    let arena: Buffer | undefined
    let hostArena: Buffer | undefined
    try {
      const recorded = kinds.map((kind) => {
        const pass = this.record(kind, { share })
        share = pass
        this.passes.set(kind, pass)
        return pass.plan
      })
      this.arenaBytes = Math.max(...recorded.map(({ peakBytes }) => peakBytes))
      this.hostBytes = Math.max(...recorded.map(({ hostBytes }) => hostBytes))
      const what = `activations of ${rows} x ${time} tokens`
      arena = weights.device.alloc(this.arenaBytes, what)
      if (this.hostBytes > 0) hostArena = weights.device.allocHost(this.hostBytes, `${what}, checkpoints`, onRefused)
      for (const plan of recorded) plan.lend(arena, hostArena)
    } catch (error) {
      arena?.dispose()
      hostArena?.dispose()
      if (share) freeTensors(share.tensors)
      throw error
    }
    this.arena = arena
    this.hostArena = hostArena
    this.batchBytes = Object.values(share!.tensors).reduce((sum, tensor) => sum + tensor.bytes, 0)
    this.flops = optimizer.flops
    this.modelFlops = optimizer.flops
    this.traffic = optimizer.traffic
    for (const { plan, runs } of this.plans) {
      this.traffic += runs * plan.traffic
      this.flops += runs * plan.flops
      for (const { flops, place } of plan.commands) if (!place.again) this.modelFlops += runs * flops
    }
  }

  /** What a step runs before the update, and how often. */
  get plans(): { plan: Plan; runs: number }[] {
    const gradients = this.passes.get('gradients')!.plan
    const accumulate = this.passes.get('accumulate')?.plan
    const more = accumulate ? [{ plan: accumulate, runs: this.accumulate - 1 }] : []
    return [{ plan: gradients, runs: 1 }, ...more]
  }

  /** One step over `accumulate` micro-batches: the gradients of the mean over all of their predictions, and the update. */
  async step(batches: readonly Batch[], learningRate: number): Promise<Update> {
    const targets = batches.reduce((sum, batch) => sum + batch.targets, 0)
    await this.optimizer.begin(learningRate)
    for (const [i, batch] of batches.entries()) {
      const weight = Float32Array.from(batch.labels, (label) => (label < 0 ? 0 : 1 / targets))
      await this.run(i === 0 ? 'gradients' : 'accumulate', batch, weight)
    }
    return this.optimizer.end()
  }

  /** Negative log-likelihoods (N) of a batch under the weights as they are. */
  losses(batch: Batch): Promise<Float32Array> {
    return this.run('loss', batch)
  }

  dispose(): void {
    for (const pass of this.passes.values()) disposePass(pass)
    this.arena.dispose()
    this.hostArena?.dispose()
  }

  private run(kind: PassKind, batch: Batch, weight?: Float32Array): Promise<Float32Array> {
    return runPass(this.weights.device, this.config, this.passes.get(kind)!, batch, weight)
  }

  /** Training passes also leave sum weight nll in the optimizer's `loss`, where a NaN stops the update. */
  private record(kind: PassKind, memory: Pick<PassOptions, 'share'>): Pass {
    const { loss, gradients } = this.optimizer
    const onLosses: PassOptions['onLosses'] = (recorder, nll, { weight }) => {
      dot(recorder, { a: nll, b: weight, add: kind === 'accumulate' ? loss : undefined, y: loss })
    }
    const activations = activationOptions(this.memory)
    return recordPass(this.weights.device, this.config, this.weights, kind, this.rows, this.time, {
      ...{ ...memory, activations },
      ...(kind !== 'loss' && { onLosses, gradients }),
    })
  }
}
