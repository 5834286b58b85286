import t, { type Test } from 'tap'
import { adamw, adamw8bit } from '../../lib/runtime/ops.gen.js'
import { Recorder } from '../../lib/runtime/recorder.js'
import { type DType, Tensor } from '../../lib/runtime/tensor.js'
import {
  fromBits,
  M_DECODED,
  M_VALUES,
  nearestBytes,
  split,
  type Update8bit,
  update8bit,
  V_DECODED,
  V_VALUES,
} from './adamw-reference.js'
import {
  availability,
  checkShapes,
  combination,
  encode,
  FLOATS,
  type HostTensor,
  type OpCase,
  Random,
  runAll,
  seeds,
  tensor,
  variants,
} from './harness.js'

const KEEPS = ['f32', 'master', 'low', 'stochastic'] as const
type Keep = (typeof KEEPS)[number]

function kept(keep: Keep, weights: Float64Array): Pick<Update8bit, 'p' | 'master' | 'low'> {
  const dims = [weights.length]
  const halves = Array.from(weights, (x) => split(Math.fround(x)))
  const [upper, lower] = [halves.map(([p]) => p), halves.map(([, low]) => low)]
  return {
    p: keep === 'f32' ? tensor('f32', dims, weights) : tensor('bf16', dims, upper),
    master: keep === 'master' ? tensor('f32', dims, weights) : undefined,
    low: keep === 'low' ? tensor('u16', dims, lower) : undefined,
  }
}

const hyperOf = (rate: number, step: number, scale = 1, apply = 1): HostTensor =>
  tensor('f32', [8], [rate, 1 - 0.9 ** step, 1 - 0.999 ** step, 1, scale, 3, apply, step])

const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0

/** All that an op wrote, decoded, after a check that every variant gave the same bits. */
async function results(t: Test, label: string, args: Update8bit, shift = 0): Promise<Record<string, Float64Array>> {
  const c: Omit<OpCase, 'reference'> = { op: 'adamw_8bit', label, args: { ...args }, shift }
  const all = [...(await runAll(t, c)).values()]
  const one = all[0]!
  const equal = all.every((bytes) => [...bytes].every(([field, data]) => same(data, one.get(field)!)))
  if (!equal) t.fail(`${label}: the bits differ between variants`)
  return Object.fromEntries(
    [...one].map(([field, bytes]) => {
      const data = bytes.slice().buffer
      const { dtype } = args[field as 'p' | 'm']
      if (dtype === 'f32') return [field, Float64Array.from(new Float32Array(data))]
      if (dtype === 'u8') return [field, Float64Array.from(new Uint8Array(data))]
      const halves = new Uint16Array(data)
      return [field, Float64Array.from(halves, (x) => (dtype === 'u16' ? x : fromBits((x << 16) >>> 0)))]
    }),
  )
}

/** The values of a map around that of a byte. */
const around = (values: readonly number[]): [number | undefined, number | undefined][] => {
  const sorted = [...values].sort((a, b) => a - b)
  return values.map((x) => [sorted[sorted.indexOf(x) - 1], sorted[sorted.indexOf(x) + 1]])
}
const AROUND = { m: around(M_VALUES), v: around(V_VALUES) }

/** Half of the distance between the value of a byte and the next one, on the side of x. */
function halfStep(kind: 'm' | 'v', values: readonly number[], byte: number, x: number): number {
  const [below, above] = AROUND[kind][byte]!
  const next = x > values[byte]! ? above : below
  return next === undefined ? 0 : Math.abs(next - values[byte]!) / 2
}

/**
 * Runs an update and compares it with the reference: weights and scales bit by bit; a byte is the nearest one to the
 * exact state, whose distance is half a step of the map at most.
 */
