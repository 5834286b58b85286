import t, { type Test } from 'tap'
import { adamw } from '../../lib/runtime/ops.gen.js'
import { Recorder } from '../../lib/runtime/recorder.js'
import { type DType, Tensor } from '../../lib/runtime/tensor.js'
import {
  availability,
  BLOCKS,
  check,
  checkShapes,
  combination,
  encode,
  FLOATS,
  type HostTensor,
  ODD,
  type Precision,
  Random,
  RESIDUES,
  runAll,
  seeds,
  tensor,
  variants,
  worst,
} from './harness.js'
import { bitsOf, fromBits, joined, randomBits, split, type Update, updateBits } from './adamw-reference.js'

/** As torch.optim.AdamW: decay first, then the bias-corrected step. */
function update({ r }: Precision, u: Update): Record<string, Float64Array> {
  const [rate, correction1, correction2, , scale, , apply] = u.hyper.values as unknown as number[]
  // 1 - beta is taken before it is rounded: 1 - 0.999f would be off by 1.3e-5 of itself
  const [beta1, beta2, rest1, rest2] = [r(u.beta1), r(u.beta2), r(1 - u.beta1), r(1 - u.beta2)]
  const eps = r(u.eps)
  const decay = r(u.weight_decay)
  const from = u.master ?? u.p
  const weight = from.values.slice()
  const m = u.m.values.slice()
  const v = u.v.values.slice()
  if (apply !== 0) {
    for (let i = 0; i < weight.length; i++) {
      const g = r(u.g.values[i]! * scale!)
      weight[i] = r(weight[i]! - r(r(rate! * decay) * weight[i]!))
      m[i] = r(r(beta1 * m[i]!) + r(rest1 * g))
      v[i] = r(r(beta2 * v[i]!) + r(rest2 * r(g * g)))
      const root = r(r(r(Math.sqrt(v[i]!)) / r(Math.sqrt(correction2!))) + eps)
      weight[i] = r(weight[i]! - r(r(rate! / correction1!) * r(m[i]! / root)))
    }
  }
  return { p: apply === 0 ? u.p.values : weight, m, v, ...(u.master && { master: weight }) }
}

/** [learning rate, 1 - beta1^t, 1 - beta2^t, max norm, scale, norm, apply, step] */
const hyperOf = (rate: number, step: number, scale: number, apply = 1): HostTensor =>
  tensor('f32', [8], [rate, 1 - 0.9 ** step, 1 - 0.999 ** step, 1, scale, 3, apply, step])

t.test('adamw', availability(), async (t) => {
  const random = new Random(1)
  // The last size is more than the emulated GPU holds at a time: its grid goes round.
  const sizes = [...ODD, ...RESIDUES, ...BLOCKS, 16383, 16385, 40011]
  for (const i of seeds(4 * sizes.length)) {
    const [W, G, N] = combination(i, FLOATS, FLOATS, sizes)
    const rate = random.pick([1e-3, 0.1])
    const step = random.pick([1, 2, 1000])
    const size = random.pick([0, 0.01, 1]) // weights of 0 show the step itself
    // bf16 weights without f32 masters of some kind are rounded at random: further down
    const master = W === 'bf16' ? tensor('f32', [N], () => size * random.normal()) : undefined
    const args = {
      p: tensor(W, [N], (j) => (master ? master.values[j]! : size * random.normal())),
      master,
      low: undefined,
      g: tensor(G, [N], () => random.normal()),
      m: tensor('f32', [N], () => (step === 1 ? 0 : 0.1 * random.normal())),
      v: tensor('f32', [N], () => (step === 1 ? 0 : 0.01 * random.next())),
      hyper: hyperOf(rate, step, random.pick([1, 0.37])),
      beta1: 0.9,
      beta2: random.pick([0.999, 0.95]),
      eps: random.pick([1e-8, 1e-3]),
      weight_decay: random.pick([0, 0.1]),
      seed: 0,
      first: 0,
    }
    await check(t, {
      op: 'adamw',
      label: `${N} ${W} ${G}${master ? ', master' : ''}, step ${step}, rate ${rate}`,
      args,
      reference: (p) => update(p, args),
    })
  }
})

