// Training steps of models of any size on a GPU, from random weights that are made there.
import { readBatch } from '../model/batch.js'
import { parameterShapes, readConfig } from '../model/config.js'
import { Parameters } from '../model/parameters.js'
import { Device } from '../runtime/device.js'
import { AdamW } from '../train/optimizer.js'
import { TrainingPasses } from '../train/passes.js'
import { randomTokens, randomWeights } from './data.js'
import { openTarget, type Target } from './kernels.js'
import type { Side } from './measure.js'
import type { ModelConfig } from './models.js'

const SETTINGS = { betas: [0.9, 0.95], eps: 1e-8, weightDecay: 0, maxGradNorm: 1 } as const

/** What the trainer allocates for a step on one row of `time` tokens: bf16 weights, f32 gradients, moments and masters. */
function prepare(device: Device, raw: ModelConfig, time: number) {
  const config = readConfig({ ...raw, max_position_embeddings: Math.max(time, raw.max_position_embeddings) }, 'bench')
  const weights = new Parameters(device, 'bf16', parameterShapes(config))
  const optimizer = new AdamW(weights.segments(), SETTINGS)
  const passes = new TrainingPasses(config, weights, optimizer, 1, time, 1, false)
  return { config, weights, optimizer, passes }
}

/** Bytes that a step takes on a GPU, from its plan. */
export function stepBytes(config: ModelConfig, time: number): number {
  const device = Device.open('dry:cuda')
  prepare(device, config, time)
  return device.allocatedBytes
}

const giga = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`

/** The model or, where a step of it would take more than `bytes`, one of as many layers as fit, with a remark. */
export function fitting(config: ModelConfig, time: number, bytes: number): { config: ModelConfig; remark?: string } {
  const of = (layers: number): ModelConfig => ({ ...config, num_hidden_layers: layers })
  const whole = config.num_hidden_layers
  const needed = stepBytes(config, time)
  if (needed <= bytes) return { config }
  let layers = whole - 1
  while (layers > 0 && stepBytes(of(layers), time) > bytes) layers--
  if (layers === 0)
    throw new Error(`a step with a single layer takes ${giga(stepBytes(of(1), time))} of ${giga(bytes)}`)
  const remark = `${layers} of its ${whole} layers: all take ${giga(needed)}, ${giga(bytes)} are free`
  return { config: of(layers), remark }
}

/** A training step on one row of `time` tokens: forward, backward, AdamW. */
export async function trainingSide(raw: ModelConfig, time: number, target: Target): Promise<Side> {
  const device = openTarget(target)
  try {
    const { config, weights, optimizer, passes } = prepare(device, raw, time)
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
    const { flops: work } = passes
    return {
      ...{ name: 'ropewalk', work, tokens: time, run, bytes: device.allocatedBytes },
      dispose: () => device.dispose(),
    }
  } catch (error) {
    device.dispose()
    throw error
  }
}
