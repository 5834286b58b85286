import t from 'tap'
import {
  availability,
  check,
  checkGradient,
  checkShapes,
  combination,
  encode,
  FLOATS,
  type HostTensor,
  output,
  type Precision,
  Random,
  type Round,
  runAll,
  seeds,
  tensor,
  worst,
} from './harness.js'

interface Shape {
  B: number
  T: number
  H: number
  K: number
  D: number
}

interface Inputs {
  q: HostTensor
  k: HostTensor
  v: HostTensor
  cos: HostTensor
  sin: HostTensor
  pos: HostTensor
  first: HostTensor
}

const exact: Precision = { exact: true, r: (x) => x, store: () => (x) => x }

/** Row by row of D: (x, y) -> (x cos - y sin, y cos + x sin) over the pairs (i, i + D/2); `sign` -1 turns back. */
function rotate(
  { r }: Precision,
  x: Float64Array,
  token: (row: number) => number,
  { cos, sin }: Inputs,
  D: number,
  sign = 1,
): Float64Array {
  const half = D / 2
  const y = new Float64Array(x.length)
  for (let row = 0; row < x.length / D; row++) {
    const angle = token(row) * half
    for (let i = 0; i < half; i++) {
      const [a, b] = [x[row * D + i]!, x[row * D + half + i]!]
      const [c, s] = [cos.values[angle + i]!, sign * sin.values[angle + i]!]
      y[row * D + i] = r(r(a * c) - r(b * s))
      y[row * D + half + i] = r(r(b * c) + r(a * s))
    }
  }
  return y
}

/**
 * The GPU kernels multiply bf16 by bf16 on tensor cores, so that weights and slopes are rounded to bf16 before they meet
 * values, keys and queries, as in any bf16 attention; the naive computation of the same precision does so too. The CPU
 * keeps them in f32, and is held to that.
 */
const onTensorCores = (process.env['ROPEWALK_TEST_DEVICE'] ?? 'cpu') !== 'cpu'
const operand = (p: Precision, dtype: HostTensor['dtype']): Round => (onTensorCores ? p.store(dtype) : (x) => x)

/** The rotated rows as they are stored: a bf16 op keeps them in bf16. */
function rotated(p: Precision, x: HostTensor, inputs: Inputs): Float64Array {
  const [, , heads, D] = x.dims as [number, number, number, number]
  return rotate(p, x.values, (row) => inputs.pos.values[Math.floor(row / heads)]!, inputs, D).map(p.store(x.dtype))
}

/** The same of queries; the GPU kernels round them together with the factor that makes weights powers of two. */
function rotatedQueries(p: Precision, inputs: Inputs, scale: number): Float64Array {
  const { q } = inputs
  if (p.exact || !onTensorCores || q.dtype === 'f32') return rotated(p, q, inputs)
  const [, , heads, D] = q.dims as [number, number, number, number]
  const factor = scale * Math.LOG2E
  const x = rotate(p, q.values, (row) => inputs.pos.values[Math.floor(row / heads)]!, inputs, D)
  return x.map((value) => p.store(q.dtype)(value * factor) / factor)
}

/** Softmax attention of one query row over the keys low .. high; `weights` gets the probabilities. */
function attendRow(
  { r }: Precision,
  q: Float64Array,
  at: number,
  k: Float64Array,
  v: Float64Array,
  keyAt: (n: number) => number,
  low: number,
  high: number,
  D: number,
  scale: number,
  o: Float64Array,
  store: Round,
): number {
  const weights = new Float64Array(high - low + 1)
  let top = -Infinity
  for (let n = low; n <= high; n++) {
    let score = 0
    const key = keyAt(n)
    for (let d = 0; d < D; d++) score = r(score + r(q[at + d]! * k[key + d]!))
    weights[n - low] = r(score * scale)
    top = Math.max(top, weights[n - low]!)
  }
  let total = 0
  for (let n = low; n <= high; n++) {
    const e = r(Math.exp(r(weights[n - low]! - top)))
    total = r(total + e)
    const value = keyAt(n)
    for (let d = 0; d < D; d++) o[at + d] = r(o[at + d]! + r(store(e) * v[value + d]!))
  }
  for (let d = 0; d < D; d++) o[at + d] = r(o[at + d]! / total)
  return r(top + r(Math.log(total)))
}

