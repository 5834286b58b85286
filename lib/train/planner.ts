import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { didYouMean, quote } from '../errors.js'
import { readJsonObject } from '../files/json.js'
import { type LlamaConfig, readConfig } from '../model/config.js'
import { modelPresets, presetConfig } from '../model/presets.js'
import { Device } from '../runtime/device.js'
import type { DType } from '../runtime/tensor.js'
import { CPU_RATES, estimateStep, formulaFlops, type Rates, type Seconds, sumOf } from './estimate.js'
import { DRIVER_BYTES, findGpu, type Gpu, gpuCalled, gpus, readBytes } from './gpus.js'
import { type MemoryOptions, type MemorySettings, requireLayers } from './memory.js'
import { readOptions, type Settings } from './options.js'
import { type MemoryPeak, recordStep, type StepRecord, summarize } from './plan.js'

/**
 * What {@link plan} and {@link fit} are asked.
 *
 * @category Training
 */
export interface PlanRequest {
  /** A model folder, the path or the content of a config.json, or a known model: '7b', 'llama3-8b' and so on. */
  model: string | Record<string, unknown>
  /** Tokens in a window. The model's own window does not count: it can be stretched. */
  context: number
  /** Windows in a micro-batch; default 1. */
  batchSize?: number
  /** Micro-batches in a step; default 1. */
  accumulate?: number
  /** How weights are kept; default bfloat16. */
  dtype?: 'float32' | 'bfloat16'
  /** As the trainer's `memory`; {@link fit} looks for it instead. */
  memory?: MemoryOptions
  /** As the trainer's. With fused updates it has another meaning. */
  maxGradNorm?: number
  /** A known GPU, such as 'a100-80g', whether there is one or not; or 'cuda', 'cuda:1', 'simt' or 'cpu' for one here. */
  device?: string
  /** Memory of the device instead, in bytes or as '24g'. */
  limit?: number | string
  /** Memory of the host that may be used, in bytes or as '64g'; default: what is free here for a device that is here. */
  hostLimit?: number | string
  /** Steps of the run whose time and energy are estimated. */
  steps?: number
}

/**
 * Bytes on the device by what they are for; their sum is the plan's `requiredBytes`.
 *
 * @category Training
 */
