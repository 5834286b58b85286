// What the planner is asked: checked, with all that it names looked up.
import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { didYouMean, quote } from '../errors.js'
import { readJsonObject } from '../files/json.js'
import { type LlamaConfig, readConfig } from '../model/config.js'
import { checkQuantize } from '../model/load.js'
import { checkLora, type LoraOptions } from '../model/lora.js'
import { modelPresets, presetConfig } from '../model/presets.js'
import { Device } from '../runtime/device.js'
import type { PlainDType, QuantizedDType } from '../runtime/tensor.js'
import { CPU_RATES, type Rates } from './estimate.js'
import { DRIVER_BYTES, findGpu, type Gpu, gpuCalled, readBytes } from './gpus.js'
import { availableBytes } from './host.js'
import { checkMemoryOf, type MemoryOptions, requireLayers, requireMasters } from './memory.js'
import { readOptions, requirePlain, type Settings, type TrainerOptions } from './options.js'
import type { PoseOptions } from './pose.js'

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
  /** As the trainer's `memory`; {@link fit} keeps to what is given, and looks for the rest. */
  memory?: MemoryOptions
  /** As the trainer's: an adapter is trained, not the weights. */
  lora?: LoraOptions
  /** How the matrices of the blocks are kept, as in `Llama.load`; needs `lora`. Default: as `dtype` says. */
  quantize?: 'nf4' | 'int8'
  /** As the trainer's: the positions of `pose.length` tokens are trained, in windows of `context`. It takes no memory. */
  pose?: PoseOptions
  /** As the trainer's; what counts is whether there is one. */
  validation?: TrainerOptions['validation']
  /** As the trainer's. With fused updates it has another meaning. */
  maxGradNorm?: number
  /** A known GPU, such as 'a100-80g', whether there is one or not; or 'cuda', 'cuda:1', 'simt' or 'cpu' for one here. */
  device?: string
  /** Memory of the device instead, in bytes or as '24g'. */
  limit?: number | string
  /**
   * Memory of the host that may be used, in bytes or as '64g'; default for a device that is here: what is free here, or
   * what the environment variable ROPEWALK_MEMORY says.
   */
  hostLimit?: number | string
  /** Steps of the run whose time and energy are estimated. */
  steps?: number
}

/** A request with everything in it checked and looked up. */
export interface Planning {
  name: string
  config: LlamaConfig
  dtype: PlainDType
  quantization: QuantizedDType | undefined
  context: number
  settings: Settings
  device: { name: string; description: string } | undefined
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
  lora: true,
  quantize: true,
  pose: true,
  validation: true,
  maxGradNorm: true,
  device: true,
  limit: true,
  hostLimit: true,
  steps: true,
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
  const { model, dtype = 'bfloat16', quantize, device, limit, hostLimit, ...options } = request
  if (dtype !== 'float32' && dtype !== 'bfloat16') {
    throw new RangeError(`dtype is ${quote(dtype)}, but must be "float32" or "bfloat16"`)
  }
  if ((options.memory as unknown) === 'auto') {
    throw new TypeError(
      "memory is 'auto', which a trainer takes: plan() says what given options need, fit() finds them",
    )
  }
  checkQuantize(quantize)
  const settings = readOptions(options)
  requirePlain(quantize, settings)
  if (settings.context === undefined) throw new TypeError('context is missing: the tokens in a training window')
  const { name, config } = await readModel(model)
  requireLayers(settings.memory, config.layers)
  checkMemoryOf(config, settings.memory)
  const own = dtype === 'float32' ? 'f32' : 'bf16'
  requireMasters(settings.memory, own)
  if (settings.lora) checkLora(config, settings.lora)
  return {
    ...{ name, config, dtype: own, context: settings.context, settings },
    ...{ quantization: quantize, steps: options.steps, ...readDevice({ device, limit, hostLimit }) },
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

function readDevice({ device: name, limit, hostLimit }: Partial<PlanRequest>): DevicePart {
  const given = limit === undefined ? undefined : readBytes(limit, 'limit')
  const hostGiven = hostLimit === undefined ? undefined : readBytes(hostLimit, 'hostLimit', 0)
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
    device: capacity === undefined ? undefined : { name: name ?? 'a GPU', description },
    onGpu: true,
    limitBytes: capacity,
    hostLimitBytes: hostGiven,
    driverBytes: DRIVER_BYTES,
    gpu,
    // Without a device, an A100's rates say which of two plans is the faster one.
    rates: gpu ?? findGpu('a100-80g'),
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
    limitBytes: free === undefined ? undefined : free + device.allocatedBytes + (onGpu ? 0 : device.hostBytes),
    hostLimitBytes: onGpu && host !== undefined ? host + device.hostBytes : undefined,
    driverBytes: 0,
    gpu,
    rates: gpu ?? (onGpu ? findGpu('a100-80g') : CPU_RATES),
  }
}