function forward(p: Precision, inputs: Inputs, scale: number) {
  const { q, k, v, first } = inputs
  const [B, T, H, D] = q.dims as [number, number, number, number]
  const K = k.dims[2]!
  const qr = rotatedQueries(p, inputs, scale)
  const kr = rotated(p, k, inputs)
  const store = operand(p, q.dtype)
  const o = new Float64Array(q.size)
  const lse = new Float64Array(B * H * T)
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < H; h++) {
      const head = Math.floor(h / (H / K))
      const keyAt = (n: number): number => ((b * T + n) * K + head) * D
      for (let i = 0; i < T; i++) {
        const at = ((b * T + i) * H + h) * D
        const low = first.values[b * T + i]!
        lse[(b * H + h) * T + i] = attendRow(p, qr, at, kr, v.values, keyAt, low, i, D, scale, o, store)
      }
    }
  }
  return { o, lse }
}

interface Gradients extends Inputs {
  delta: HostTensor
  lse: HostTensor
  dout: HostTensor
}

function backward(p: Precision, inputs: Gradients, scale: number) {
  const { r } = p
  const { q, k, v, first, delta, lse, dout } = inputs
  const [B, T, H, D] = q.dims as [number, number, number, number]
  const K = k.dims[2]!
  const qr = rotatedQueries(p, inputs, scale)
  const kr = rotated(p, k, inputs)
  const store = operand(p, q.dtype)
  const dqr = new Float64Array(q.size)
  const dkr = new Float64Array(k.size)
  const dv = new Float64Array(v.size)
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < H; h++) {
      const head = Math.floor(h / (H / K))
      for (let i = 0; i < T; i++) {
        const at = ((b * T + i) * H + h) * D
        for (let n = first.values[b * T + i]!; n <= i; n++) {
          const key = ((b * T + n) * K + head) * D
          let score = 0
          let dp = 0
          for (let d = 0; d < D; d++) {
            score = r(score + r(qr[at + d]! * kr[key + d]!))
            dp = r(dp + r(dout.values[at + d]! * v.values[key + d]!))
          }
          const weight = r(Math.exp(r(r(score * scale) - lse.values[(b * H + h) * T + i]!)))
          const slope = r(store(r(weight * r(dp - delta.values[(b * H + h) * T + i]!))) * scale)
          for (let d = 0; d < D; d++) {
            dv[key + d] = r(dv[key + d]! + r(store(weight) * dout.values[at + d]!))
            dqr[at + d] = r(dqr[at + d]! + r(slope * kr[key + d]!))
            dkr[key + d] = r(dkr[key + d]! + r(slope * qr[at + d]!))
          }
        }
      }
    }
  }
  const back = (x: Float64Array, heads: number) =>
    rotate(p, x, (row) => inputs.pos.values[Math.floor(row / heads)]!, inputs, D, -1)
  return { dq: back(dqr, H), dk: back(dkr, K), dv }
}

// What a token sees, and where it stands.
const MASKS = ['causal', 'packed', 'window', 'padded', 'ragged', 'self'] as const
type Mask = (typeof MASKS)[number]
const POSITIONS = ['in order', 'restarting', 'skipping', 'random'] as const
type Positions = (typeof POSITIONS)[number]

function firstsOf(random: Random, mask: Mask, { B, T }: Shape): HostTensor {
  const values: number[] = []
  for (let b = 0; b < B; b++) {
    const window = random.int(1, T)
    const padding = random.int(0, T - 1)
    let start = 0
    for (let i = 0; i < T; i++) {
      if (mask === 'packed' && random.next() < 4 / T) start = i
      if (mask === 'padded') values.push(i < padding ? i : padding)
      else if (mask === 'window') values.push(Math.max(0, i - window + 1))
      else if (mask === 'ragged') values.push(random.int(0, i))
      else values.push(mask === 'causal' ? 0 : mask === 'self' ? i : start)
    }
  }
  return tensor('i32', [B, T], values)
}

function positionsOf(random: Random, positions: Positions, first: HostTensor, { B, T }: Shape, P: number): HostTensor {
  const jump = random.int(0, P - T)
  return tensor('i32', [B, T], (at) => {
    const i = at % T
    if (positions === 'restarting') return i - Math.min(i, first.values[at]!)
    if (positions === 'skipping') return i < T / 2 ? i : i + jump // as PoSE does
    return positions === 'random' ? random.int(0, P - 1) : i
  })
}

/** A rotation table of P rows. */
function table(P: number, D: number): { cos: HostTensor; sin: HostTensor } {
  const half = D / 2
  const angle = (at: number): number => Math.floor(at / half) * 10000 ** (-(at % half) / half)
  return {
    cos: tensor('f32', [P, half], (at) => Math.cos(angle(at))),
    sin: tensor('f32', [P, half], (at) => Math.sin(angle(at))),
  }
}

