import { RopewalkError } from '../errors.js'
import { fromBfloat16 } from '../runtime/bfloat16.js'
import type { Device } from '../runtime/device.js'
import { sumSquares } from '../runtime/ops.gen.js'
import { Recorder } from '../runtime/recorder.js'
import type { DType, Tensor } from '../runtime/tensor.js'
import type { Parameters } from './parameters.js'

/** Throws, naming the first, where a weight is NaN or infinite. One read of the weights on the device. */
export async function requireFinite(weights: Parameters, path: string): Promise<void> {
  const { device } = weights
  const whole = weights.flat(weights.buffer, weights.dtype)
  if (Number.isFinite(await sumOfSquares(device, whole))) return
  for (const { name, value } of weights) {
    if (Number.isFinite(await sumOfSquares(device, value))) continue
    const bytes = await device.download(value)
    const bad = firstNonFinite(bytes, weights.dtype)
    if (bad === undefined) continue // finite, but its square is not
    throw new RopewalkError(
      'ERR_NOT_FINITE',
      `${path}: ${name} has ${bad.value} at element ${bad.index}: the weights are damaged. Use an earlier ` +
        'checkpoint, or download the model again',
    )
  }
}

async function sumOfSquares(device: Device, x: Tensor): Promise<number> {
  const recorder = new Recorder(device, 'finite check')
  const { y } = sumSquares(recorder, { x })
  const plan = recorder.plan({ keep: [y] })
  try {
    await plan.run()
    return (await device.downloadFloats(plan.located(y)))[0]!
  } finally {
    plan.dispose()
  }
}

function firstNonFinite(bytes: Uint8Array, dtype: DType): { index: number; value: number } | undefined {
  const data = dtype === 'bf16' ? new Uint16Array(bytes.buffer) : new Float32Array(bytes.buffer)
  for (let index = 0; index < data.length; index++) {
    const value = dtype === 'bf16' ? fromBfloat16(data[index]!) : data[index]!
    if (!Number.isFinite(value)) return { index, value }
  }
  return undefined
}
