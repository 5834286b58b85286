import { type LlamaConfig, parameterShapes } from '../model/config.js'
import type { Llama } from '../model/llama.js'
import { Lora } from '../model/lora.js'
import { Parameters } from '../model/parameters.js'
import type { Device } from '../runtime/device.js'
import type { Plan } from '../runtime/plan.js'
import type { PlainDType, Purpose, QuantizedDType } from '../runtime/tensor.js'
import { checkpointBytes } from './checkpoint.js'
import { requireLayers } from './memory.js'
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
   * Weights in the model's dtype, and an adapter's in float32, each parameter padded to a multiple of 256 elements; those
   * that are quantised as they are. With `lora` the others may stay in their files, in the page cache, and are counted
   * here all the same.
   */
  weightsBytes: number
  /** Gradients that are held from the backward pass to the update: none or few with fused updates. */
  gradientBytes: number
  /** Moments, what bfloat16 weights are updated in, and a few scalars, as far as they are on the device. */
  optimizerBytes: number
  /** Activations and temporaries at their peak. */
  activationBytes: number
  /** What `activationBytes` are, and when. */
  peak: MemoryPeak
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
  /** The same without what is computed a second time to save memory. */
  modelFlopsPerStep: number
  /** Bytes that the operations of a step read and write. */
  trafficPerStep: number
}

/**
 * The operation of a step at which most memory is alive, and what it is. The bytes add up to `activationBytes`.
 *
 * @category Training
 */
export interface MemoryPeak {
  /** Name in the op table (docs/ops.md). */
  operation: string
  /** 'layer 3', 'output', 'embedding'. */
  part: string
  /** On the way to the loss, or to the gradients. */
  phase: 'forward' | 'backward'
  /** Inputs of layers that are kept, to compute the rest again. */
  checkpoints: number
  /** Of fused updates: gradients that live in the backward pass. */
  gradients: number
  /** Rows of logits. */
  logits: number
  /** All else. */
  activations: number
  /** Alignment, and room that could not be used at this moment. */
  gaps: number
  /** The largest tensors, those of one name together. */
  tensors: { name: string; count: number; bytes: number }[]
}

/** What decides a step's memory, whatever the weights are. */
export type StepSettings = Pick<
  Settings,
  'batchSize' | 'accumulate' | 'memory' | 'lora' | 'betas' | 'eps' | 'weightDecay' | 'maxGradNorm' | 'validation'
>

/** A step that was recorded on a device that allocates nothing. */
export interface StepRecord {
  device: Device
  weights: Parameters
  lora: Lora | undefined
  optimizer: AdamW
  passes: TrainingPasses
}

/** Records the steps of a run in the same way as for running them; `device` plans, and is used for nothing else. */
export function recordStep(
  device: Device,
  config: LlamaConfig,
  dtype: PlainDType,
  settings: StepSettings,
  context: number,
  quantization?: QuantizedDType,
): StepRecord {
  const { batchSize, accumulate, validation, memory } = settings
  requireLayers(memory, config.layers)
  const weights = new Parameters(device, dtype, parameterShapes(config), { quantization })
  const lora = settings.lora && new Lora(weights, config, settings.lora)
  const optimizer = new AdamW((lora ?? weights).segments(), settings)
  const shape = [batchSize, context, accumulate] as const
  const passes = new TrainingPasses(config, weights, optimizer, ...shape, validation !== undefined, memory)
  return { device, weights, lora, optimizer, passes }
}

/** Memory and operations of a model's training steps. */
export function planTraining(model: Llama, settings: StepSettings, context: number): TrainingPlan {
  const { device, config, weights } = model
  return summarize(recordStep(device.planner(), config, weights.dtype, settings, context, weights.quantization))
}

/** The figures of a record. */
export function summarize({ device, weights, lora, optimizer, passes }: StepRecord): TrainingPlan {
  return {
    weightsBytes: weights.bytes + (lora?.parameters.buffer.bytes ?? 0),
    gradientBytes: optimizer.gradientBytes,
    optimizerBytes: optimizer.stateBytes - optimizer.hostBytes,
    activationBytes: passes.arenaBytes,
    peak: memoryPeak(passes),
    batchBytes: passes.batchBytes,
    hostBytes: device.hostBytes,
    workspaceBytes: device.workspaceBytes,
    totalBytes: device.allocatedBytes,
    checkpointBytes: checkpointBytes(weights, lora, optimizer),
    flopsPerStep: passes.flops,
    modelFlopsPerStep: passes.modelFlops,
    trafficPerStep: passes.traffic,
  }
}

/** The pass of a step that needs most memory. */
export function largestPass({ plans }: TrainingPasses): Plan {
  return plans.map(({ plan }) => plan).reduce((most, plan) => (plan.peakBytes > most.peakBytes ? plan : most))
}

function memoryPeak(passes: TrainingPasses): MemoryPeak {
  const { commands, placements, peakAt } = largestPass(passes)
  const { row, place } = commands[Math.min(peakAt, commands.length - 1)]!
  const bytes: Record<Purpose, number> = { checkpoint: 0, gradient: 0, logits: 0, activation: 0 }
  const tensors = new Map<string, { name: string; count: number; bytes: number }>()
  let alive = 0
  for (const one of placements) {
    if (one.host || one.first > peakAt || one.last < peakAt) continue
    bytes[one.purpose] += one.bytes
    alive += one.bytes
    const name = one.purpose === 'checkpoint' ? 'checkpoints' : one.name
    const known = tensors.get(name) ?? { name, count: 0, bytes: 0 }
    tensors.set(name, { name, count: known.count + 1, bytes: known.bytes + one.bytes })
  }
  return {
    operation: row.name,
    part: place.part,
    phase: place.phase,
    checkpoints: bytes.checkpoint,
    gradients: bytes.gradient,
    logits: bytes.logits,
    activations: bytes.activation,
    gaps: passes.arenaBytes - alive,
    tensors: [...tensors.values()].sort((a, b) => b.bytes - a.bytes).slice(0, 12),
  }
}