function inputsOf(
  random: Random,
  F: HostTensor['dtype'],
  shape: Shape,
  mask: Mask,
  positions: Positions,
  size = 1,
): Inputs {
  const { B, T, H, K, D } = shape
  const P = T + random.int(0, 70)
  const first = firstsOf(random, mask, shape)
  return {
    q: tensor(F, [B, T, H, D], () => size * random.normal()),
    k: tensor(F, [B, T, K, D], () => size * random.normal()),
    v: tensor(F, [B, T, K, D], () => random.normal()),
    ...table(P, D),
    pos: positionsOf(random, positions, first, shape, P),
    first,
  }
}

const HEADS = [
  [1, 1],
  [2, 1],
  [2, 2],
  [3, 1],
  [4, 2],
  [6, 3],
  [5, 1],
  [8, 2],
] as const
const TIMES = [
  1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 23, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 95, 96, 97, 113, 127, 128, 129,
]
const LONG = [143, 145, 160, 191, 192, 193, 200, 257]
const WIDTHS = [2, 4, 6, 8, 10, 12, 14, 16, 18, 22, 24, 30, 32, 34, 40, 48, 62, 64, 66, 80, 96, 100, 128]

/** Every T around the heights of tiles, for rows of queries and of keys, with one, two and more tiles. */
const AROUND_TILES = [32, 64, 128, 192].flatMap((size) => Array.from({ length: 9 }, (_, i) => size - 4 + i)).concat(256)
const SWEEP = 128
const AROUND = 2 * AROUND_TILES.length
/** The same for wide heads, whose tiles on a GPU are others; an odd number of them, so that each T meets both dtypes. */
const WIDE_TILES = [16, 32, 64, 128].flatMap((size) => Array.from({ length: 9 }, (_, i) => size - 4 + i)).concat(48)
const WIDE = 2 * WIDE_TILES.length
const SHAPES = SWEEP + AROUND + WIDE

/**
 * The i-th seeded shape: every T and D in turn, then, from SWEEP on, every T around a tile; what remains of `budget`
 * multiplications goes to heads and batch.
 */
function shapeOf(random: Random, i: number, budget: number): Shape {
  if (i >= SWEEP + AROUND) {
    const T = WIDE_TILES[i % WIDE_TILES.length]!
    return { B: 1, T, H: T < 50 ? 2 : 1, K: 1, D: [66, 80, 130, 144][(i >> 1) % 4]! }
  }
  if (i >= SWEEP) {
    const [H, K] = random.pick([
      [1, 1],
      [2, 1],
      [3, 1],
      [2, 2],
    ] as const)
    return { B: 1, T: AROUND_TILES[(i - SWEEP) % AROUND_TILES.length]!, H, K, D: random.pick([2, 4, 8, 10, 16, 32]) }
  }
  const T = i % 5 === 4 ? LONG[Math.floor(i / 5) % LONG.length]! : TIMES[i % TIMES.length]!
  let D = WIDTHS[(i * 7) % WIDTHS.length]!
  let [H, K] = random.pick(HEADS) as [number, number]
  let B = random.int(1, 3)
  const work = (): number => B * H * D * T * T
  if (work() > budget) B = 1
  while (work() > budget && H > 2) [H, K] = random.pick(HEADS) as [number, number]
  while (work() > budget && D > 4) D = 2 * Math.ceil(D / 4)
  return { B, T, H, K, D }
}

const label = ({ B, T, H, K, D }: Shape, F: string, mask: Mask, positions: Positions): string =>
  `B ${B} T ${T} H ${H} K ${K} D ${D} ${F}, ${mask}, positions ${positions}`

/**
 * Of standard normal q, k, v and dout: a score is a sum of D terms, about 3 scale sqrt(D) at its largest; its rounding
 * is a relative one of the weights, and so of the values and slopes that they weigh.
 */
function noise(scale: number, D: number): Record<string, number> {
  const score = 3 * scale * Math.sqrt(D)
  const slope = 2 * scale * Math.sqrt(D) + score * scale * Math.sqrt(D)
  return { lse: scale * D, o: score, dv: score, dq: slope, dk: slope }
}

t.test('attention_fwd', availability(), async (t) => {
  const random = new Random(1)
  for (const i of seeds(SHAPES)) {
    const [F, mask] = combination(i, FLOATS, MASKS)
    const positions = random.pick(POSITIONS)
    const shape = shapeOf(random, i, 1_500_000)
    const { B, T, H, D } = shape
    const inputs = inputsOf(random, F, shape, mask, positions)
    const scale = random.pick([1 / Math.sqrt(D), 0.3, 1])
    await check(t, {
      op: 'attention_fwd',
      label: label(shape, F, mask, positions),
      args: { ...inputs, o: output(F, [B, T, H, D]), lse: output('f32', [B, H, T]), scale },
      reference: (p) => forward(p, inputs, Math.fround(scale)),
      scale: noise(scale, D),
    })
  }
})

