// Whole models: training steps, decoding, and how little both disturb JavaScript.
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setTimeout } from 'node:timers/promises'
import { parameterShapes, readConfig } from '../model/config.js'
import { Continuation } from '../model/generate.js'
import { Llama } from '../model/llama.js'
import { Parameters } from '../model/parameters.js'
import { DTYPE_BYTES } from '../runtime/tensor.js'
import type { MemoryOptions } from '../train/memory.js'
import { Trainer } from '../train/trainer.js'
import { randomTokens, randomWeights } from './data.js'
import { copy, kernelSide, openTarget, type Target } from './kernels.js'
import { quantile, type Side } from './measure.js'
import { LLAMA_1M, LLAMA_25M, type ModelConfig } from './models.js'

export interface Training {
  model: Llama
  trainer: Trainer
  dispose(): void
}

export async function startTraining(
  raw: ModelConfig,
  context: number,
  threads: number,
  memory: MemoryOptions = {},
): Promise<Training> {
  const config = { ...raw, max_position_embeddings: Math.max(context, raw.max_position_embeddings) }
  const model = await Llama.create(config, { device: 'cpu', threads, seed: 1 })
  const trainer = new Trainer(model, { context, memory })
  const dispose = (): void => {
    trainer.dispose()
    model.dispose()
  }
  return { model, trainer, dispose }
}

/** A training step on one row of `time` tokens: forward, backward, AdamW. */
export async function stepSide(time: number, threads: number): Promise<Side> {
  const { trainer, dispose } = await startTraining(LLAMA_25M, time, threads)
  const tokens = randomTokens(1, time, LLAMA_25M.vocab_size)
  const run = async (): Promise<number> => {
    const start = performance.now()
    await trainer.step(tokens)
    return (performance.now() - start) / 1000
  }
  return { name: 'ropewalk', work: trainer.plan().flopsPerStep, tokens: time, run, dispose }
}

/** Writing tokens one by one after `length` others; in bf16 on a GPU. */
export async function generateSide(raw: ModelConfig, length: number, target: Target): Promise<Side> {
  const count = 16
  const device = openTarget(target)
  try {
    const config = readConfig({ ...raw, max_position_embeddings: length + count }, 'bench')
    const weights = new Parameters(device, device.name === 'cpu' ? 'f32' : 'bf16', parameterShapes(config))
    await randomWeights(weights)
    const text = new Continuation(device, config, weights, length + count)
    await text.feed(randomTokens(1, length, config.vocabSize)[0]!)
    const run = async (): Promise<number> => {
      text.length = length
      const start = performance.now()
      for (let i = 0; i < count; i++) await text.feed([(7 * i) % config.vocabSize])
      return (performance.now() - start) / 1000
    }
    // Every weight (but one row of an embedding that is no lm_head), and all keys and values, are read for each token.
    const cached = 2 * config.layers * length * config.kvHeads * config.headDim
    const rows = config.tied ? 0 : (config.vocabSize - 1) * config.hiddenSize
    const work = DTYPE_BYTES[weights.dtype] * (weights.count - rows + cached) * count
    return { name: 'ropewalk', work, tokens: count, run, dispose: () => device.dispose() }
  } catch (error) {
    device.dispose()
    throw error
  }
}

/** A figure beside the cases. */
export interface Fact {
  name: string
  value: number
  unit: 'bytes' | 'ms' | 'ratio'
  /** The least or the most that it should be. */
  least?: number
  most?: number
}

/** What it takes to start a plan and to learn of its end: it is in every figure, once for all the repeats of a run. */
export async function runCost(target: Target): Promise<Fact[]> {
  const side = await kernelSide(copy(1), 8, target, { count: 1 })
  try {
    const times: number[] = []
    for (let i = 0; i < 60; i++) times.push(1000 * (await side.run()))
    const sorted = times.slice(10).sort((a, b) => a - b)
    return [{ name: 'a run of one tiny operation: median', value: quantile(sorted, 0.5), unit: 'ms' }]
  } finally {
    await side.dispose?.()
  }
}

/** How late JavaScript's timers are while the 25M model trains, and how soon a cancelled step of a small one ends. */
export async function eventFacts(quick: boolean, threads: number, signal?: AbortSignal): Promise<Fact[]> {
  const time = quick ? 64 : 1024
  const steps = quick ? 1 : 8
  const training = await startTraining(LLAMA_25M, time, threads)
  const delays = monitorEventLoopDelay({ resolution: 1 })
  try {
    const tokens = randomTokens(1, time, LLAMA_25M.vocab_size)
    await training.trainer.step(tokens)
    delays.enable()
    for (let i = 0; i < steps; i++) {
      signal?.throwIfAborted()
      await training.trainer.step(tokens)
    }
    delays.disable()
  } finally {
    training.dispose()
  }
  const name = `timer of 1 ms during a step, T ${time}`
  const delay = (value: number): number => value / 1e6
  return [
    { name: `${name}: p50`, value: delay(delays.percentile(50)), unit: 'ms' },
    { name: `${name}: p99`, value: delay(delays.percentile(99)), unit: 'ms', most: 20 },
    ...(await cancelFacts(quick ? 5 : 100, threads, signal)),
  ]
}

async function cancelFacts(count: number, threads: number, signal?: AbortSignal): Promise<Fact[]> {
  const [rows, time] = [8, 256]
  const { model, trainer, dispose } = await startTraining(LLAMA_1M, time, threads)
  const latencies: number[] = []
  try {
    const tokens = randomTokens(rows, time, LLAMA_1M.vocab_size)
    await trainer.step(tokens)
    const start = performance.now()
    await trainer.step(tokens)
    const length = performance.now() - start
    while (latencies.length < count) {
      signal?.throwIfAborted()
      let cancelled = 0
      const step = trainer.step(tokens).then(
        () => undefined,
        () => latencies.push(performance.now() - cancelled), // a step that was too quick to be cancelled does not count
      )
      await setTimeout(0.9 * length * Math.random())
      cancelled = performance.now()
      model.device.cancel()
      await step
    }
  } finally {
    dispose()
  }
  latencies.sort((a, b) => a - b)
  const name = `cancelling a step, 1M, ${rows} x ${time}`
  return [
    { name: `${name}: p50`, value: quantile(latencies, 0.5), unit: 'ms' },
    { name: `${name}: p99`, value: quantile(latencies, 0.99), unit: 'ms', most: 50 },
  ]
}
