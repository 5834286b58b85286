import { Device } from '../runtime/device.js'
import { estimateStep, formulaFlops, type Seconds, sumOf } from './estimate.js'
import { DRIVER_BYTES, type Gpu, gpus } from './gpus.js'
import type { LoraOptions } from '../model/lora.js'
import type { MemoryOptions, MemorySettings } from './memory.js'
import { type MemoryPeak, recordStep, type StepRecord, summarize } from './plan.js'
import type { PoseOptions } from './pose.js'
import { type Planning, type PlanRequest, readRequest } from './request.js'

/**
 * Bytes on the device by what they are for; their sum is the plan's `requiredBytes`.
 *
 * @category Training
 */
export interface PlannedBytes {
  /** Of the model; with `lora` all of them are frozen but those that it also trains. */
  weights: number
  /** Matrices of low rank, in float32. */
  adapter: number
  /** Held until the update, or, with fused updates, alive at the peak. */
  gradients: number
  /** Moments, and what bfloat16 weights are updated in. */
  optimizer: number
  /** Inputs of layers that are kept for the backward pass. */
  checkpoints: number
  /** All other results that are alive at the peak. */
  activations: number
  /** Rows of them that exist at a time, if that is at the peak. */
  logits: number
  /** Alignment, and room of the arena that is not used at the peak. */
  gaps: number
  /** Tokens, labels, rotation tables. */
  batch: number
  /** What the kernels share for what they need meanwhile. */
  workspace: number
  /** Allowance for what the driver takes for itself; 0 on a CPU, and where a device is open and has it already. */
  driver: number
}

/**
 * Time of a step, not measured: each operation takes the longer of its FLOPs and its bytes at the device's published
 * rates, and copies to and from the host run beside them.
 *
 * @category Training
 */
export interface StepEstimate {
  /** Of a step. */
  seconds: number
  /** The parts of `seconds`: `memory` of operations that memory limits, `waiting` for copies from and to the host. */
  parts: { matmul: number; attention: number; memory: number; update: number; waiting: number }
  /** Of all windows of a step. */
  tokensPerSecond: number
  /** Model FLOPs utilisation by `mfuFormula`, of the data sheet's dense bf16 peak. */
  mfu: number
  /** What `mfu` counts, for people. */
  mfuFormula: string
  /** Of the run, where `steps` was given: its time, and its energy at the device's power limit. */
  run?: { steps: number; seconds: number; joules: number }
}

/**
 * What a training step needs: bytes are exact, times are estimates.
 *
 * @category Training
 */
export interface MemoryPlan {
  /** Its name or path, its number of weights, and of those that are trained, an adapter's included. */
  model: { name: string; parameterCount: number; trainedCount: number; layers: number }
  /** Tokens in a window. */
  context: number
  /** Windows in a micro-batch. */
  batchSize: number
  /** Micro-batches in a step. */
  accumulate: number
  /** Of the weights. */
  dtype: 'float32' | 'bfloat16'
  /** undefined where the matrices are as `dtype` says. */
  quantization: 'nf4' | 'int8' | undefined
  /** With the defaults filled in. */
  memory: Required<MemoryOptions>
  /** undefined where the weights are trained. */
  lora: Required<LoraOptions> | undefined
  /** undefined where positions do not skip. */
  pose: Required<PoseOptions> | undefined
  /** Whether the loss of a validation set is measured between steps, with the same memory. */
  validates: boolean
  /** undefined where neither `device` nor `limit` was given. */
  device: { name: string; description: string } | undefined
  /** On the device, by what they are for. */
  bytes: PlannedBytes
  /** The sum of `bytes`. */
  requiredBytes: number
  /** What the device has; undefined where none was given. */
  limitBytes: number | undefined
  /** Whether device and host have what is required; undefined where only the device's limit could say, and is not known. */
  fits: boolean | undefined
  /** Pinned memory of the host. */
  hostBytes: number
  /** What the host has for it; undefined where no limit is known. */
  hostLimitBytes: number | undefined
  /** Known GPUs whose memory it fits; none where the host has too little. */
  fitsOn: string[]
  /** The operation at which most is alive. */
  peak: MemoryPeak
  /** Bytes of a checkpoint on the disk. */
  checkpointBytes: number
  /** Counted floating-point operations. */
  flopsPerStep: number
  /** The same without what is computed a second time. */
  modelFlopsPerStep: number
  /** Bytes that the operations of a step read and write. */
  trafficPerStep: number
  /** undefined where the device's rates are not known. */
  estimate: StepEstimate | undefined
}

/**
 * Records a training step and says what it needs: bytes by category, the operation at which most is alive, whether it
 * fits, and an estimate of its time. Nothing is allocated, and no GPU need be there.
 *
 * Throws TypeError or RangeError for what is wrong in the request, with what was perhaps meant, RopewalkError for a
 * config.json that is no LLaMA's (ERR_CONFIG) or cannot be read, ERR_DEVICE_UNAVAILABLE for a device that is not here.
 */