t.test('adamw: nothing changes, not a bit, where the update is not to be applied', availability(), async (t) => {
  const random = new Random(2)
  for (const W of FLOATS) {
    for (const g of [1, NaN, Infinity]) {
      for (const hasMaster of W === 'bf16' ? [false, true] : [false]) {
        const N = 53
        const args = {
          p: tensor(W, [N], () => random.normal()),
          master: hasMaster ? tensor('f32', [N], () => random.normal()) : undefined, // p is not its rounding: it stays
          low: undefined,
          g: tensor('f32', [N], () => g),
          m: tensor('f32', [N], () => random.normal()),
          v: tensor('f32', [N], () => random.next()),
          hyper: hyperOf(0.1, 3, 1, 0),
          beta1: 0.9,
          beta2: 0.999,
          eps: 1e-8,
          weight_decay: 0.1,
          seed: 0,
          first: 0,
        }
        const results = await check(t, {
          op: 'adamw',
          label: `skipped, ${W}, g ${g}${hasMaster ? ', master' : ''}`,
          args,
          reference: (p) => update(p, args),
          bitwise: true,
        })
        for (const field of ['p', 'm', 'v'] as const) {
          t.equal(Buffer.compare(encode(results[field]!), encode(args[field])), 0, `${field} is as it was`)
        }
      }
    }
  }
})

t.test('adamw: a NaN stays where it is, zero gradients at step 1 give no NaN', availability(), async (t) => {
  const N = 37
  const zeros = tensor('f32', [N], () => 0)
  const args = {
    p: tensor('f32', [N], (i) => i / 8),
    master: undefined,
    low: undefined,
    g: tensor('f32', [N], (i) => (i === 20 ? NaN : 0)),
    m: zeros,
    v: zeros,
    hyper: hyperOf(0.1, 1, 1),
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0,
    seed: 0,
    first: 0,
  }
  const { p } = await check(t, {
    op: 'adamw',
    label: 'NaN and zeros',
    args,
    reference: (precision) => update(precision, args),
  })
  t.ok(p!.values.every((x, i) => (i === 20 ? Number.isNaN(x) : x === i / 8)))
})

t.test('adamw: 50 steps are those of the textbook', availability(), async (t) => {
  // Written independently of `update`: the form with corrected moments, in float64.
  const random = new Random(3)
  const N = 21
  const truth = { p: new Float64Array(N).map(() => random.normal()), m: new Float64Array(N), v: new Float64Array(N) }
  let state: Record<string, HostTensor> = {
    p: tensor('f32', [N], truth.p),
    m: tensor('f32', [N], truth.m),
    v: tensor('f32', [N], truth.v),
  }
  truth.p.set(state['p']!.values)
  for (let step = 1; step <= 50; step++) {
    const g = tensor('f32', [N], () => random.normal())
    const args = {
      p: state['p']!,
      master: undefined,
      low: undefined,
      g,
      m: state['m']!,
      v: state['v']!,
      hyper: hyperOf(1e-2, step, 0.5),
      beta1: 0.9,
      beta2: 0.999,
      eps: 1e-8,
      weight_decay: 0.01,
      seed: 0,
      first: 0,
    }
    state = await check(t, {
      op: 'adamw',
      label: `step ${step}`,
      args,
      reference: (precision) => update(precision, args),
    })
    for (let i = 0; i < N; i++) {
      const gradient = 0.5 * g.values[i]!
      truth.m[i] = 0.9 * truth.m[i]! + 0.1 * gradient
      truth.v[i] = 0.999 * truth.v[i]! + 0.001 * gradient ** 2
      const step1 = truth.m[i]! / (1 - 0.9 ** step)
      const step2 = truth.v[i]! / (1 - 0.999 ** step)
      truth.p[i] = truth.p[i]! - 1e-2 * (step1 / (Math.sqrt(step2) + 1e-8) + 0.01 * truth.p[i]!)
    }
  }
  const error = Math.max(...truth.p.map((x, i) => Math.abs(x - state['p']!.values[i]!)))
  // a weight is rounded to f32 at every step
  const rounding = 50 * 2 ** -24 * Math.max(...truth.p.map(Math.abs))
  t.ok(error < rounding, `off by ${error.toExponential(1)} after 50 steps`)
})