export interface PlannedBytes {
  weights: number
  /** Held until the update, or, with fused updates, alive at the peak. */
  gradients: number
  /** Moments, and what bfloat16 weights are updated in. */
  optimizer: number
  /** Inputs of layers that are kept for the backward pass. */
  checkpoints: number
  /** All other results that are alive at the peak. */
  activations: number
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
  /** The parts of `seconds`. */
  parts: { matmul: number; attention: number; memory: number; update: number; waiting: number }
  tokensPerSecond: number
  /** Model FLOPs utilisation by `mfuFormula`, of the data sheet's dense bf16 peak. */
  mfu: number
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
  /** Its name or path, and number of weights. */
  model: { name: string; parameterCount: number; layers: number }
  context: number
  batchSize: number
  accumulate: number
  dtype: 'float32' | 'bfloat16'
  memory: Required<MemoryOptions>
  /** undefined where neither `device` nor `limit` was given. */
  device: { name: string; description: string } | undefined
  bytes: PlannedBytes
  /** The sum of `bytes`. */
  requiredBytes: number
  /** What the device has; undefined where none was given. */
  limitBytes: number | undefined
  /** Whether device and host have what is required; undefined where no limit is known. */
  fits: boolean | undefined
  /** Pinned memory of the host. */
  hostBytes: number
  hostLimitBytes: number | undefined
  /** Known GPUs whose memory it fits. */
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

/** A request with everything in it checked and looked up. */
export interface Planning {
  name: string
  config: LlamaConfig
  dtype: DType
  context: number
  settings: Settings
  device: MemoryPlan['device']
  /** Whether the step is that of a GPU, or of a CPU, where all memory is one. */
  onGpu: boolean
  limitBytes: number | undefined
  hostLimitBytes: number | undefined
  /** Driver's context, as far as the limit does not take account of it already. */
  driverBytes: number
  gpu: Gpu | undefined
  rates: Rates
  steps: number | undefined
}

const KNOWN: Record<keyof PlanRequest, true> = {
  model: true,
  context: true,
  batchSize: true,
  accumulate: true,
  dtype: true,
  memory: true,
  maxGradNorm: true,
  device: true,
  limit: true,
  hostLimit: true,
  steps: true,
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

/** Checks a request and looks up what it names. */
export async function readRequest(request: PlanRequest): Promise<Planning> {
  if (typeof request !== 'object' || request === null) {
    throw new TypeError(`the request is ${quote(request)}, but must be an object`)
  }
  for (const key of Object.keys(request)) {
    if (Object.hasOwn(KNOWN, key)) continue
    throw new TypeError(`unknown option ${quote(key)}${didYouMean(key, Object.keys(KNOWN))}`)
  }
  const { model, context, batchSize, accumulate, maxGradNorm, memory, steps, dtype = 'bfloat16' } = request
  if (dtype !== 'float32' && dtype !== 'bfloat16') {
    throw new RangeError(`dtype is ${quote(dtype)}, but must be "float32" or "bfloat16"`)
  }
  const settings = readOptions({ context, batchSize, accumulate, maxGradNorm, memory, steps })
  if (settings.context === undefined) throw new TypeError('context is missing: the tokens in a training window')
  const { name, config } = await readModel(model)
  requireLayers(settings.memory, config.layers)
  return {
    ...{ name, config, dtype: dtype === 'float32' ? 'f32' : 'bf16', context: settings.context, settings, steps },
    ...readDevice(request),
  }
}

async function readModel(model: PlanRequest['model']): Promise<{ name: string; config: LlamaConfig }> {
  if (typeof model === 'object' && model !== null) return { name: 'config', config: readConfig(model, 'config') }
  if (typeof model !== 'string' || model === '') {
    throw new TypeError(
      `model is ${quote(model)}, but must be a folder, a config.json or one of ${modelPresets.join(', ')}`,
    )
  }
  const info = modelPresets.includes(model) ? undefined : await stat(model).catch(() => undefined)
  if (!info) return { name: model, config: readConfig(presetConfig(model), model) }
  const path = info.isDirectory() ? join(model, 'config.json') : model
  return { name: model, config: readConfig(await readJsonObject(path, { maxBytes: 16 << 20 }), path) }
}

type DevicePart = Pick<Planning, 'device' | 'onGpu' | 'limitBytes' | 'hostLimitBytes' | 'driverBytes' | 'gpu' | 'rates'>

function readDevice({ device: name, limit, hostLimit }: PlanRequest): DevicePart {
  const given = limit === undefined ? undefined : readBytes(limit, 'limit')
  const hostGiven = hostLimit === undefined ? undefined : readBytes(hostLimit, 'hostLimit')
  // Without a device, an A100's rates say which of two plans is the faster one.
  const fallback = findGpu('a100-80g')
  if (name !== undefined && typeof name !== 'string') throw new TypeError(`device must be a name, is ${typeof name}`)
  if (name !== undefined && /^(cpu|auto|(cuda|simt)(:\d+)?)$/.test(name)) {
    using open = Device.open(name)
    const part = presentDevice(open)
    return { ...part, limitBytes: given ?? part.limitBytes, hostLimitBytes: hostGiven ?? part.hostLimitBytes }
  }
  const gpu = name === undefined ? undefined : findGpu(name)
  const capacity = given ?? gpu?.capacityBytes
  const description = gpu?.description ?? 'a GPU'
  return {
    device: capacity === undefined ? undefined : { name: name ?? 'limit', description },
    onGpu: true,
    limitBytes: capacity,
    hostLimitBytes: hostGiven,
    driverBytes: DRIVER_BYTES,
    gpu,
    rates: gpu ?? fallback,
  }
}

/** A device that is open: what is free on it for a model, and of the host. */
export function presentDevice(device: Device): DevicePart {
  const { name, description, gpu: onGpu } = device
  const memory = device.memory()
  const gpu = onGpu ? gpuCalled(description, memory?.totalBytes ?? 0) : undefined
  const host = availableBytes()
  const free = memory ? memory.freeBytes : host
  return {
    device: { name, description },
    onGpu,
    limitBytes: free === undefined ? undefined : free + device.allocatedBytes,
    hostLimitBytes: onGpu && host !== undefined ? host + device.hostBytes : undefined,
    driverBytes: 0,
    gpu,
    rates: gpu ?? (onGpu ? findGpu('a100-80g') : CPU_RATES),
  }
}

/** Memory that this process can still get, limits of its container included, or what the environment says instead. */
function availableBytes(): number | undefined {
  const given = process.env['ROPEWALK_MEMORY']
  if (given !== undefined && given !== '') return readBytes(given, 'ROPEWALK_MEMORY')
  const bytes = process.availableMemory()
  return bytes > 0 && Number.isFinite(bytes) ? bytes : undefined
}

/** Records the step with these memory options. */
export function record(planning: Planning, memory: MemorySettings): StepRecord {
  const device = Device.open(planning.onGpu ? 'dry:cuda' : 'dry')
  return recordStep(device, planning.config, planning.dtype, { ...planning.settings, memory }, planning.context)
}

export function describePlan(planning: Planning, step: StepRecord, memory = planning.settings.memory): MemoryPlan {
  const { name, config, dtype, context, settings, device, onGpu, limitBytes, hostLimitBytes, driverBytes } = planning
  const { batchSize, accumulate } = settings
  const summary = summarize(step)
  const { peak, hostBytes } = summary
  const bytes: PlannedBytes = {
    weights: summary.weightsBytes,
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
  const parameterCount = step.weights.count
  return {
    model: { name, parameterCount, layers: config.layers },
    ...{ context, batchSize, accumulate, dtype: dtype === 'f32' ? 'float32' : 'bfloat16', memory, device },
    ...{ bytes, requiredBytes, limitBytes, hostBytes, hostLimitBytes },
    fits: fits({ requiredBytes, hostBytes }, planning),
    fitsOn: onGpu ? gpus.filter((gpu) => requiredBytes <= gpu.capacityBytes).map((gpu) => gpu.name) : [],
    peak,
    checkpointBytes: summary.checkpointBytes,
    flopsPerStep: summary.flopsPerStep,
    modelFlopsPerStep: summary.modelFlopsPerStep,
    trafficPerStep: summary.trafficPerStep,
    estimate:
      planning.gpu &&
      estimate(planning, planning.gpu, estimateStep(step.passes, step.optimizer, planning.gpu), parameterCount),
  }
}

/** On a CPU what is on the host is in the same memory. */
export function fits(
  { requiredBytes, hostBytes }: { requiredBytes: number; hostBytes: number },
  { onGpu, limitBytes, hostLimitBytes }: Pick<Planning, 'onGpu' | 'limitBytes' | 'hostLimitBytes'>,
): boolean | undefined {
  if (limitBytes === undefined) return undefined
  if (!onGpu) return requiredBytes + hostBytes <= limitBytes
  return requiredBytes <= limitBytes && (hostLimitBytes === undefined || hostBytes <= hostLimitBytes)
}

const MFU_FORMULA = '(6 N + 6 L H D T) tokens/s / peak: causal half of attention, nothing that is computed twice'

function estimate(planning: Planning, gpu: Gpu, parts: Seconds, weights: number): StepEstimate {
  const { context, settings, config, steps } = planning
  const seconds = sumOf(parts)
  const tokensPerSecond = (settings.batchSize * settings.accumulate * context) / seconds
  return {
    seconds,
    parts: { ...parts },
    tokensPerSecond,
    mfu: (tokensPerSecond * formulaFlops(config, weights, context)) / gpu.peak,
    mfuFormula: MFU_FORMULA,
    ...(steps !== undefined && { run: { steps, seconds: steps * seconds, joules: steps * seconds * gpu.watts } }),
  }
}