export async function plan(request: PlanRequest): Promise<MemoryPlan> {
  const planning = await readRequest(request)
  return describePlan(planning, record(planning, planning.settings.memory))
}

/** Records the step with these memory options. */
export function record(planning: Planning, memory: MemorySettings): StepRecord {
  const device = Device.open(planning.onGpu ? 'dry:cuda' : 'dry')
  const { config, dtype, quantization, settings, context } = planning
  return recordStep(device, config, dtype, { ...settings, memory }, context, quantization)
}

export function describePlan(planning: Planning, step: StepRecord, memory = planning.settings.memory): MemoryPlan {
  const { name, config, dtype, quantization, context, settings, device, onGpu } = planning
  const { limitBytes, hostLimitBytes, driverBytes } = planning
  const { batchSize, accumulate, lora, pose, validation } = settings
  const summary = summarize(step)
  const { peak, hostBytes } = summary
  const adapter = step.lora?.parameters.buffer.bytes ?? 0
  const bytes: PlannedBytes = {
    weights: summary.weightsBytes - adapter,
    adapter,
    gradients: summary.gradientBytes + peak.gradients,
    optimizer: summary.optimizerBytes,
    checkpoints: peak.checkpoints,
    activations: peak.activations,
    logits: peak.logits,
    gaps: peak.gaps,
    batch: summary.batchBytes,
    workspace: summary.workspaceBytes,
    driver: driverBytes,
  }
  const requiredBytes = Object.values(bytes).reduce((sum, one) => sum + one, 0)
  const anywhere = requiredBytes - driverBytes + DRIVER_BYTES
  const hostFits = hostLimitBytes === undefined || hostBytes <= hostLimitBytes
  return {
    model: {
      ...{ name, parameterCount: step.weights.count, layers: config.layers },
      trainedCount: trainedCount(step),
    },
    ...{ context, batchSize, accumulate, dtype: dtype === 'f32' ? 'float32' : 'bfloat16', memory, device },
    quantization,
    ...{ lora, pose, validates: validation !== undefined },
    ...{ bytes, requiredBytes, limitBytes, hostBytes, hostLimitBytes },
    fits: fits({ requiredBytes, hostBytes }, planning),
    fitsOn: gpus.filter((gpu) => onGpu && hostFits && anywhere <= gpu.capacityBytes).map((gpu) => gpu.name),
    peak,
    checkpointBytes: summary.checkpointBytes,
    flopsPerStep: summary.flopsPerStep,
    modelFlopsPerStep: summary.modelFlopsPerStep,
    trafficPerStep: summary.trafficPerStep,
    estimate: planning.gpu && estimate(planning, planning.gpu, step),
  }
}

/** Weights that change: all, or an adapter and what is trained beside it. */
function trainedCount({ weights, lora }: StepRecord): number {
  if (!lora) return weights.count
  return lora.parameters.count + lora.trained.reduce((sum, { value }) => sum + value.size, 0)
}

/** On a CPU what is on the host is in the same memory; a limit of the host counts with any device, or none. */
export function fits(
  { requiredBytes, hostBytes }: { requiredBytes: number; hostBytes: number },
  { onGpu, limitBytes, hostLimitBytes }: Pick<Planning, 'onGpu' | 'limitBytes' | 'hostLimitBytes'>,
): boolean | undefined {
  if (hostLimitBytes !== undefined && hostBytes > hostLimitBytes) return false
  if (limitBytes === undefined) return undefined
  return (onGpu ? requiredBytes : requiredBytes + hostBytes) <= limitBytes
}

const NOTHING_TWICE = 'causal half of attention, nothing that is computed twice'
const MFU_FORMULA = `(6 N + 6 L H D T) tokens/s / peak: ${NOTHING_TWICE}`
const LORA_FORMULA = `(4 N + 2 n + 6 L H D T) tokens/s / peak, n trained of N weights: ${NOTHING_TWICE}`

function estimate(planning: Planning, gpu: Gpu, step: StepRecord): StepEstimate {
  const { context, settings, config, steps } = planning
  const parts: Seconds = estimateStep(step.passes, step.optimizer, gpu)
  const seconds = sumOf(parts)
  const tokensPerSecond = (settings.batchSize * settings.accumulate * context) / seconds
  const flops = formulaFlops(config, step.weights.count, trainedCount(step), context)
  return {
    ...{ seconds, parts, tokensPerSecond, mfu: (tokensPerSecond * flops) / gpu.peak },
    mfuFormula: step.lora ? LORA_FORMULA : MFU_FORMULA,
    ...(steps !== undefined && { run: { steps, seconds: steps * seconds, joules: steps * seconds * gpu.watts } }),
  }
}