/** sum_d o dout (B,H,T) */
function deltas(p: Precision, o: ArrayLike<number>, dout: ArrayLike<number>, dims: readonly number[]): Float64Array {
  const { r } = p
  const [B, T, H, D] = dims as [number, number, number, number]
  return new Float64Array(B * H * T).map((_, i) => {
    const at = ((Math.floor(i / (H * T)) * T + (i % T)) * H + (Math.floor(i / T) % H)) * D
    let delta = 0
    for (let d = 0; d < D; d++) delta = r(delta + r(dout[at + d]! * o[at + d]!))
    return delta
  })
}

t.test('attention_delta', availability(), async (t) => {
  const random = new Random(12)
  for (const i of seeds(SHAPES)) {
    const [F] = combination(i, FLOATS)
    const { B, T, H, D } = shapeOf(random, i, 800_000)
    const dims = [B, T, H, D]
    const [o, dout] = [0, 1].map(() => tensor(F, dims, () => random.normal())) as [HostTensor, HostTensor]
    await check(t, {
      op: 'attention_delta',
      label: `${F} ${dims.join(' ')}`,
      args: { o, dout, delta: output('f32', [B, H, T]) },
      reference: (p) => ({ delta: deltas(p, o.values, dout.values, dims) }),
      scale: { delta: Math.sqrt(D) },
    })
  }
})

/** The forward pass's results as the backward pass gets them. */
function withResults(random: Random, inputs: Inputs, scale: number): Gradients {
  const { q, k } = inputs
  const [B, T, H] = q.dims as [number, number, number]
  const { o, lse } = forward(exact, inputs, scale)
  const dout = tensor(k.dtype, q.dims, () => random.normal())
  const delta = deltas(exact, tensor(q.dtype, q.dims, o).values, dout.values, q.dims)
  return { ...inputs, delta: tensor('f32', [B, H, T], delta), lse: tensor('f32', [B, H, T], lse), dout }
}

t.test('attention_bwd', availability(), async (t) => {
  const random = new Random(2)
  for (const i of seeds(SHAPES)) {
    const [F, mask] = combination(i, FLOATS, MASKS)
    const positions = random.pick(POSITIONS)
    const shape = shapeOf(random, i, 800_000)
    const { B, T, H, K, D } = shape
    const scale = random.pick([1 / Math.sqrt(D), 0.3])
    const inputs = withResults(random, inputsOf(random, F, shape, mask, positions), Math.fround(scale))
    await check(t, {
      op: 'attention_bwd',
      label: label(shape, F, mask, positions),
      args: {
        ...inputs,
        ...{ dq: output(F, [B, T, H, D]), dk: output(F, [B, T, K, D]), dv: output(F, [B, T, K, D]) },
        ...{ groups: i % 2 === 0 ? 1 : K, scale },
      },
      reference: (p) => backward(p, inputs, Math.fround(scale)),
      scale: noise(scale, D),
    })
  }
})

t.test('attention_bwd gives the same bits for any number of groups of heads', availability(), async (t) => {
  const random = new Random(9)
  for (const [shape, F, divisors] of [
    [{ B: 2, T: 70, H: 8, K: 4, D: 16 }, 'f32', [2, 4]],
    [{ B: 2, T: 70, H: 8, K: 4, D: 16 }, 'bf16', [2, 4]],
    [{ B: 1, T: 131, H: 6, K: 6, D: 64 }, 'bf16', [2, 3, 6]],
    [{ B: 1, T: 40, H: 6, K: 3, D: 130 }, 'bf16', [3]],
    [{ B: 2, T: 33, H: 4, K: 2, D: 6 }, 'f32', [2]],
  ] as const) {
    const { B, T, H, K, D } = shape
    const inputs = withResults(random, inputsOf(random, F, shape, 'packed', 'random'), 0.3)
    const results = { dq: output(F, [B, T, H, D]), dk: output(F, [B, T, K, D]), dv: output(F, [B, T, K, D]) }
    const run = (groups: number) =>
      runAll(t, { op: 'attention_bwd', label: `${groups} groups`, args: { ...inputs, ...results, groups, scale: 0.3 } })
    const all = await run(1)
    for (const groups of divisors)
      t.strictSame(await run(groups), all, `${label(shape, F, 'packed', 'random')}, ${groups}`)
  }
})