async function checkUpdate(t: Test, label: string, args: Update8bit, shift = 0): Promise<Record<string, Float64Array>> {
  const got = await results(t, label, args, shift)
  const want = update8bit(args)
  const problems: string[] = []
  for (const field of ['p', 'master', 'low', 'm_scale', 'v_scale']) {
    const [a, b] = [got[field], want[field]]
    if (!a && !b) continue
    const at = b!.findIndex((x, i) => !Object.is(x, a![i]))
    if (at >= 0) problems.push(`${field}[${at}] is ${a![at]}, expected ${b![at]}`)
  }
  for (const [kind, values] of [
    ['m', M_VALUES],
    ['v', V_VALUES],
  ] as const) {
    for (let i = 0; i < args.p.size; i++) {
      const byte = got[kind]![i]!
      const scale = want[`${kind}_scale`]![Math.floor(i / 256)]!
      const exact = want[kind]![i]!
      if (Number.isNaN(scale)) continue
      const x = scale === 0 ? 0 : Math.max(-1, Math.min(1, exact / scale))
      const nearest = nearestBytes(kind, x)
      // less than the smallest value of v is not 0, even where the quotient is
      if (kind === 'v' && exact > 0 && nearest[0] === 0) nearest.push(1)
      if (!nearest.includes(byte)) problems.push(`${kind}[${i}] is ${byte} for ${x} of the scale, expected ${nearest}`)
      const error = Math.abs(values[byte]! - x)
      // There is no -1: what is below the last value has that one. A v > 0 has no 0: it has the smallest value.
      const last = x < -0.99 || (kind === 'v' && byte === 1)
      const allowed = last ? (kind === 'v' ? values[1]! : 0.0071) : halfStep(kind, values, byte, x) + 2e-6 * Math.abs(x)
      if (error > allowed) problems.push(`${kind}[${i}]: ${x} of the scale is stored as ${values[byte]}`)
      if (problems.length > 5) break
    }
  }
  t.strictSame(problems, [], `adamw_8bit ${label}`)
  return got
}

const scales = (N: number, value: (block: number) => number): HostTensor => tensor('f32', [N / 256], value)
const rest = { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, seed: 0, first: 0 }

t.test('the map is that of bitsandbytes, and bytes of 0 are 0', async (t) => {
  for (const [values, decoded] of [
    [M_VALUES, M_DECODED],
    [V_VALUES, V_DECODED],
  ] as const) {
    t.equal(new Set(decoded).size, 256, 'all values differ')
    const off = values.findIndex((x, byte) => Math.abs(x - decoded[byte]!) > 2e-6 * Math.abs(x))
    t.equal(off, -1, 'as the list from its definition')
    t.ok(Object.is(decoded[0], 0))
    t.equal(decoded.indexOf(1), values.indexOf(1), '1 is exact')
  }
  t.equal(M_VALUES.indexOf(1), 128)
  t.equal(V_VALUES.indexOf(1), 255)
  t.ok(Math.abs(Math.min(...M_VALUES) + 0.99296875) < 1e-12, 'no -1')
})

t.test('adamw_8bit: every byte is decoded as it should, nearest are stored', availability(), async (t) => {
  // A step that changes no moment (beta = 1) is a decoding and an encoding: every byte comes back, but for those of
  // blocks whose largest value is not the whole scale.
  const N = 512
  const m = tensor('u8', [N], (i) => i % 256)
  const args: Update8bit = {
    ...kept('f32', new Float64Array(N)),
    ...{ g: tensor('f32', [N], () => 0), m, v: m, hyper: hyperOf(1e-3, 5), ...rest },
    m_scale: scales(N, (block) => [0.37, 3e-30][block]!),
    v_scale: scales(N, (block) => [1.3e-5, 1e30][block]!),
    beta1: 1,
    beta2: 1,
    eps: 1e-3,
  }
  const got = await checkUpdate(t, 'all bytes', args)
  t.strictSame(got['m'], m.values, 'm')
  t.strictSame(got['v'], m.values, 'v')
})

