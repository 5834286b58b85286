import { parameterShapes } from '../model/config.js'
import type { Llama } from '../model/llama.js'
import { Lora } from '../model/lora.js'
import { Parameters } from '../model/parameters.js'
import { checkpointBytes } from './checkpoint.js'
import { AdamW } from './optimizer.js'
import type { Settings } from './options.js'
import { TrainingPasses } from './passes.js'

/**
 * Exact bytes and counted operations of a run, known before anything is allocated.
 *
 * @category Training
 */
export interface TrainingPlan {
  /**
   * Weights in the model's dtype, and an adapter's in float32, each parameter padded to a multiple of 256 elements. With
   * `lora` they may stay in their files, in the page cache, and are counted here all the same.
   */
  weightsBytes: number
  /** Gradients that are held from the backward pass to the update: none or few with fused updates. */
  gradientBytes: number
  /** Moments, what bfloat16 weights are updated in, and a few scalars, as far as they are on the device. */
  optimizerBytes: number
  /** Activations and temporaries at their peak. */
  activationBytes: number
  /** Tokens, labels and rotation tables. */
  batchBytes: number
  /** Pinned memory of the host: checkpoints and optimizer states that were put there. On `cpu`, more of the same. */
  hostBytes: number
  /** What a GPU's operations share for what they need meanwhile. */
  workspaceBytes: number
  /** The sum: what the device holds while it trains. */
  totalBytes: number
  /** Bytes of a checkpoint on the disk, but for headers and the tokenizer. */
  checkpointBytes: number
  /** Counted floating-point operations of a step: products at 2 M N K, attention over the visible half only. */
  flopsPerStep: number
}

/** Records the steps of a run in the same way as for running them, but on a device that allocates nothing. */
export function planTraining(model: Llama, settings: Settings, context: number): TrainingPlan {
  const { batchSize, accumulate, validation } = settings
  const device = model.device.planner()
  const weights = new Parameters(device, model.weights.dtype, parameterShapes(model.config))
  const lora = settings.lora && new Lora(weights, model.config, settings.lora)
  const optimizer = new AdamW((lora ?? weights).segments(), settings)
  const validates = validation !== undefined
  const { config } = model
  const passes = new TrainingPasses(
    config,
    weights,
    optimizer,
    batchSize,
    context,
    accumulate,
    validates,
    settings.memory,
  )
  return {
    weightsBytes: weights.buffer.bytes + (lora?.parameters.buffer.bytes ?? 0),
    gradientBytes: optimizer.gradientBytes,
    optimizerBytes: optimizer.stateBytes - optimizer.hostBytes,
    activationBytes: passes.arenaBytes,
    batchBytes: passes.batchBytes,
    hostBytes: device.hostBytes,
    workspaceBytes: device.workspaceBytes,
    totalBytes: device.allocatedBytes,
    checkpointBytes: checkpointBytes(weights, lora, optimizer),
    flopsPerStep: passes.flops,
  }
}