t.test('long sequences: several blocks of keys and of queries', availability(), async (t) => {
  const random = new Random(3)
  for (const [T, D, H, K, F, mask] of [
    [385, 4, 1, 1, 'f32', 'causal'],
    [577, 2, 1, 1, 'f32', 'packed'],
    [400, 6, 2, 1, 'bf16', 'ragged'],
    [769, 2, 1, 1, 'bf16', 'window'],
    // aligned rows: several tiles of every width
    [512, 64, 1, 1, 'bf16', 'causal'],
    [417, 64, 2, 1, 'bf16', 'window'],
    [350, 128, 1, 1, 'bf16', 'causal'],
    [261, 128, 3, 1, 'bf16', 'packed'],
    [200, 80, 2, 2, 'bf16', 'ragged'],
    [150, 256, 2, 1, 'bf16', 'causal'],
    [130, 208, 1, 1, 'bf16', 'packed'],
    [200, 64, 2, 1, 'f32', 'causal'],
    [170, 128, 2, 1, 'f32', 'window'],
    [120, 256, 2, 1, 'f32', 'packed'],
  ] as const) {
    const shape = { B: 1, T, H, K, D }
    const scale = D < 64 ? 0.4 : 1 / Math.sqrt(D)
    const aligned = D < 64 ? {} : { shift: 0, scale: noise(scale, D) }
    const inputs = withResults(random, inputsOf(random, F, shape, mask, 'random'), Math.fround(scale))
    const { q, k, v, cos, sin, pos, first } = inputs
    await check(t, {
      op: 'attention_fwd',
      label: label(shape, F, mask, 'random'),
      args: { q, k, v, cos, sin, pos, first, o: output(F, q.dims), lse: output('f32', [1, H, T]), scale },
      reference: (p) => forward(p, inputs, Math.fround(scale)),
      scale: { lse: scale * D },
      ...aligned,
    })
    await check(t, {
      op: 'attention_bwd',
      label: label(shape, F, mask, 'random'),
      args: { ...inputs, dq: output(F, q.dims), dk: output(F, k.dims), dv: output(F, k.dims), groups: 1, scale },
      reference: (p) => backward(p, inputs, Math.fround(scale)),
      ...aligned,
    })
  }
})

t.test('the backward reference agrees with finite differences', async (t) => {
  const random = new Random(4)
  for (const [shape, mask, positions] of [
    [{ B: 1, T: 1, H: 1, K: 1, D: 2 }, 'causal', 'in order'],
    [{ B: 2, T: 5, H: 4, K: 2, D: 6 }, 'packed', 'restarting'],
    [{ B: 1, T: 9, H: 3, K: 1, D: 4 }, 'ragged', 'random'],
  ] as const) {
    const inputs = inputsOf(random, 'f32', shape, mask, positions)
    const { o, lse } = forward(exact, inputs, 0.7)
    const dout = tensor('f32', inputs.q.dims, () => random.normal())
    const gradients = backward(
      exact,
      {
        ...{ ...inputs, dout, lse: { ...dout, size: lse.length, values: lse } },
        delta: { ...dout, size: lse.length, values: deltas(exact, o, dout.values, inputs.q.dims) },
      },
      0.7,
    )
    const f = () => forward(exact, inputs, 0.7).o.reduce((sum, value, i) => sum + value * dout.values[i]!, 0)
    checkGradient(t, `dq, ${mask}`, f, inputs.q.values, gradients.dq, random)
    checkGradient(t, `dk, ${mask}`, f, inputs.k.values, gradients.dk, random)
    checkGradient(t, `dv, ${mask}`, f, inputs.v.values, gradients.dv, random)
  }
})

t.test('huge scores do not overflow', availability(), async (t) => {
  const random = new Random(5)
  for (const F of FLOATS) {
    for (const size of [30, 1e3, 1e12]) {
      const shape = { B: 1, T: 37, H: 2, K: 1, D: 8 }
      const inputs = inputsOf(random, F, shape, 'causal', 'in order', size)
      const [o, lse] = [output(F, inputs.q.dims), output('f32', [1, 2, 37])]
      const all = await runAll(t, {
        op: 'attention_fwd',
        label: `size ${size} ${F}`,
        args: { ...inputs, o, lse, scale: 1 },
      })
      for (const [variant, results] of all) {
        const denominators = new Float32Array(results.get('lse')!.buffer)
        t.ok(denominators.every(Number.isFinite), `${F}, size ${size}, ${variant}: lse is finite`)
      }
      if (size > 1e3) continue // beyond, which key wins is up to rounding
      await check(t, {
        op: 'attention_fwd',
        label: `scores of about ${size ** 2} ${F}`,
        args: { ...inputs, o, lse, scale: 1 },
        reference: (p) => forward(p, inputs, 1),
        scale: { lse: size ** 2 * 8, o: size ** 2 * 8 }, // the largest scores
      })
    }
  }
})