t.test('adamw_8bit', availability(), async (t) => {
  const random = new Random(7)
  // Blocks of states, of which a block of the CUDA kernel takes 8; the last ones are more than the emulated GPU takes at a time.
  const sizes = [...Array.from({ length: 22 }, (_, i) => 1 + i), 64, 65, 129].map((blocks) => 256 * blocks)
  for (const i of seeds(8 * sizes.length)) {
    const [keep, G, N] = combination(i, KEEPS, FLOATS, sizes)
    const args: Update8bit = {
      ...kept(
        keep,
        Float64Array.from({ length: N }, () => random.pick([0, 1e-3, 1]) * random.normal()),
      ),
      g: tensor(G, [N], () => random.pick([0, 1e-6, 1e-3, 1]) * random.normal()),
      m: tensor('u8', [N], () => random.int(0, 255)),
      v: tensor('u8', [N], () => random.int(0, 255)),
      m_scale: scales(N, () => random.pick([0, 1e-3, 1]) * random.next()),
      v_scale: scales(N, () => random.pick([0, 1e-6, 1]) * random.next()),
      hyper: hyperOf(random.pick([1e-5, 1e-2]), random.pick([1, 2, 1000]), random.pick([1, 0.37])),
      beta1: 0.9,
      beta2: random.pick([0.999, 0.95]),
      eps: random.pick([1e-8, 1e-3]),
      weight_decay: random.pick([0, 0.1]),
      seed: random.pick([0, 1, 2 ** 53 - 1]),
      first: random.pick([0, 256, 2 ** 32 - 100, 2 ** 40 - 3]),
    }
    await checkUpdate(t, `${N} ${keep}, gradients ${G}, first ${args.first}`, args, i % 3)
  }
})

t.test('adamw_8bit: worst cases', availability(), async (t) => {
  const random = new Random(8)
  const N = 256
  const blank = tensor('u8', [N], () => 0)
  const cases: Record<string, (i: number) => number> = {
    zeros: () => 0,
    'one number': (i) => (i === 100 ? 0.3 : 0),
    'one outlier': (i) => (i === 17 ? -1e6 : 1e-3 * random.normal()),
    'one outlier among tiny ones': (i) => (i === 255 ? 1e9 : 1e-9 * random.normal()),
    denormals: () => 1e-39 * random.normal(),
    'the smallest numbers': () => 1.4e-45 * random.int(-9, 9),
    'squares that are denormal': () => 1e-20 * random.normal(),
    'squares that vanish': () => 1e-30 * random.normal(),
    huge: () => 1e18 * random.normal(),
    'squares that overflow': (i) => (i % 2 ? 1e30 : 1e-3) * random.normal(),
    'all the same, negative': () => -0.125,
    infinity: (i) => (i === 3 ? Infinity : random.normal()),
  }
  for (const [label, g] of Object.entries(cases)) {
    for (const keep of KEEPS) {
      const args: Update8bit = {
        ...kept(
          keep,
          Float64Array.from({ length: N }, () => random.normal()),
        ),
        ...{ g: tensor('f32', [N], g), m: blank, v: blank, m_scale: scales(N, () => 0), v_scale: scales(N, () => 0) },
        ...{ hyper: hyperOf(1e-3, 1), ...rest },
      }
      const got = await checkUpdate(t, `${label}, ${keep}`, args)
      if (label !== 'infinity') {
        t.ok(
          Object.values(got).every((values) => values.every(Number.isFinite)),
          `${label}: all is finite`,
        )
      }
      if (label === 'zeros') {
        t.ok(
          ['m', 'v', 'm_scale', 'v_scale'].every((field) => got[field]!.every((x) => Object.is(x, 0))),
          'states stay 0',
        )
      }
      t.ok(
        got['v']!.every((byte, i) => byte > 0 || update8bit(args)['v']![i] === 0),
        `${label}: no v becomes 0`,
      )
    }
  }
})

t.test('adamw_8bit: NaN makes its block NaN, and no other one', availability(), async (t) => {
  const N = 768
  const args: Update8bit = {
    ...kept('stochastic', new Float64Array(N).fill(0.5)),
    g: tensor('f32', [N], (i) => (i === 300 ? NaN : 0.1)),
    ...{ m: tensor('u8', [N], () => 0), v: tensor('u8', [N], () => 0) },
    ...{ m_scale: scales(N, () => 0), v_scale: scales(N, () => 0), hyper: hyperOf(1e-3, 1), ...rest },
  }
  const once = await checkUpdate(t, 'NaN', args)
  for (const field of ['m_scale', 'v_scale']) {
    t.strictSame(
      [...once[field]!].map((x) => Number.isNaN(x)),
      [false, true, false],
      field,
    )
  }
  const again = await checkUpdate(t, 'after NaN', {
    ...args,
    g: tensor('f32', [N], () => 0.1),
    p: tensor('bf16', [N], once['p']!),
    m: tensor('u8', [N], once['m']!),
    v: tensor('u8', [N], once['v']!),
    m_scale: scales(N, (block) => once['m_scale']![block]!),
    v_scale: scales(N, (block) => once['v_scale']![block]!),
  })
  t.ok(again['p']!.every((x, i) => Number.isNaN(x) === (i >= 256 && i < 512)))
})

