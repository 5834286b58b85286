// copy_start and copy_wait, as the memory engine uses them: to memory of the host and back, while other operations go
// on. The emulator copies as late as CUDA may, so that what is used too early is not there yet.
import t from 'tap'
import { Device } from '../../lib/runtime/device.js'
import { add, copyStart, copyWait, fill } from '../../lib/runtime/ops.gen.js'
import { Recorder } from '../../lib/runtime/recorder.js'
import { availability, BLOCKS, decode, DRAWN, FLOATS, ODD, Random, RESIDUES } from './harness.js'

const name = process.env['ROPEWALK_TEST_DEVICE'] ?? 'cpu'
const SIZES = new Set([...ODD, ...RESIDUES, ...BLOCKS, ...DRAWN, 255, 256, 1000, 70_001])

for (const dtype of FLOATS) {
  t.test(`there and back, ${dtype}`, availability(), async (t) => {
    t.ok(SIZES.size >= 100, 'and as many of the other dtype')
    using device = Device.open(name)
    const random = new Random(5)
    for (const size of SIZES) {
      const recorder = new Recorder(device, 'there and back')
      const input = device.tensor(dtype, [size], 'input')
      const x = add(recorder, { a: input, b: input }).y
      const host = recorder.scratch(dtype, [size], 'host', true)
      copyStart(recorder, { x, y: host })
      let other = fill(recorder, { y: recorder.scratch('f32', [500], 'other'), value: 1 }).y
      for (let i = 0; i < random.int(0, 70); i++) other = add(recorder, { a: other, b: other }).y // graphs may end here
      copyWait(recorder, { x, y: host })
      // x's memory may be taken now, and is
      const taken = fill(recorder, { y: recorder.scratch(dtype, [size], 'taken'), value: 3 }).y
      const back = recorder.scratch(dtype, [size], 'back')
      copyStart(recorder, { x: host, y: back })
      copyWait(recorder, { x: host, y: back })
      const sum = add(recorder, { a: back, b: taken }).y
      const recorded = recorder.commands.map(({ row }) => row.name)
      for (const op of ['copy_start', 'copy_wait']) t.equal(recorded.filter((one) => one === op).length, 2)
      const plan = recorder.plan({ keep: [sum, other] })
      t.equal(plan.hostBytes, Math.ceil((size * (dtype === 'f32' ? 4 : 2)) / 256) * 256)
      for (let run = 0; run < 3; run++) {
        // small integers are exact in bf16
        const values = Float32Array.from({ length: size }, () => random.int(-20, 20))
        const bytes = dtype === 'f32' ? values : Uint16Array.from(new Uint32Array(values.buffer), (bits) => bits >>> 16)
        await device.upload(input, bytes)
        await plan.run()
        const got = decode(dtype, await device.download(plan.located(sum)))
        t.ok(
          got.every((value: number, i) => value === 2 * values[i]! + 3),
          `${size} elements, run ${run}`,
        )
      }
      t.equal(device.hostBytes, plan.hostBytes)
      plan.dispose()
      t.equal(device.hostBytes, 0)
    }
  })
}

t.test('two copies under way, waited for in their order', availability(), async (t) => {
  using device = Device.open(name)
  const recorder = new Recorder(device, 'two copies')
  const value = (value: number) => fill(recorder, { y: recorder.scratch('f32', [5000], 'x'), value }).y
  const [a, b] = [value(1), value(2)]
  const hosts = [a, b].map((x) => {
    const host = recorder.scratch('f32', [5000], 'host', true)
    copyStart(recorder, { x, y: host })
    return host
  }) as [typeof a, typeof a]
  copyWait(recorder, { x: a, y: hosts[0] })
  copyWait(recorder, { x: b, y: hosts[1] })
  const sums = hosts.map((host) => {
    const back = recorder.scratch('f32', [5000], 'back')
    copyStart(recorder, { x: host, y: back })
    copyWait(recorder, { x: host, y: back })
    return add(recorder, { a: back, b: back }).y
  })
  const plan = recorder.plan({ keep: sums })
  for (let run = 0; run < 3; run++) {
    await plan.run()
    for (const [i, sum] of sums.entries()) {
      const got = await device.downloadFloats(plan.located(sum))
      t.ok(got.every((x) => x === 2 * (i + 1)))
    }
  }
  plan.dispose()
})