/** Byte ranges of some tokens of a (B,T,heads,D) or, with `byHead`, a (B,H,T) result. */
function tokensOf(bytes: Uint8Array, x: HostTensor, tokens: (t: number) => boolean, byHead = false): number[][] {
  const each = bytes.length / x.size
  const T = byHead ? x.dims[2]! : x.dims[1]!
  const row = byHead ? 1 : x.dims[2]! * x.dims[3]!
  const result: number[][] = []
  for (let at = 0; at < x.size / row; at++) {
    if (tokens(at % T)) result.push([...bytes.subarray(at * row * each, (at + 1) * row * each)])
  }
  return result
}

t.test('packed documents do not see each other, not a bit', availability(), async (t) => {
  const random = new Random(6)
  for (const F of FLOATS) {
    for (const [T, start, end, D] of [
      [40, 13, 29, 16],
      [200, 61, 131, 16],
      [150, 128, 149, 16],
      [90, 29, 66, 80],
      [50, 13, 35, 144],
    ] as const) {
      const shape = { B: 1, T, H: 2, K: 1, D }
      const { H } = shape
      const inputs = inputsOf(random, F, shape, 'causal', 'in order')
      // three documents: [0, start), [start, end), [end, T)
      inputs.first.values.set(Array.from({ length: T }, (_, i) => (i < start ? 0 : i < end ? start : end)))
      const gradients = withResults(random, inputs, 0.25)
      const inside = (i: number): boolean => i >= start && i < end
      const fwd = [output(F, inputs.q.dims), output('f32', [1, H, T])] as const
      const bwd = [output(F, inputs.q.dims), output(F, inputs.k.dims), output(F, inputs.k.dims)] as const
      const run = async (given: Gradients) => {
        const { q, k, v, cos, sin, pos, first } = given
        const forwardArgs = { q, k, v, cos, sin, pos, first, o: fwd[0], lse: fwd[1], scale: 0.25 }
        const backwardArgs = { ...given, dq: bwd[0], dk: bwd[1], dv: bwd[2], groups: 1, scale: 0.25 }
        return [
          await runAll(t, { op: 'attention_fwd', label: 'packed', args: forwardArgs }),
          await runAll(t, { op: 'attention_bwd', label: 'packed', args: backwardArgs }),
        ] as const
      }
      const before = await run(gradients)
      for (const spoilt of seeds(4).map((i) => [NaN, Infinity, 1e30, 0.5][i]!)) {
        const other = { ...gradients }
        for (const name of ['q', 'k', 'v', 'dout'] as const) {
          const x = gradients[name]
          const row = x.dims[2]! * x.dims[3]!
          other[name] = tensor(F, x.dims, (i) =>
            inside(Math.floor(i / row)) ? spoilt * random.pick([1, -1]) : x.values[i]!,
          )
        }
        for (const name of ['lse', 'delta'] as const) {
          const x = gradients[name]
          other[name] = tensor('f32', x.dims, (i) => (inside(i % T) ? spoilt : x.values[i]!))
        }
        const after = await run(other)
        const differing: string[] = []
        for (const variant of before[0].keys()) {
          for (const [field, x, results] of [
            ['o', fwd[0], 0],
            ['lse', fwd[1], 0],
            ['dq', bwd[0], 1],
            ['dk', bwd[1], 1],
            ['dv', bwd[2], 1],
          ] as const) {
            const [one, two] = [before, after].map((all) =>
              tokensOf(all[results].get(variant)!.get(field)!, x, (i) => !inside(i), field === 'lse').join(),
            )
            if (one !== two) differing.push(`${field}, ${variant}`)
          }
        }
        t.strictSame(differing, [], `${F} T ${T} D ${D}: a document of ${spoilt} leaves the others as they were`)
      }
    }
  }
})

t.test('the future is not seen, and NaN shows in its own row', availability(), async (t) => {
  const random = new Random(7)
  for (const F of FLOATS) {
    const T = 140
    const inputs = inputsOf(random, F, { B: 1, T, H: 2, K: 2, D: 8 }, 'causal', 'in order')
    const row = 16
    const k = tensor(F, inputs.k.dims, (i) => (i >= 100 * row ? NaN : inputs.k.values[i]!))
    const v = tensor(F, inputs.v.dims, (i) => (i >= 90 * row ? Infinity : inputs.v.values[i]!))
    const q = tensor(F, inputs.q.dims, (i) => (i === 50 * row ? NaN : inputs.q.values[i]!))
    const given = { ...inputs, q, k, v }
    await check(t, {
      op: 'attention_fwd',
      label: `NaN from key 100 on, infinity from value 90 on, NaN in query 50, ${F}`,
      args: { ...given, o: output(F, q.dims), lse: output('f32', [1, 2, T]), scale: 0.3 },
      reference: (p) => forward(p, given, Math.fround(0.3)),
      scale: { lse: 3 },
    })
  }
})

