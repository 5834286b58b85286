// Sliding-window evaluation: one window of many, of which only the last tokens are scored.
import { parameterShapes, readConfig } from '../model/config.js'
import { Llama } from '../model/llama.js'
import { Parameters } from '../model/parameters.js'
import { recordPass } from '../model/passes.js'
import { Device } from '../runtime/device.js'
import { randomTokens } from './data.js'
import type { Target } from './kernels.js'
import type { Side } from './measure.js'
import type { ModelConfig } from './models.js'

/**
 * Scoring the last `stride` tokens of a window of `window`. The work is that of a pass which scores all of them. With
 * `dtype` bf16 activations are so, too, as those of transformers are.
 */
export async function evalSide(
  raw: ModelConfig,
  window: number,
  stride: number,
  { device, threads }: Target,
  dtype: 'f32' | 'bf16' = 'f32',
): Promise<Side> {
  const half = 'bfloat16' as const
  const onCpu = { device, threads, ...(dtype === 'bf16' && { dtype: half, activations: half }) }
  const where = device === 'cpu' ? onCpu : { device, dtype: half }
  const model = await Llama.create(raw, { ...where, seed: 1 })
  const work = evalFlops(raw, window)
  const [row] = randomTokens(1, window, raw.vocab_size)
  const labels = row!.map((id, t) => (t < window - stride ? -100 : id))
  const run = async (): Promise<number> => {
    const start = performance.now()
    await model.tokenLosses([row!], { labels: [labels] })
    return (performance.now() - start) / 1000
  }
  return { name: 'ropewalk', work, tokens: stride, run, dispose: () => model.dispose() }
}

/** Floating-point operations of a pass over a window, of which `scored` positions are scored; default: all. */
export function evalFlops(raw: ModelConfig, window: number, scored?: number): number {
  using device = Device.open('dry')
  const config = readConfig(raw, 'bench')
  const weights = new Parameters(device, 'f32', parameterShapes(config))
  return recordPass(device, config, weights, 'loss', 1, window, scored === undefined ? {} : { scored }).plan.flops
}
