import { RopewalkError } from '../errors.js'
import { fromBfloat16 } from '../runtime/bfloat16.js'
import type { Device } from '../runtime/device.js'
import { sumSquares } from '../runtime/ops.gen.js'
import { Recorder } from '../runtime/recorder.js'
import { isQuantized, type PlainDType, type Tensor } from '../runtime/tensor.js'
import type { Parameters } from './parameters.js'

/** Throws, naming the first, where a weight is NaN or infinite. One read of the weights on the device. */
export async function requireFinite(weights: Parameters, path: string): Promise<void> {
  if (weights.mapped) return // they were checked when they were mapped, and cannot be changed
  const { device } = weights
  const whole = weights.flat(weights.buffer, weights.dtype)
  if (Number.isFinite(await sumOfSquares(device, whole))) return
  for (const { name, value } of weights) {
    if (isQuantized(value.dtype)) continue // nothing that is not finite is ever quantised
    if (Number.isFinite(await sumOfSquares(device, value))) continue
    const index = firstNonFinite(await device.download(value), weights.dtype)
    if (index === -1) continue // finite, but its square is not
    throw await notFinite(path, name, value, index, device)
  }
}

/** The error about element `index` of a parameter. */
export async function notFinite(path: string, name: string, weight: Tensor, index: number, device: Device) {
  const one = weight.view(weight.size).rows(index, 1)
  const bytes = await device.download(one)
  const value = toNumbers(bytes, weight.dtype as PlainDType)[0]
  return new RopewalkError(
    'ERR_NOT_FINITE',
    `${path}: ${name} has ${value} at element ${index}: the weights are damaged. Use an earlier checkpoint, or download ` +
      'the model again',
  )
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

function toNumbers(bytes: Uint8Array, dtype: PlainDType): Float32Array {
  if (dtype === 'f32') return new Float32Array(bytes.buffer)
  return Float32Array.from(new Uint16Array(bytes.buffer), fromBfloat16)
}

const firstNonFinite = (bytes: Uint8Array, dtype: PlainDType): number =>
  toNumbers(bytes, dtype).findIndex((value) => !Number.isFinite(value))