t.test('kv_append', availability(), async (t) => {
  const random = new Random(8)
  for (const i of seeds(200)) {
    const [F] = combination(i, FLOATS)
    const B = random.int(1, 3)
    const T = random.pick([1, 1, 2, 5, 17, 64, 67])
    const K = random.int(1, 4)
    const D = WIDTHS[i % WIDTHS.length]!
    const S = T + random.int(0, 40)
    const P = S + 9
    const slots = Array.from({ length: B }, () => {
      const all = Array.from({ length: S }, (_, s) => s)
      for (let s = S - 1; s > 0; s--) {
        const other = random.int(0, s)
        ;[all[s], all[other]] = [all[other]!, all[s]!]
      }
      return all.slice(0, T)
    }).flat()
    const args = {
      k: tensor(F, [B, T, K, D], () => random.normal()),
      v: tensor(F, [B, T, K, D], () => random.normal()),
      ...table(P, D),
      pos: tensor('i32', [B, T], () => random.int(0, P - 1)),
      slot: tensor('i32', [B, T], slots),
      k_cache: tensor(F, [B, K, S, D], () => random.normal()),
      v_cache: tensor(F, [B, K, S, D], () => random.normal()),
    }
    const results = await check(t, {
      op: 'kv_append',
      label: `B ${B} T ${T} K ${K} D ${D} S ${S} ${F}`,
      args,
      reference: (p) => {
        const kr = rotated(p, args.k, { ...args, q: args.k, first: args.pos })
        const k_cache = args.k_cache.values.slice()
        const v_cache = args.v_cache.values.slice()
        slots.forEach((slot, at) => {
          for (let head = 0; head < K; head++) {
            const to = ((Math.floor(at / T) * K + head) * S + slot) * D
            const row = at * K + head
            k_cache.set(kr.subarray(row * D, (row + 1) * D), to)
            v_cache.set(args.v.values.subarray(row * D, (row + 1) * D), to)
          }
        })
        return { k_cache, v_cache }
      },
    })
    const written = new Set(slots.map((slot, at) => Math.floor(at / T) * S + slot))
    const wrong: string[] = []
    for (const name of ['k_cache', 'v_cache'] as const) {
      const [was, is] = [encode(args[name]), encode(results[name]!)]
      const row = was.length / (B * K * S)
      for (let at = 0; at < B * K * S; at++) {
        const same = Buffer.compare(was.subarray(at * row, (at + 1) * row), is.subarray(at * row, (at + 1) * row)) === 0
        const slot = Math.floor(at / (K * S)) * S + (at % S)
        if (!same && !written.has(slot)) wrong.push(`${name} ${at}`)
      }
    }
    t.strictSame(wrong, [], 'other slots stay as they were')
  }
})