// ---- ways to keep weights and states ----

const KEEPS = ['f32', 'master', 'low', 'stochastic'] as const
type Keep = (typeof KEEPS)[number]

/** p, and master or low, of these f32 weights. */
function kept(keep: Keep, weights: ArrayLike<number>): Pick<Update, 'p' | 'master' | 'low'> {
  const dims = [weights.length]
  const halves = Array.from(weights, (x) => split(Math.fround(x)))
  if (keep === 'f32') return { p: tensor('f32', dims, weights), master: undefined, low: undefined }
  const p = tensor(
    'bf16',
    dims,
    halves.map(([p]) => p),
  )
  const low = tensor(
    'u16',
    dims,
    halves.map(([, low]) => low),
  )
  return {
    p,
    master: keep === 'master' ? tensor('f32', dims, weights) : undefined,
    low: keep === 'low' ? low : undefined,
  }
}

/** Bytes of a result, and where they differ from those of another one. */
const same = (a: Uint8Array | undefined, b: Uint8Array | undefined): boolean => Buffer.compare(a!, b!) === 0

t.test('adamw: the same bits on every device, whatever the dtypes', availability(), async (t) => {
  const random = new Random(4)
  const sizes = [...ODD, ...RESIDUES, ...BLOCKS, 16383, 16385, 40011]
  t.equal(sizes.length % 2, 1, '16 ways and the sizes have no common divisor: all ways meet sizes of all kinds')
  for (const i of seeds(4 * sizes.length)) {
    const [keep, G, S] = combination(i % 16, KEEPS, FLOATS, FLOATS)
    const N = sizes[i % sizes.length]!
    const step = random.pick([1, 2, 70000])
    const args: Update & Record<string, HostTensor | number | undefined> = {
      ...kept(
        keep,
        Float64Array.from({ length: N }, () => random.pick([0, 1e-3, 1]) * random.normal()),
      ),
      g: tensor(G, [N], () => random.pick([0, 1e-6, 1]) * random.normal()),
      m: tensor(S, [N], () => random.pick([0, 1e-3]) * random.normal()),
      v: tensor(S, [N], () => random.pick([0, 1e-6, 1]) * random.next()),
      hyper: hyperOf(random.pick([1e-5, 1e-2]), step, random.pick([1, 0.37])),
      beta1: 0.9,
      beta2: random.pick([0.999, 0.95]),
      eps: random.pick([1e-8, 1e-3]),
      weight_decay: random.pick([0, 0.1]),
      seed: random.pick([0, 1, 2 ** 53 - 1]),
      // the upper half of the number changes within the tensor, or does not
      first: random.pick([0, 12345, 2 ** 32 - Math.ceil(N / 2), 2 ** 40 - 3]),
    }
    await check(t, {
      op: 'adamw',
      label: `${N} ${keep}, gradients ${G}, states ${S}, step ${step}, first ${args.first}`,
      args,
      reference: () => updateBits(args),
      bitwise: true,
    })
  }
})

