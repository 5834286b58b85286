// Whole models: training steps, decoding, and how little both disturb JavaScript.
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setTimeout } from 'node:timers/promises'
import { Continuation } from '../model/generate.js'
import { Llama } from '../model/llama.js'
import { Trainer } from '../train/trainer.js'
import { quantile, type Side } from './measure.js'

/** The model that speed is measured on: large enough for its products to be, small enough for two cores. */
export const LLAMA_25M = {
  model_type: 'llama',
  hidden_size: 512,
  intermediate_size: 1376,
  num_hidden_layers: 8,
  num_attention_heads: 8,
  num_key_value_heads: 8,
  head_dim: 64,
  vocab_size: 4096,
  max_position_embeddings: 4096,
  rms_norm_eps: 1e-5,
  tie_word_embeddings: true,
}

/** A model of the size that people watch train in a terminal. */
const LLAMA_1M = {
  ...LLAMA_25M,
  hidden_size: 128,
  intermediate_size: 352,
  num_hidden_layers: 4,
  num_attention_heads: 4,
  num_key_value_heads: 4,
  head_dim: 32,
  vocab_size: 768,
}

type Config = typeof LLAMA_25M

/** Rows of random tokens. */
export function randomTokens(rows: number, time: number, vocabulary: number): number[][] {
  const row = (): number[] => Array.from({ length: time }, () => Math.floor(vocabulary * Math.random()))
  return Array.from({ length: rows }, row)
}

export interface Training {
  model: Llama
  trainer: Trainer
  dispose(): void
}

export async function startTraining(config: Config, context: number, threads: number): Promise<Training> {
  const model = await Llama.create(config, { device: 'cpu', threads, seed: 1 })
  const trainer = new Trainer(model, { context })
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

/** Writing tokens one by one after `length` others. */
export async function generateSide(length: number, threads: number): Promise<Side> {
  const { hidden_size: c, num_hidden_layers: layers, vocab_size: vocabulary } = LLAMA_25M
  const model = await Llama.create(LLAMA_25M, { device: 'cpu', threads, seed: 1 })
  const count = 16
  const text = new Continuation(model.device, model.config, model.weights, length + count)
  await text.feed(randomTokens(1, length, vocabulary)[0]!)
  const run = async (): Promise<number> => {
    text.length = length
    const start = performance.now()
    for (let i = 0; i < count; i++) await text.feed([(7 * i) % vocabulary])
    return (performance.now() - start) / 1000
  }
  // Every weight, and the keys and values of every layer, are read for each token.
  const bytes = 4 * (model.parameterCount + 2 * layers * length * c)
  return { name: 'ropewalk', work: bytes * count, tokens: count, run, dispose: () => model.dispose() }
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