t.test('attention_cached', availability(), async (t) => {
  const random = new Random(9)
  for (const i of seeds(224)) {
    const wide = i >= 200 // heads beyond 128 have tiles of their own on a GPU
    const [F, garbage] = combination(i, FLOATS, [NaN, Infinity, 1e30])
    const long = !wide && i % 18 === 1 // several chunks of the CPU's larger size
    const B = wide ? 1 : long ? 2 : random.int(1, 3)
    const T =
      i % 3 === 2 ? random.pick(wide ? [9, 17, 33] : [9, 16, 33, 96, 97, 150]) : random.pick([1, 1, 2, 3, 4, 7, 8])
    const [H, K] = wide ? [2, 1] : long ? [8, 4] : random.pick(HEADS)
    let D = wide ? [130, 136, 200, 256][(i >> 1) % 4]! : long ? 8 : WIDTHS[(i * 5) % WIDTHS.length]!
    const most = long ? [1023, 1024, 1025, 2049] : [8, 17, 64, 100, 511, 512, 513, 700]
    const S = T > 8 ? T + random.int(0, 60) : random.pick(most)
    while (!wide && B * H * D * T * S > 900_000 && D > 4) D = 2 * Math.ceil(D / 4)
    const P = S + 5
    // Slots that no token sees hold garbage, as a fresh cache does.
    const last: number[] = []
    const first: number[] = []
    const seen = new Set<number>()
    for (let b = 0; b < B; b++) {
      const used = random.int(0, S - T)
      const padding = random.int(0, used)
      for (let at = 0; at < T; at++) {
        const end = i % 4 === 3 ? random.int(0, S - 1) : used + at
        const start = i % 4 === 3 ? random.int(0, end) : padding
        last.push(end)
        first.push(start)
        for (let slot = start; slot <= end; slot++) seen.add(b * S + slot)
      }
    }
    const slotAt = (at: number): number => Math.floor(at / (K * S * D)) * S + (Math.floor(at / D) % S)
    const cache = (): HostTensor => tensor(F, [B, K, S, D], (at) => (seen.has(slotAt(at)) ? random.normal() : garbage))
    const args = {
      q: tensor(F, [B, T, H, D], () => random.normal()),
      k_cache: cache(),
      v_cache: cache(),
      ...table(P, D),
      pos: tensor('i32', [B, T], () => random.int(0, P - 1)),
      first: tensor('i32', [B, T], first),
      last: tensor('i32', [B, T], last),
    }
    const scale = 1 / Math.sqrt(D)
    const step = (T * H) / K <= 16 // a step of generation, of which the GPU kernels keep all bits of the weights
    await check(t, {
      op: 'attention_cached',
      label: `B ${B} T ${T} H ${H} K ${K} D ${D} S ${S} ${F}, unseen slots hold ${garbage}`,
      args: { ...args, o: output(F, [B, T, H, D]), scale },
      reference: (p) => {
        const store = step ? p.r : operand(p, F)
        const qr = rotatedQueries(p, { ...args, k: args.k_cache, v: args.v_cache }, Math.fround(scale))
        const o = new Float64Array(args.q.size)
        for (let b = 0; b < B; b++) {
          for (let h = 0; h < H; h++) {
            const keyAt = (n: number): number => ((b * K + Math.floor(h / (H / K))) * S + n) * D
            for (let at = 0; at < T; at++) {
              const query = ((b * T + at) * H + h) * D
              const [low, high] = [first[b * T + at]!, last[b * T + at]!]
              attendRow(
                p,
                qr,
                query,
                args.k_cache.values,
                args.v_cache.values,
                keyAt,
                low,
                high,
                D,
                Math.fround(scale),
                o,
                store,
              )
            }
          }
        }
        return { o }
      },
    })
  }
})

t.test('a cache filled token by token gives what the whole sequence gives', availability(), async (t) => {
  const random = new Random(10)
  const shape = { B: 2, T: 21, H: 4, K: 2, D: 10 }
  const { B, T, H, K, D } = shape
  const inputs = inputsOf(random, 'f32', shape, 'padded', 'random')
  const truth = forward(exact, inputs, 0.4).o
  const token = (x: HostTensor, at: number): HostTensor => {
    const row = x.size / (B * T)
    return tensor(
      x.dtype,
      [B, 1, ...x.dims.slice(2)],
      (i) => x.values[(Math.floor(i / row) * T + at) * row + (i % row)]!,
    )
  }
  let k_cache = tensor('f32', [B, K, T, D], () => NaN)
  let v_cache = tensor('f32', [B, K, T, D], () => NaN)
  let error = 0
  for (let at = 0; at < T; at++) {
    const { cos, sin } = inputs
    const [q, k, v, pos, first] = [inputs.q, inputs.k, inputs.v, inputs.pos, inputs.first].map((x) => token(x, at)) as [
      HostTensor,
      HostTensor,
      HostTensor,
      HostTensor,
      HostTensor,
    ]
    const now = tensor('i32', [B, 1], () => at)
    const appended = await runAll(t, {
      op: 'kv_append',
      label: 'step',
      args: { k, v, cos, sin, pos, slot: now, k_cache, v_cache },
    })
    const bytes = [...appended.values()].at(-1)!
    k_cache = tensor('f32', k_cache.dims, new Float32Array(bytes.get('k_cache')!.buffer))
    v_cache = tensor('f32', v_cache.dims, new Float32Array(bytes.get('v_cache')!.buffer))
    const args = { q, k_cache, v_cache, cos, sin, pos, first, last: now, o: output('f32', [B, 1, H, D]), scale: 0.4 }
    for (const results of (await runAll(t, { op: 'attention_cached', label: 'step', args })).values()) {
      new Float32Array(results.get('o')!.buffer).forEach((x, i) => {
        const b = Math.floor(i / (H * D))
        error = Math.max(error, Math.abs(x - truth[(b * T + at) * H * D + (i % (H * D))]!))
      })
    }
  }
  t.ok(error < 2e-6, `off by ${error.toExponential(1)}`)
})

t.test('at least 200 shapes of each op', availability(), async (t) => {
  checkShapes(t, 'attention_fwd', 'attention_delta', 'attention_bwd', 'kv_append', 'attention_cached')
})

t.teardown(() => t.comment(`largest error: ${worst.ratio.toFixed(2)} of what is allowed, ${worst.label}`))
