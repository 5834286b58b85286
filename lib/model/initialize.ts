import { setImmediate } from 'node:timers/promises'
import { toBfloat16 } from '../runtime/bfloat16.js'
import { uniform } from './generate.js'
import type { Parameters } from './parameters.js'

/** Elements after which the event loop gets its turn. */
const SLICE = 1 << 20

/** Random weights: matrices normal with the given deviation, vectors (the norms) 1. The seed determines every bit. */
export async function initialize(weights: Parameters, deviation: number, seed: number): Promise<void> {
  const random = uniform(seed)
  for (const { value } of weights) {
    const data = new Float32Array(value.size).fill(1)
    if (value.dims.length > 1) {
      // Box-Muller, both of the pair; 1 - u keeps the logarithm finite.
      for (let i = 0; i < data.length; i += 2) {
        const radius = deviation * Math.sqrt(-2 * Math.log(1 - random()))
        const angle = 2 * Math.PI * random()
        data[i] = radius * Math.cos(angle)
        if (i + 1 < data.length) data[i + 1] = radius * Math.sin(angle)
        if (i % SLICE === 0) await setImmediate()
      }
    }
    await weights.device.upload(value, weights.dtype === 'f32' ? data : Uint16Array.from(data, toBfloat16))
  }
  await weights.clearPadding()
}
