import { Device } from '../runtime/device.js'
import { fill, matmulNt } from '../runtime/ops.gen.js'
import { Recorder } from '../runtime/recorder.js'
import type { DType } from '../runtime/tensor.js'

/**
 * Rows, columns and depth of the product, and how many make a run: large enough for full speed, a few milliseconds on any
 * processor or GPU. The emulator of the tests has no speed to speak of.
 */
const PRODUCTS = { cpu: [768, 1], cuda: [4096, 8], simt: [64, 1] } as const
const RUNS = 4

/**
 * What a device of this kind and number of threads can do with a model of such weights, in floating-point operations a
 * second: the best of a few large matrix products. This is the denominator of MFU where the user names no other (a data
 * sheet's peak).
 */
export async function measurePeak({ name, threads }: Device, weights: DType): Promise<number> {
  const [size, products] = PRODUCTS[name.replace(/:.*/, '') as keyof typeof PRODUCTS]
  // A device of its own: the model's holds what the plan says and nothing else.
  using device = Device.open(name, { threads })
  const start = new Recorder(device, 'peak: operands')
  const dtype = device.activationsFor(weights)
  const [a, b] = [device.tensor(dtype, [size, size], 'operand a'), device.tensor(dtype, [size, size], 'operand b')]
  fill(start, { y: a, value: 0.5 })
  fill(start, { y: b, value: 0.25 })
  const recorder = new Recorder(device, 'peak', dtype)
  for (let product = 0; product < products; product++) matmulNt(recorder, { a, b })
  await start.plan().run()
  const plan = recorder.plan()
  let best = 0
  for (let run = 0; run < RUNS; run++) {
    const began = performance.now()
    await plan.run()
    best = Math.max(best, plan.flops / ((performance.now() - began) / 1000))
  }
  return best
}
