import t, { type Test } from 'tap'
import { dequantize, quantize } from '../../lib/runtime/ops.gen.js'
import { Recorder } from '../../lib/runtime/recorder.js'
import { type DType, Tensor, tensorBytes } from '../../lib/runtime/tensor.js'
import { M_VALUES } from './adamw-reference.js'
import {
  availability,
  BLOCKS,
  check,
  combination,
  FLOATS,
  type HostTensor,
  ODD,
  output,
  Random,
  tensor,
  variants,
} from './harness.js'
import { ABSMAX_MAP, dequantized, type Format, FORMATS, NF4, packed, quantized } from './quantized-reference.js'

/** Quantises x and compares every byte; then dequantises that to both dtypes. Gives the values in f32. */
async function checkRound(t: Test, label: string, format: Format, x: HostTensor): Promise<Float64Array> {
  const bytes = quantized(format, x.values)
  t.equal(bytes.length, tensorBytes(format, x.size))
  await check(t, {
    op: 'quantize',
    label: `${label}, ${format}`,
    args: { x, y: { ...output(format, x.dims) } },
    reference: () => ({ y: bytes }),
    bitwise: true,
  })
  const values = dequantized(format, bytes, x.size)
  for (const G of FLOATS) {
    await check(t, {
      op: 'dequantize',
      label: `${label}, ${format} to ${G}`,
      args: { x: packed(format, x.dims, bytes), y: output(G, x.dims) },
      reference: () => ({ y: values }),
      bitwise: true,
    })
  }
  return values
}

t.test('quantize, dequantize', availability(), async (t) => {
  const random = new Random(1)
  const sizes = [...ODD, ...BLOCKS, 64 * 255, 64 * 256, 64 * 257, 64 * 513 + 5]
  for (let i = 0; i < 200; i++) {
    const [format, F, N] = combination(i, FORMATS, FLOATS, sizes)
    const spread = random.pick([1e-3, 1, 30])
    const x = tensor(F, [N], () => spread * random.normal())
    const values = await checkRound(t, `${N} ${F}`, format, x)
    // No element is further off than half of the widest gap of the codes, of what its block's largest one is, and than
    // what rounding that one adds.
    const gap = format === 'nf4' ? (NF4[1]! - NF4[0]!) / 2 : 0.5 / 127
    const scales = Array.from({ length: Math.ceil(N / 64) }, (_, b) =>
      Math.max(...x.values.subarray(64 * b, 64 * b + 64).map(Math.abs)),
    )
    const mean = scales.reduce((sum, one) => sum + one, 0) / scales.length
    const off = Math.max(...scales.map((one) => Math.abs(one - mean)))
    const coarse = format === 'nf4' ? (0.9 / 128 + 1e-6) * off : 0
    const bad = values.findIndex((value, i) => {
      return Math.abs(value - x.values[i]!) > (gap + 1e-6) * scales[i >> 6]! + coarse
    })
    t.equal(bad, -1, `${format} ${N}: ${values[bad]} for ${x.values[bad]}`)
  }
})

t.test('the map of absmax is the one of 8-bit states', async (t) => {
  const sorted = [...M_VALUES].sort((a, b) => a - b)
  t.equal(ABSMAX_MAP.length, 256)
  t.ok(ABSMAX_MAP.every((x, i) => Math.abs(x - sorted[i]!) <= 2 ** -23 * Math.abs(x)))
})