t.test('adamw: NaN and infinity', availability(), async (t) => {
  const odd = [NaN, Infinity, -Infinity, 3.4e38, -3.4e38, 1e-45, -1e-45, -0]
  const N = odd.length
  for (const keep of KEEPS) {
    for (const S of FLOATS) {
      for (const field of ['p', 'm', 'v', 'g']) {
        const args = {
          ...kept(keep, field === 'p' ? odd : odd.map((_, i) => i / 7)),
          g: tensor('f32', [N], (i) => (field === 'g' ? odd[i]! : 0.1)),
          m: tensor(S, [N], (i) => (field === 'm' ? odd[i]! : 0.1)),
          v: tensor(S, [N], (i) => (field === 'v' ? Math.abs(odd[i]!) : 0.1)),
          hyper: hyperOf(1e-3, 5, 1),
          ...{ beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0, seed: 3, first: 7 },
        }
        const results = await check(t, {
          op: 'adamw',
          label: `${field} is out of the ordinary, ${keep}, states ${S}`,
          args,
          reference: () => updateBits(args),
          bitwise: true,
        })
        if (field === 'p') t.ok(Number.isNaN(results['p']!.values[0]!), `${keep}: NaN stays NaN`)
      }
    }
  }
})

t.test('adamw: p and low are the f32 master, to the bit, over 1000 steps', availability(), async (t) => {
  const N = 261
  const [steps, runs] = [50, 20]
  const random = new Random(5)
  // Ties first, of both signs, which zero gradients leave as they are: 0x....8000, then all values of the lower half's
  // upper bits.
  const start = Float32Array.from({ length: N }, (_, i) =>
    i < 64 ? fromBits(((i % 2) * 0x80000000 + 0x3f800000 + i * 0x10000 + 0x8000) >>> 0) : 0.1 * random.normal(),
  )
  const gradients = (run: number): Float32Array =>
    Float32Array.from({ length: steps * N }, (_, i) => (i % N < 64 && run < 10 ? 0 : random.normal()))
  const all = Array.from({ length: runs }, (_, run) => gradients(run))
  for (const { name, device } of variants()) {
    const upload = async (dtype: DType, values: HostTensor): Promise<Tensor> => {
      const to = device.tensor(dtype, [N], dtype)
      await device.upload(to, encode(values))
      return to
    }
    const modes = await Promise.all(
      (['master', 'low'] as const).map(async (keep) => {
        const from = kept(keep, start)
        const zeros = tensor('f32', [N], () => 0)
        return {
          p: await upload('bf16', from.p),
          master: from.master && (await upload('f32', from.master)),
          low: from.low && (await upload('u16', from.low)),
          m: await upload('f32', zeros),
          v: await upload('f32', zeros),
        }
      }),
    )
    const g = device.tensor('f32', [steps, N], 'g')
    const hyper = device.tensor('f32', [8], 'hyper')
    await device.upload(hyper, encode(hyperOf(1e-3, 10, 0.5)))
    const recorder = new Recorder(device, 'masters and lower halves')
    const rest = { hyper, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0, seed: 0, first: 0 }
    for (const tensors of modes) {
      for (let i = 0; i < steps; i++) adamw(recorder, { ...tensors, g: g.rows(i, 1).view(N), ...rest })
    }
    const plan = recorder.plan()
    let unequal = 0
    let ties = 0
    for (const gradients of all) {
      await device.upload(g, gradients)
      await plan.run()
      const [f32, halves] = modes as [(typeof modes)[0], (typeof modes)[0]]
      const bytes = await Promise.all(
        [f32.p, halves.p, f32.m, halves.m, f32.v, halves.v, f32.master!, halves.low!].map((x) => device.download(x)),
      )
      for (const i of [0, 2, 4]) if (!same(bytes[i], bytes[i + 1])) unequal++
      const masters = new Uint32Array(bytes[6]!.buffer)
      const upper = new Uint16Array(bytes[1]!.buffer)
      const low = new Uint16Array(bytes[7]!.buffer)
      for (let i = 0; i < N; i++) {
        if ((masters[i]! & 0xffff) === 0x8000) ties++
        if (bitsOf(joined(fromBits((upper[i]! << 16) >>> 0), low[i]!)) !== masters[i]) unequal++
      }
    }
    plan.dispose()
    t.equal(unequal, 0, `${name}: differences after ${steps * runs} steps`)
    t.ok(ties >= 640, `${name}: ${ties} ties`)
  }
})

// ---- stochastic rounding ----