t.test('adamw_8bit: nothing changes where the update is not to be applied', availability(), async (t) => {
  const random = new Random(9)
  const N = 512
  for (const keep of KEEPS) {
    for (const apply of [0, NaN, 0.5]) {
      const args: Update8bit = {
        ...kept(
          keep,
          Float64Array.from({ length: N }, () => random.normal()),
        ),
        ...{ g: tensor('f32', [N], () => NaN), hyper: hyperOf(1e-3, 1, 1, apply), ...rest },
        ...{ m: tensor('u8', [N], (i) => i % 256), v: tensor('u8', [N], (i) => (3 * i) % 256) },
        ...{ m_scale: scales(N, () => 0.5), v_scale: scales(N, () => 0.25) },
      }
      const all = await runAll(t, { op: 'adamw_8bit', label: 'skipped', args: { ...args } })
      const changed = [...all].flatMap(([variant, bytes]) =>
        [...bytes].flatMap(([field, data]) => (same(data, encode(args[field as 'p'])) ? [] : [`${variant}: ${field}`])),
      )
      t.strictSame(changed, [], `${keep}, apply ${apply}`)
    }
  }
})

t.test('adamw_8bit: an update in several operations has the bits of one', availability(), async (t) => {
  const N = 256 * 9
  const random = new Random(10)
  const args: Update8bit = {
    ...kept(
      'stochastic',
      Float64Array.from({ length: N }, () => random.normal()),
    ),
    g: tensor('bf16', [N], () => random.normal()),
    m: tensor('u8', [N], () => random.int(0, 255)),
    v: tensor('u8', [N], () => random.int(0, 255)),
    ...{ m_scale: scales(N, () => random.next()), v_scale: scales(N, () => random.next()) },
    ...{ hyper: hyperOf(1e-2, 3), ...rest, seed: 11, first: 2 ** 32 - 1000 },
  }
  const whole = await results(t, 'one operation', args)
  const bounds = [0, 256, 256 * 5, N]
  for (let i = 0; i + 1 < bounds.length; i++) {
    const [from, to] = [bounds[i]!, bounds[i + 1]!]
    const part = (x: HostTensor, by = 1): HostTensor =>
      tensor(x.dtype, [(to - from) / by], x.values.subarray(from / by, to / by))
    const { p, g, m, v, m_scale, v_scale } = args
    const states = { m: part(m), v: part(v), m_scale: part(m_scale, 256), v_scale: part(v_scale, 256) }
    const got = await results(t, `${from} .. ${to}`, {
      ...{ ...args, p: part(p), g: part(g), ...states },
      first: args.first + from,
    })
    for (const field of ['p', 'm', 'v']) {
      t.strictSame(got[field], whole[field]!.subarray(from, to), `${field} ${from} .. ${to}`)
    }
  }
})

t.test('adamw_8bit: what does not go together is an error at record time', availability(), async (t) => {
  const [{ device }] = variants() as [ReturnType<typeof variants>[0]]
  const of = (dtype: DType, size: number): Tensor => device.tensor(dtype, [size], dtype)
  const record = (N: number, blocks: number, changes: object) => () => {
    const states = { m: of('u8', N), v: of('u8', N), m_scale: of('f32', blocks), v_scale: of('f32', blocks) }
    const all = { p: of('bf16', N), g: of('f32', N), ...states, hyper: of('f32', 8), ...rest, ...changes }
    adamw8bit(new Recorder(device, 'test'), all)
  }
  record(512, 2, {})()
  t.throws(record(500, 2, {}), { name: 'RangeError', message: /N is 500, but must be divisible by 256/ })
  t.throws(record(512, 3, {}), { name: 'RangeError', message: /N\/256 is 3, expected 2/ })
  t.throws(record(512, 2, { m: of('bf16', 512) }), { name: 'TypeError', message: /m .*dtype is bf16, expected u8/ })
  t.throws(record(512, 2, { low: of('u16', 512), master: of('f32', 512) }), { name: 'TypeError', message: /both/ })
  t.throws(record(512, 2, { first: -1 }), { name: 'RangeError', message: /adamw_8bit: first is -1/ })
})