t.test('quantize: worst cases', availability(), async (t) => {
  const random = new Random(2)
  const cases: Record<string, (i: number) => number> = {
    zeros: () => 0,
    'negative zeros': () => -0,
    'one number': (i) => (i === 100 ? 0.3 : 0),
    'one outlier': (i) => (i === 17 ? -1e6 : 1e-3 * random.normal()),
    'zeros in one block': (i) => (i >> 6 === 2 ? 0 : random.normal()),
    'all the same': () => -0.125,
    'blocks of one number each': (i) => (i >> 6) * 0.01,
    denormals: () => 1e-39 * random.normal(),
    'the smallest numbers': () => 1.4e-45 * random.int(-9, 9),
    huge: () => 3e38 * random.uniform(),
    'blocks of all sizes': (i) => 10 ** ((i >> 6) % 60) * 1e-30 * random.normal(),
    'halfway between the values of nf4': (i) => (i % 64 === 0 ? 1 : (NF4[i % 15]! + NF4[(i % 15) + 1]!) / 2),
    'halfway between whole numbers': (i) => (i % 64 === 0 ? 127 : (i % 254) - 126.5),
  }
  for (const [label, make] of Object.entries(cases)) {
    for (const format of FORMATS) {
      for (const N of [64 * 5, 64 * 300 + 13]) {
        const values = await checkRound(t, `${label} ${N}`, format, tensor('f32', [N], make))
        t.ok(values.every(Number.isFinite), `${label}: finite`)
        if (/zeros$/.test(label)) t.ok(values.every((x) => x === 0))
        if (label === 'all the same') t.ok(values.every((x) => x === -0.125))
      }
    }
  }
})

t.test('quantize: what is not finite spoils its block, in nf4 the whole', availability(), async (t) => {
  for (const format of FORMATS) {
    for (const bad of [NaN, Infinity, -Infinity]) {
      const x = tensor('f32', [64 * 300], (i) => (i === 100 ? bad : 0.5))
      const bytes = quantized(format, x.values)
      await check(t, {
        op: 'dequantize',
        label: `${format}, ${bad}`,
        args: { x: packed(format, x.dims, bytes), y: output('f32', x.dims) },
        reference: () => ({ y: dequantized(format, bytes, x.size) }),
        bitwise: true,
      })
      const spoilt = (values: Float32Array | Float64Array) => values.filter((value) => !Number.isFinite(value)).length
      t.equal(spoilt(dequantized(format, bytes, x.size)), format === 'nf4' ? x.size : 64)
      const { device } = variants()[0]!
      const [from, to] = [device.tensor('f32', [x.size], 'x'), device.tensor(format, [x.size], 'y')]
      const back = device.tensor('f32', [x.size], 'back')
      await device.upload(from, Float32Array.from(x.values))
      const recorder = new Recorder(device, 'test')
      quantize(recorder, { x: from, y: to })
      dequantize(recorder, { x: to, y: back })
      const plan = recorder.plan()
      await plan.run()
      plan.dispose()
      t.equal(spoilt(await device.downloadFloats(back)), format === 'nf4' ? x.size : 64)
    }
  }
})

t.test('quantize: what does not go together is an error at record time', availability(), async (t) => {
  const { device } = variants()[0]!
  const of = (dtype: DType, size: number): Tensor => device.tensor(dtype, [size], dtype)
  const recorder = new Recorder(device, 'test')
  t.throws(() => quantize(recorder, { x: of('f32', 64) }), { name: 'TypeError', message: /quantize: y is missing/ })
  t.throws(() => quantize(recorder, { x: of('f32', 64), y: of('bf16', 64) }), {
    name: 'TypeError',
    message: /quantize: y \(bf16 bf16 \(64\)\) must be nf4 or int8; cast is for f32 and bf16/,
  })
  t.throws(() => dequantize(recorder, { x: of('f32', 64) }), { name: 'TypeError', message: /x .* must be nf4 or int8/ })
  t.throws(() => quantize(recorder, { x: of('f32', 64), y: of('nf4', 65) }), { name: 'RangeError' })
  t.throws(() => quantize(recorder, { x: of('u8', 64), y: of('nf4', 64) }), { name: 'TypeError', message: /x .*u8/ })
  const whole = of('nf4', 128)
  t.throws(() => whole.rows(0, 1), { name: 'TypeError', message: /is quantised as a whole/ })
  t.throws(() => new Tensor(whole.storage, 8, 'nf4', [64]), { name: 'RangeError', message: /multiple of 16/ })
})