/** An update of N equal elements whose only effect is to round: p, m and v move to values of f32 that are no bf16. */
function rounding(N: number, seed: number, step: number, first = 0): Update {
  return {
    p: tensor('bf16', [N], () => -1.25),
    master: undefined,
    low: undefined,
    g: tensor('f32', [N], () => 0.7),
    m: tensor('bf16', [N], () => 0.5),
    v: tensor('bf16', [N], () => 0.25),
    hyper: tensor('f32', [8], [1e-3, 1, 1, 1, 1, 1, 1, step]),
    ...{ beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0, seed, first },
  }
}

/** Results that must have the same bits on every variant. */
async function onAll(t: Test, label: string, args: Update): Promise<Map<string, Uint8Array>> {
  const all = [...(await runAll(t, { op: 'adamw', label, args: { ...args } })).values()]
  const [one] = all
  t.ok(
    all.every((bytes) => [...bytes].every(([field, data]) => same(data, one!.get(field)))),
    `${label}: the same bits on every variant`,
  )
  return one!
}

const numbers = (bytes: Uint8Array): number[] =>
  Array.from(new Uint16Array(bytes.slice().buffer), (bits) => fromBits((bits << 16) >>> 0))

t.test('stochastic rounding is unbiased and never further than the next bf16', availability(), async (t) => {
  const N = 20011
  for (const [seed, step] of [
    [0, 1],
    [1, 1],
    [0, 2],
    [2 ** 53 - 1, 123456],
  ] as const) {
    const args = rounding(N, seed, step)
    // f32 states and weights of the same update: the exact values, since they are the same for all elements
    const one = { ...rounding(1, seed, step), ...kept('f32', [-1.25]) }
    const truth = updateBits({ ...one, m: tensor('f32', [1], [0.5]), v: tensor('f32', [1], [0.25]) })
    const results = await onAll(t, `seed ${seed}, step ${step}`, args)
    for (const field of ['p', 'm', 'v'] as const) {
      const x = truth[field]![0]!
      const towardsZero = fromBits((bitsOf(x) & 0xffff0000) >>> 0)
      const unit = fromBits(((bitsOf(x) & 0xffff0000) + 0x10000) >>> 0) - towardsZero
      const fraction = (x - towardsZero) / unit
      t.ok(fraction > 0.01 && fraction < 0.99, `${field}: ${x} is no bf16`)
      const values = numbers(results.get(field)!)
      t.ok(
        values.every((y) => y === towardsZero || y === towardsZero + unit),
        `${field}: one of the two neighbours of ${x}`,
      )
      // Each is a whole unit up with the probability `fraction`: the mean of N has the standard deviation
      // unit sqrt(fraction (1 - fraction) / N), and five of them are exceeded by chance once in 1.7 million.
      const mean = values.reduce((sum, y) => sum + (y - towardsZero) / unit, 0) / N
      const sigma = Math.sqrt((fraction * (1 - fraction)) / N)
      t.ok(Math.abs(mean - fraction) <= 5 * sigma, `${field}: mean ${mean}, expected ${fraction} +- ${5 * sigma}`)
    }
  }
})

