import { Device } from '../runtime/device.js'
import { fill, matmulNt } from '../runtime/ops.gen.js'
import { Recorder } from '../runtime/recorder.js'

/** Rows, columns and depth of the product: large enough for full speed, a few milliseconds on any processor. */
const SIZE = 768
const RUNS = 4

/**
 * What a device of this kind and number of threads can do, in floating-point operations a second: the best of a few large matrix products. This is the
 * denominator of MFU where the user names no other (a data sheet's peak).
 */
export async function measurePeak({ name, threads }: Device): Promise<number> {
  // A device of its own: the model's holds what the plan says and nothing else.
  using device = Device.open(name, { threads })
  const start = new Recorder(device, 'peak: operands')
  const [a, b] = [device.tensor('f32', [SIZE, SIZE], 'operand a'), device.tensor('f32', [SIZE, SIZE], 'operand b')]
  fill(start, { y: a, value: 0.5 })
  fill(start, { y: b, value: 0.25 })
  const recorder = new Recorder(device, 'peak')
  matmulNt(recorder, { a, b })
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
