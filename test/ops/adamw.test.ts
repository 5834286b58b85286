import t from 'tap'
import {
  availability,
  BLOCKS,
  check,
  combination,
  encode,
  FLOATS,
  type HostTensor,
  ODD,
  type Precision,
  Random,
  RESIDUES,
  tensor,
  worst,
} from './harness.js'

interface Update {
  p: HostTensor
  master: HostTensor | undefined
  g: HostTensor
  m: HostTensor
  v: HostTensor
  hyper: HostTensor
  beta1: number
  beta2: number
  eps: number
  weight_decay: number
}

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

/** [learning rate, 1 - beta1^t, 1 - beta2^t, max norm, scale, norm, apply, free] */
const hyperOf = (rate: number, step: number, scale: number, apply = 1): HostTensor =>
  tensor('f32', [8], [rate, 1 - 0.9 ** step, 1 - 0.999 ** step, 1, scale, 3, apply, 0])

t.test('adamw', availability(), async (t) => {
  const random = new Random(1)
  // The last size is more than the emulated GPU holds at a time: its grid goes round.
  const sizes = [...ODD, ...RESIDUES, ...BLOCKS, 16383, 16385, 40011]
  for (let i = 0; i < 4 * sizes.length; i++) {
    const [W, G, N] = combination(i, FLOATS, FLOATS, sizes)
    const hasMaster = random.next() < 0.5
    const rate = random.pick([1e-3, 0.1])
    const step = random.pick([1, 2, 1000])
    const size = random.pick([0, 0.01, 1]) // weights of 0 show the step itself
    const master = hasMaster ? tensor('f32', [N], () => size * random.normal()) : undefined
    const args = {
      p: tensor(W, [N], (j) => (master ? master.values[j]! : size * random.normal())),
      master,
      g: tensor(G, [N], () => random.normal()),
      m: tensor('f32', [N], () => (step === 1 ? 0 : 0.1 * random.normal())),
      v: tensor('f32', [N], () => (step === 1 ? 0 : 0.01 * random.next())),
      hyper: hyperOf(rate, step, random.pick([1, 0.37])),
      beta1: 0.9,
      beta2: random.pick([0.999, 0.95]),
      eps: random.pick([1e-8, 1e-3]),
      weight_decay: random.pick([0, 0.1]),
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
      for (const hasMaster of [false, true]) {
        const N = 53
        const args = {
          p: tensor(W, [N], () => random.normal()),
          master: hasMaster ? tensor('f32', [N], () => random.normal()) : undefined, // p is not its rounding: it stays
          g: tensor('f32', [N], () => g),
          m: tensor('f32', [N], () => random.normal()),
          v: tensor('f32', [N], () => random.next()),
          hyper: hyperOf(0.1, 3, 1, 0),
          beta1: 0.9,
          beta2: 0.999,
          eps: 1e-8,
          weight_decay: 0.1,
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
    g: tensor('f32', [N], (i) => (i === 20 ? NaN : 0)),
    m: zeros,
    v: zeros,
    hyper: hyperOf(0.1, 1, 1),
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0,
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
      g,
      m: state['m']!,
      v: state['v']!,
      hyper: hyperOf(1e-2, step, 0.5),
      beta1: 0.9,
      beta2: 0.999,
      eps: 1e-8,
      weight_decay: 0.01,
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

t.teardown(() => t.comment(`largest error: ${worst.ratio.toFixed(2)} of what is allowed, ${worst.label}`))