t.test('random bits: even, and independent of neighbours, steps, seeds and uses', async (t) => {
  const N = 1 << 14
  const of = (seed: number, step: number, use: 'weights' | 'moments', first = 0): Uint32Array =>
    Uint32Array.from({ length: N }, (_, i) => randomBits(seed, step, use, first + i))
  const base = of(0, 1, 'weights')
  const others: Record<string, Uint32Array> = {
    'the next element': of(0, 1, 'weights', 1),
    'the element 2 further': of(0, 1, 'weights', 2),
    'the element 256 further': of(0, 1, 'weights', 256),
    'the element 2^32 further': of(0, 1, 'weights', 2 ** 32),
    'the next step': of(0, 2, 'weights'),
    'the step 1000 later': of(0, 1001, 'weights'),
    'the next seed': of(1, 1, 'weights'),
    'the other use': of(0, 1, 'moments'),
  }
  // Bits of N elements: the number of ones, and of ones of a bit XOR another one, is N / 2 with a standard deviation of
  // sqrt(N) / 2. 8 x 1024 pairs of bits are looked at: 6 sigma are exceeded by chance once in 60 thousand runs.
  const bound = 3 * Math.sqrt(N)
  const ones = (x: Uint32Array, bit: number): number => x.reduce((sum, word) => sum + ((word >>> bit) & 1), 0)
  const uneven = Array.from({ length: 32 }, (_, bit) => bit).filter((bit) => Math.abs(ones(base, bit) - N / 2) > bound)
  t.strictSame(uneven, [], 'every bit is 1 half of the time')
  for (const [name, other] of Object.entries(others)) {
    const bad: string[] = []
    for (let turn = 0; turn < 32; turn++) {
      const xor = base.map((word, i) => (word ^ ((other[i]! << turn) | (other[i]! >>> ((32 - turn) & 31)))) >>> 0)
      for (let bit = 0; bit < 32; bit++) {
        if (Math.abs(ones(xor, bit) - N / 2) > bound) bad.push(`bit ${bit}, turned by ${turn}`)
      }
    }
    t.strictSame(bad, [], name)
  }
  // m and v take the halves of one word
  const halves = of(5, 9, 'moments')
  const xor = halves.map((word) => (word ^ (word >>> 16)) & 0xffff)
  t.ok(
    Array.from({ length: 16 }, (_, bit) => bit).every((bit) => Math.abs(ones(xor, bit) - N / 2) <= bound),
    'the halves of a word',
  )
  // 2^8 cells of N / 2^8 by the upper 8 bits: chi squared of 255 degrees of freedom, standard deviation sqrt(510)
  const cells = new Float64Array(256)
  for (const word of base) cells[word >>> 24]!++
  const chi = cells.reduce((sum, count) => sum + (count - N / 256) ** 2 / (N / 256), 0)
  t.ok(Math.abs(chi - 255) < 6 * Math.sqrt(510), `chi squared ${chi}`)
})

t.test('an update in several operations has the bits of one', availability(), async (t) => {
  const N = 5000
  const first = 2 ** 32 - 1234 // its upper half changes on the way
  const random = new Random(6)
  const args: Update = {
    ...kept(
      'stochastic',
      Float64Array.from({ length: N }, () => random.normal()),
    ),
    g: tensor('f32', [N], () => random.normal()),
    m: tensor('bf16', [N], () => random.normal()),
    v: tensor('bf16', [N], () => random.next()),
    hyper: hyperOf(1e-2, 3, 1),
    ...{ beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, seed: 11, first },
  }
  const whole = await onAll(t, 'one operation', args)
  const again = await onAll(t, 'again', args)
  const elsewhere = await onAll(t, 'other first', { ...args, first: 0 })
  for (const field of ['p', 'm', 'v']) {
    t.ok(same(whole.get(field), again.get(field)), `${field}: run again`)
    t.notOk(same(whole.get(field), elsewhere.get(field)), `${field}: depends on first`)
  }
  for (const cuts of [[1], [1234, 1235], [7, 1000, 4999]]) {
    const bounds = [0, ...cuts, N]
    for (let i = 0; i + 1 < bounds.length; i++) {
      const [from, to] = [bounds[i]!, bounds[i + 1]!]
      const part = (x: HostTensor): HostTensor => tensor(x.dtype, [to - from], x.values.subarray(from, to))
      const { p, g, m, v } = args
      const piece = { ...args, p: part(p), g: part(g), m: part(m), v: part(v), first: first + from }
      const results = await onAll(t, `${from} .. ${to}`, piece)
      for (const field of ['p', 'm', 'v']) {
        t.ok(same(results.get(field), whole.get(field)!.subarray(2 * from, 2 * to)), `${field} ${from} .. ${to}`)
      }
    }
  }
})

