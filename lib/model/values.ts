// Values of parameters on their way to and from the host, quantised ones too.
import type { Buffer, Device } from '../runtime/device.js'
import { dequantize, quantize } from '../runtime/ops.gen.js'
import { Recorder } from '../runtime/recorder.js'
import { isQuantized, type Tensor } from '../runtime/tensor.js'
import { convert, type HostTensor } from './batch.js'

/** Rounds x to the form of `to`. */
export async function quantizeFrom(device: Device, x: Tensor, to: Tensor): Promise<void> {
  const recorder = new Recorder(device, 'quantize')
  quantize(recorder, { x, y: to })
  const plan = recorder.plan()
  try {
    await plan.run()
  } finally {
    plan.dispose()
  }
}

/** In their own dtype; of quantised ones what they stand for, in float32. */
export async function readValues(device: Device, value: Tensor): Promise<HostTensor<Float32Array | Uint16Array>> {
  const dims = [...value.dims]
  if (isQuantized(value.dtype)) return { type: 'float32', dims, data: await dequantized(device, value) }
  const { buffer } = await device.download(value)
  if (value.dtype === 'f32') return { type: 'float32', dims, data: new Float32Array(buffer) }
  return { type: 'bfloat16', dims, data: new Uint16Array(buffer) }
}

async function dequantized(device: Device, x: Tensor): Promise<Float32Array> {
  const recorder = new Recorder(device, 'dequantize')
  const { y } = dequantize(recorder, { x, y: recorder.scratch('f32', x.dims, 'dequantised') })
  const plan = recorder.plan({ keep: [y] })
  try {
    await plan.run()
    return await device.downloadFloats(plan.located(y))
  } finally {
    plan.dispose()
  }
}

/**
 * What a tensor of the caller is for a parameter: in its dtype, for a quantised one in float32. Throws TypeError or
 * RangeError where it does not serve.
 */
export function checkValues(
  name: string,
  tensor: HostTensor,
  { dtype, dims, size }: Tensor,
): Float32Array | Uint16Array {
  if (!tensor || !Array.isArray(tensor.dims) || !ArrayBuffer.isView(tensor.data)) {
    throw new TypeError(`${name}: expected a tensor { type, dims, data }`)
  }
  if (tensor.dims.join() !== dims.join() || tensor.data.length !== size) {
    throw new RangeError(`${name}: dims are (${tensor.dims.join(',')}), expected (${dims.join(',')})`)
  }
  const data = convert(name, tensor, dtype === 'bf16' ? 'bfloat16' : 'float32')
  const bad = isQuantized(dtype) ? data.findIndex((x) => !Number.isFinite(x)) : -1
  if (bad >= 0) throw new RangeError(`${name}: element ${bad} is ${data[bad]}, which cannot be quantised`)
  return data
}

/** Puts them there; quantises where that is how the parameter is kept. */
export async function writeValues(device: Device, data: Float32Array | Uint16Array, to: Tensor): Promise<void> {
  if (!isQuantized(to.dtype)) return device.upload(to, data)
  const x = device.tensor('f32', to.dims, 'a matrix to be quantised')
  try {
    await device.upload(x, data)
    await quantizeFrom(device, x, to)
  } finally {
    ;(x.storage as Buffer).dispose()
  }
}