/** Least squares over more equations than unknowns: the loss does not go to 0, so that 1 % of it means something. */
class Regression {
  readonly a: Float64Array
  readonly b: Float64Array
  constructor(
    readonly unknowns: number,
    readonly equations: number,
  ) {
    const random = new Random(12)
    // columns of very different sizes, as gradients of a model have
    this.a = Float64Array.from({ length: unknowns * equations }, (_, i) => random.normal() * 10 ** (-(i % 4) / 2))
    const truth = Float64Array.from({ length: unknowns }, () => random.normal())
    this.b = this.residuals(truth, new Float64Array(equations)).map((x) => x + 0.5 * random.normal())
  }

  private residuals(w: ArrayLike<number>, b: Float64Array): Float64Array {
    return b.map((x, row) => {
      let sum = -x
      for (let i = 0; i < this.unknowns; i++) sum += this.a[row * this.unknowns + i]! * w[i]!
      return sum
    })
  }

  loss(w: ArrayLike<number>): { loss: number; gradient: Float32Array } {
    const residuals = this.residuals(w, this.b)
    const gradient = new Float32Array(this.unknowns)
    residuals.forEach((x, row) => {
      for (let i = 0; i < this.unknowns; i++) gradient[i]! += (x * this.a[row * this.unknowns + i]!) / this.equations
    })
    return { loss: residuals.reduce((sum, x) => sum + x * x, 0) / (2 * this.equations), gradient }
  }
}

t.test('adamw_8bit: the loss of a regression after 1000 steps is that of f32 AdamW', availability(), async (t) => {
  const problem = new Regression(512, 640)
  const N = problem.unknowns
  const { device } = variants().at(-1)!
  const train = async (eight: boolean): Promise<number> => {
    const p = device.tensor('f32', [N], 'p')
    const g = device.tensor('f32', [N], 'g')
    const hyper = device.tensor('f32', [8], 'hyper')
    const zero = async (dtype: DType, size: number): Promise<Tensor> => {
      const to = device.tensor(dtype, [size], 'state')
      await device.upload(to, new Uint8Array(to.bytes))
      return to
    }
    await device.upload(p, new Float32Array(N))
    const recorder = new Recorder(device, 'step')
    const common = { p, g, hyper, ...rest, beta2: 0.95, weight_decay: 0 }
    if (eight) {
      const [m, v, m_scale, v_scale] = await Promise.all([
        ...[zero('u8', N), zero('u8', N)],
        ...[zero('f32', N / 256), zero('f32', N / 256)],
      ])
      adamw8bit(recorder, { ...common, m: m!, v: v!, m_scale: m_scale!, v_scale: v_scale! })
    } else adamw(recorder, { ...common, m: await zero('f32', N), v: await zero('f32', N) })
    const plan = recorder.plan()
    let loss = 0
    for (let step = 1; step <= 1000; step++) {
      const now = problem.loss(await device.downloadFloats(p))
      loss = now.loss
      await device.upload(g, now.gradient)
      await device.upload(hyper, Float32Array.of(1e-2, 1 - 0.9 ** step, 1 - 0.95 ** step, 0, 1, 1, 1, step))
      await plan.run()
    }
    plan.dispose()
    return loss
  }
  const start = problem.loss(new Float64Array(N)).loss
  const [f32, eight] = [await train(false), await train(true)]
  t.ok(f32 < 1e-3 * start, `f32: ${start} to ${f32}`)
  t.ok(Math.abs(eight / f32 - 1) < 0.01, `f32 ${f32}, 8 bits ${eight}`)
})

t.test('at least 200 shapes', availability(), async (t) => checkShapes(t, 'adamw_8bit'))