t.test('adamw: what does not go together is an error at record time', availability(), async (t) => {
  const [{ device }] = variants() as [ReturnType<typeof variants>[0]]
  const of = (dtype: DType, size = 4): Tensor => device.tensor(dtype, [size], dtype)
  const args = {
    ...{ p: of('bf16'), g: of('f32'), m: of('f32'), v: of('f32'), hyper: of('f32', 8) },
    ...{ beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0, seed: 0, first: 0 },
  }
  const record = (changes: object) => () => adamw(new Recorder(device, 'test'), { ...args, ...changes })
  const p = of('f32')
  t.throws(record({ master: of('f32'), low: of('u16') }), {
    name: 'TypeError',
    message: /both master and low are given/,
  })
  t.throws(record({ p, master: of('f32') }), { name: 'TypeError', message: /master is given, but p .* is f32 itself/ })
  t.throws(record({ p, low: of('u16') }), { name: 'TypeError', message: /low is given, but p/ })
  t.throws(record({ low: of('bf16') }), { name: 'TypeError', message: /dtype is bf16, expected u16/ })
  t.throws(record({ m: of('u16'), v: of('u16') }), { name: 'TypeError', message: /dtype is u16, expected f32 or bf16/ })
  t.throws(record({ m: of('bf16') }), { name: 'TypeError', message: /v .*dtype is f32, expected bf16/ })
  for (const bad of [-1, 0.5, 2 ** 53, NaN, Infinity]) {
    t.throws(record({ seed: bad }), { name: 'RangeError', message: /seed is .*whole number from 0 to 2\^53 - 1/ })
    t.throws(record({ first: bad }), { name: 'RangeError', message: /first is/ })
  }
})

t.test('clip', availability(), async (t) => {
  const finite = [0, 1e-12, 0.25, 1, 9, 1e10, 3e38]
  for (const sum of [...finite, NaN, Infinity, -Infinity]) {
    for (const loss of [2.5, 0, NaN, Infinity, -Infinity]) {
      for (const limit of [0, 1, 0.5, 100]) {
        const hyper = tensor('f32', [8], [1e-3, 0.1, 0.01, limit, 7, 7, 7, 42])
        const results = await check(t, {
          op: 'clip',
          label: `sum of squares ${sum}, loss ${loss}, max norm ${limit}`,
          args: { sum_squares: tensor('f32', [1], [sum]), loss: tensor('f32', [1], [loss]), hyper },
          reference: ({ r }) => {
            const norm = r(Math.sqrt(Math.fround(sum)))
            const apply = Number.isFinite(norm) && Number.isFinite(loss)
            const ratio = limit > 0 ? r(limit / r(norm + r(1e-6))) : 1
            // a step that is skipped is not scaled, as its norm is no number: any value would do
            return { hyper: [...hyper.values.slice(0, 4), ratio < 1 ? ratio : 1, norm, apply ? 1 : 0, 42] }
          },
        })
        const after = results['hyper']!
        t.strictSame([...after.values.slice(0, 4)], [...hyper.values.slice(0, 4)], 'the settings stay')
        const apply = Number.isFinite(Math.sqrt(Math.fround(sum))) && Number.isFinite(loss)
        t.equal(after.values[6], apply ? 1 : 0, `sum of squares ${sum}, loss ${loss}: apply`)
        if (!apply) continue
        const norm = Math.sqrt(Math.fround(sum))
        const scale = limit > 0 ? Math.min(1, limit / (norm + 1e-6)) : 1
        t.ok(
          Math.abs(after.values[4]! - scale) <= 2e-7 * scale,
          `norm ${norm}, max norm ${limit}: scale ${after.values[4]}`,
        )
        t.ok(Math.abs(after.values[5]! - norm) <= 2e-7 * norm, `norm ${norm}`)
      }
    }
  }
})

t.test('at least 200 shapes', availability(), async (t) => checkShapes(t, 'adamw'))

t.teardown(() => t.comment(`largest error: ${worst.ratio.toFixed(2)} of what is allowed, ${worst.label}`))
