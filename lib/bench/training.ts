// Training steps of models of any size on a GPU, from random weights that are made there.
import { readBatch } from '../model/batch.js'
import { parameterShapes, readConfig } from '../model/config.js'
import { Parameters } from '../model/parameters.js'
import { Device } from '../runtime/device.js'
import { formatMemory } from '../train/admit.js'
import { MEMORY_DEFAULTS, type MemoryOptions, type MemorySettings } from '../train/memory.js'
import { AdamW } from '../train/optimizer.js'
import { TrainingPasses } from '../train/passes.js'
import { randomTokens, randomWeights } from './data.js'
import { openTarget, type Target } from './kernels.js'
import type { Side } from './measure.js'
import type { ModelConfig } from './models.js'

/** The trainer's own. */
const SETTINGS = { betas: [0.9, 0.95], eps: 1e-8, weightDecay: 0, maxGradNorm: 0 } as const

/** What the trainer allocates for a step of bf16 weights on one row of `time` tokens. */
function prepare(device: Device, raw: ModelConfig, time: number, memory: MemorySettings) {
  const config = readConfig({ ...raw, max_position_embeddings: Math.max(time, raw.max_position_embeddings) }, 'bench')
  const weights = new Parameters(device, 'bf16', parameterShapes(config))
  const optimizer = new AdamW(weights.segments(), { ...SETTINGS, memory })
  const passes = new TrainingPasses(config, weights, optimizer, 1, time, 1, false, memory)
  return { config, weights, optimizer, passes }
}

/** Bytes that a step takes on a GPU, from its plan. */
export function stepBytes(config: ModelConfig, time: number, memory = MEMORY_DEFAULTS): number {
  const device = Device.open('dry:cuda')
  prepare(device, config, time, memory)
  return device.allocatedBytes
}

const giga = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`

/** What a step on a GPU is measured with. */
export interface Fitting {
  config: ModelConfig
  memory: MemorySettings
  /** Where that is not the whole model with everything kept. */
  remark?: string
}

/** From the one that keeps everything to the one that needs least without the host; all but the last compute the same. */
const WAYS: readonly MemoryOptions[] = [
  {},
  { checkpointLayers: 1, mlpRows: 1024, gradients: 'fused', masters: 'remainder' },
  { checkpointLayers: 1, mlpRows: 1024, gradients: 'fused', masters: 'remainder', moments: '8bit' },
]

/**
 * The model, in the first of the ways above that takes at most `bytes`; where none does, as many of its layers as fit in
 * the last one.
 */
export function fitting(config: ModelConfig, time: number, bytes: number): Fitting {
  const of = (layers: number): ModelConfig => ({ ...config, num_hidden_layers: layers })
  const why = (): string => `with everything kept it takes ${giga(stepBytes(config, time))}, ${giga(bytes)} are free`
  let memory = MEMORY_DEFAULTS
  for (const way of WAYS) {
    memory = { ...MEMORY_DEFAULTS, ...way }
    if (stepBytes(config, time, memory) > bytes) continue
    return { config, memory, ...(way !== WAYS[0] && { remark: `memory: ${formatMemory(way)}; ${why()}` }) }
  }
  const whole = config.num_hidden_layers
  let layers = whole - 1
  while (layers > 0 && stepBytes(of(layers), time, memory) > bytes) layers--
  if (layers === 0) {
    const one = giga(stepBytes(of(1), time, memory))
    throw new Error(`a step with a single layer takes ${one} of ${giga(bytes)}`)
  }
  const remark = `${layers} of its ${whole} layers, memory: ${formatMemory(WAYS.at(-1)!)}; ${why()}`
  return { config: of(layers), memory, remark }
}

/** A training step on one row of `time` tokens: forward, backward, AdamW. */
export async function trainingSide(
  { config: raw, memory, remark }: Fitting,
  time: number,
  target: Target,
): Promise<Side> {
  const device = openTarget(target)
  try {
    const { config, weights, optimizer, passes } = prepare(device, raw, time, memory)
    await randomWeights(weights)
    await optimizer.reset()
    const batch = readBatch(randomTokens(1, time, config.vocabSize), config)
    const run = async (): Promise<number> => {
      const start = performance.now()
      const { loss, gradNorm, applied } = await passes.step([batch], 1e-5)
      const taken = (performance.now() - start) / 1000
      if (!applied) throw new Error(`the loss is ${loss}, the norm of the gradients ${gradNorm}: no step was taken`)
      return taken
    }
    // without what is computed a second time, so that the rate is that of the model's own operations
    const { modelFlops: work } = passes
    return {
      ...{ name: 'ropewalk', work, tokens: time, run, bytes: device.allocatedBytes, ...(remark && { remark }) },
      dispose: () => device.dispose(),
    }
  } catch (error) {
    device.dispose()
    throw error
  }
}
