// Random data on a device. Random, because zeros compress, switch fewer transistors, and flatter a matrix product.
import type { Parameters } from '../model/parameters.js'
import { toBfloat16 } from '../runtime/bfloat16.js'
import type { Device } from '../runtime/device.js'
import { cast, fill } from '../runtime/ops.gen.js'
import { Recorder } from '../runtime/recorder.js'
import { DTYPE_BYTES, type DType, type PlainDType, Tensor } from '../runtime/tensor.js'

/** Random numbers that are made here, once; larger tensors are filled with copies of them, on the device. */
const POOL = 4 << 20
/** So few are made anew. */
const FEW = 1 << 16
const pools = new Map<string, Float32Array | Uint16Array>()

/** Not yet written. */
export const result = (device: Device, dtype: DType, dims: readonly number[]): Tensor =>
  device.tensor(dtype, dims, 'results')

export async function integers(device: Device, dims: number[], of: (i: number) => number): Promise<Tensor> {
  const tensor = device.tensor('i32', dims, 'integers')
  const values = Int32Array.from({ length: tensor.size }, (_, i) => of(i))
  await device.upload(tensor, values)
  return tensor
}

/** Rows of random tokens. */
export function randomTokens(rows: number, time: number, vocabulary: number): number[][] {
  const row = (): number[] => Array.from({ length: time }, () => Math.floor(vocabulary * Math.random()))
  return Array.from({ length: rows }, row)
}

/** Uniform numbers in (-scale, scale). */
export async function random(device: Device, dtype: PlainDType, dims: readonly number[], scale = 1): Promise<Tensor> {
  const tensor = device.tensor(dtype, dims, 'random numbers')
  if (tensor.size <= POOL) {
    await device.upload(tensor, numbers(tensor.size, dtype, scale))
    return tensor
  }
  await withPool(device, dtype, scale, (recorder, pool) => spread(recorder, pool, tensor))
  return tensor
}

/** Random weights, norms 1: a model of 7B is ready in seconds, which it is not where the host makes every number. */
export async function randomWeights(weights: Parameters): Promise<void> {
  const { device, dtype } = weights
  // of the deviation 0.02, as transformers initialises them
  await withPool(device, dtype, 0.02 * Math.sqrt(3), (recorder, pool) => {
    for (const { value } of weights) {
      if (value.dims.length > 1) spread(recorder, pool, value)
      else fill(recorder, { y: value, value: 1 })
    }
  })
  await weights.clearPadding()
}

function numbers(size: number, dtype: DType, scale: number): Float32Array | Uint16Array {
  const make = (count: number): Float32Array | Uint16Array => {
    const data = new Float32Array(count)
    for (let i = 0; i < count; i++) data[i] = scale * (2 * Math.random() - 1)
    return dtype === 'bf16' ? Uint16Array.from(data, toBfloat16) : data
  }
  if (size <= FEW) return make(size)
  const key = `${dtype} ${scale}`
  if (!pools.has(key)) pools.set(key, make(POOL))
  const start = Math.floor((POOL - size) * Math.random())
  return pools.get(key)!.subarray(start, start + size)
}

async function withPool(
  device: Device,
  dtype: PlainDType,
  scale: number,
  record: (recorder: Recorder, pool: Tensor) => void,
): Promise<void> {
  const buffer = device.alloc(POOL * DTYPE_BYTES[dtype], 'random numbers')
  try {
    const pool = new Tensor(buffer, 0, dtype, [POOL])
    await device.upload(pool, numbers(POOL, dtype, scale))
    const recorder = new Recorder(device, 'random numbers')
    record(recorder, pool)
    const plan = recorder.plan()
    try {
      await plan.run()
    } finally {
      plan.dispose()
    }
  } finally {
    buffer.dispose()
  }
}

function spread(recorder: Recorder, pool: Tensor, to: Tensor): void {
  const flat = to.view(to.size)
  for (let at = 0; at < to.size; at += POOL) {
    const count = Math.min(POOL, to.size - at)
    cast(recorder, { x: pool.rows(0, count), y: flat.rows(at, count) })
  }
}
