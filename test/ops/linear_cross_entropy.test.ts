import t from 'tap'
import {
  ADDENDS,
  availability,
  check,
  checkGradient,
  checkShapes,
  combination,
  FLOATS,
  type HostTensor,
  ODD,
  output,
  type Precision,
  Random,
  RESIDUES,
  roundBf16,
  runAll,
  seeds,
  tensor,
  worst,
} from './harness.js'

interface Given {
  x: HostTensor
  w: HostTensor
  labels: HostTensor
  weight?: HostTensor
  dw_add?: HostTensor | undefined
}

const onGpu = !(process.env['ROPEWALK_TEST_DEVICE'] ?? 'cpu').startsWith('cpu')

/**
 * Everything from one row of logits at a time, in the order of the rows; nothing is known here of chunks. A GPU keeps the
 * slopes of bf16 logits in bf16, as PyTorch does there: the naive computation of the same precision does so too.
 */
function crossEntropy({ exact, r }: Precision, { x, w, labels, weight, dw_add }: Given) {
  const store = onGpu && !exact && x.dtype === 'bf16' && w.dtype === 'bf16' ? roundBf16 : r
  const [N, C] = x.dims as [number, number]
  const V = w.dims[0]!
  const nll = new Float64Array(N)
  const dx = new Float64Array(N * C)
  const dw = new Float64Array(V * C)
  const dz = new Float64Array(V)
  if (dw_add) dw.set(dw_add.values)
  for (let n = 0; n < N; n++) {
    const label = labels.values[n]!
    if (label < 0) continue
    let top = -Infinity
    for (let v = 0; v < V; v++) {
      let sum = 0
      for (let c = 0; c < C; c++) sum = r(sum + r(x.values[n * C + c]! * w.values[v * C + c]!))
      dz[v] = sum
      top = Math.max(top, sum)
    }
    const logit = dz[label]!
    let total = 0
    for (let v = 0; v < V; v++) {
      dz[v] = r(Math.exp(r(dz[v]! - top)))
      total = r(total + dz[v]!)
    }
    nll[n] = r(r(top - logit) + r(Math.log(total)))
    if (!weight) continue
    for (let v = 0; v < V; v++) {
      const share = r(dz[v]! / total)
      const slope = store(r(weight.values[n]! * (v === label ? r(share - 1) : share)))
      for (let c = 0; c < C; c++) {
        dx[n * C + c] = r(dx[n * C + c]! + r(slope * w.values[v * C + c]!))
        dw[v * C + c] = r(dw[v * C + c]! + r(slope * x.values[n * C + c]!))
      }
    }
  }
  return { nll, dx, dw }
}

const exact: Precision = { exact: true, r: (x) => x, store: () => (x) => x }
const sum = (values: Float64Array): number => values.reduce((total, value) => total + value, 0)

interface Shape {
  N: number
  C: number
  V: number
  chunk: number
}

function shapeOf(random: Random, i: number): Shape {
  const N = random.pick(ODD)
  let C = random.pick([...ODD.filter((size) => size < 70)])
  const V = i < 48 ? 1 + ((i * 7) % 48) : random.pick([...ODD, ...RESIDUES, 200, 259])
  while (N * C * V > (i < 80 ? 400_000 : 100_000)) C = Math.ceil(C / 2)
  return { N, C, V, chunk: random.pick([1, 2, 3, 7, 16, 64, N, N + 3, Math.max(1, N - 1), Math.ceil(N / 2)]) }
}

const label = ({ N, C, V, chunk }: Shape): string => `N ${N} C ${C} V ${V} chunk ${chunk}`

/** A label in ten is ignored. */
const labelsOf = (random: Random, N: number, V: number): HostTensor =>
  tensor('i32', [N], () => (random.next() < 0.1 ? random.pick([-1, -100]) : random.int(0, V - 1)))

t.test('linear_cross_entropy_fwd', availability(), async (t) => {
  const random = new Random(1)
  for (const i of seeds(200)) {
    const [F, W] = combination(i, FLOATS, FLOATS)
    const shape = shapeOf(random, i)
    const { N, C, V, chunk } = shape
    const x = tensor(F, [N, C], () => random.normal())
    const w = tensor(W, [V, C], () => (2 * random.normal()) / Math.sqrt(C))
    const labels = labelsOf(random, N, V)
    const { nll } = await check(t, {
      op: 'linear_cross_entropy_fwd',
      label: `${label(shape)} ${F} ${W}`,
      args: { x, w, labels, nll: output('f32', [N]), chunk },
      reference: (p) => ({ nll: crossEntropy(p, { x, w, labels }).nll }),
      scale: { nll: 4 + Math.log(V) }, // of the numbers it is a difference of
    })
    t.ok(
      labels.values.every((l, n) => l >= 0 || Object.is(nll!.values[n], 0)),
      'ignored labels give 0',
    )
  }
})

t.test('linear_cross_entropy_bwd', availability(), async (t) => {
  const random = new Random(2)
  for (const i of seeds(140)) {
    const [F, W, addend] = combination(i, FLOATS, FLOATS, ADDENDS)
    const shape = shapeOf(random, i)
    const { N, C, V, chunk } = shape
    const x = tensor(F, [N, C], () => random.normal())
    const w = tensor(W, [V, C], () => (2 * random.normal()) / Math.sqrt(C))
    const labels = labelsOf(random, N, V)
    const weight = tensor('f32', [N], () => (random.next() < 0.1 ? 0 : 0.5 + random.next()))
    const dw_add = addend === 'absent' ? undefined : tensor('f32', [V, C], () => random.normal())
    const args = { x, w, labels, weight, dw_add }
    await check(t, {
      op: 'linear_cross_entropy_bwd',
      label: `${label(shape)} ${F} ${W}, dw_add ${addend}`,
      args: { ...args, nll: output('f32', [N]), dx: output(F, [N, C]), dw: output('f32', [V, C]), chunk },
      alias: addend === 'aliased' ? { dw_add: 'dw' } : {},
      reference: (p) => crossEntropy(p, args),
      scale: { nll: 4 + Math.log(V), dx: 1 / Math.sqrt(C), dw: V === 1 ? 1 : 0.3 },
    })
  }
})

t.test('linear_cross_entropy_bwd: rows in whole pieces, of several passes', availability(), async (t) => {
  // Rows of 8 elements or multiples are what a GPU reads 16 bytes at a time, the logits 1024 at a time. dz takes the
  // place of the logits: a pass must not write where another one has still to read.
  const random = new Random(8)
  const sizes = [8, 64, 120, 1016, 1020, 1024, 1028, 1032, 1033, 1100, 2040, 2047, 2048, 2052, 2056, 3072, 3080, 4104]
  for (const i of seeds(60)) {
    const [F, W] = i % 3 === 0 ? [random.pick(FLOATS), random.pick(FLOATS)] : (['bf16', 'bf16'] as const)
    const V = sizes[i % sizes.length]!
    const [N, C] = V < 1000 ? [random.int(1, 70), 8 * random.int(1, 9)] : [random.int(1, 10), 8 * random.int(1, 2)]
    const shape = { N, C, V, chunk: random.int(Math.ceil(N / 3), N + 1) }
    const x = tensor(F, [N, C], () => random.normal())
    const w = tensor(W, [V, C], () => (2 * random.normal()) / Math.sqrt(C))
    const labels = labelsOf(random, N, V)
    const weight = tensor('f32', [N], () => 0.5 + random.next())
    const dw_add = i % 2 ? undefined : tensor('f32', [V, C], () => random.normal())
    const args = { x, w, labels, weight, dw_add }
    const outputs = { nll: output('f32', [N]), dx: output(F, x.dims), dw: output('f32', w.dims) }
    await check(t, {
      op: 'linear_cross_entropy_bwd',
      label: `${label(shape)} ${F} ${W}`,
      args: { ...args, ...outputs, chunk: shape.chunk },
      reference: (p) => crossEntropy(p, args),
      scale: { nll: 4 + Math.log(V), dx: 1 / Math.sqrt(C), dw: 0.3 },
    })
  }
})

t.test('the gradient reference agrees with finite differences', async (t) => {
  const random = new Random(3)
  for (const [N, C, V] of [
    [1, 1, 2],
    [4, 7, 5],
    [9, 6, 33],
  ] as const) {
    const x = tensor('f32', [N, C], () => random.normal())
    const w = tensor('f32', [V, C], () => random.normal())
    const labels = tensor('i32', [N], (n) => (n === 2 ? -1 : random.int(0, V - 1)))
    const weight = tensor('f32', [N], () => random.uniform())
    const f = () => sum(crossEntropy(exact, { x, w, labels }).nll.map((value, n) => value * weight.values[n]!))
    const { dx, dw } = crossEntropy(exact, { x, w, labels, weight })
    checkGradient(t, `dx (${N},${C},${V})`, f, x.values, dx, random)
    checkGradient(t, `dw (${N},${C},${V})`, f, w.values, dw, random)
  }
})

t.test('huge logits do not overflow', availability(), async (t) => {
  const random = new Random(4)
  for (const F of FLOATS) {
    for (const size of [30, 1e3, 1e15]) {
      const [N, C, V] = [13, 8, 67]
      const x = tensor(F, [N, C], () => size * random.normal())
      const w = tensor(F, [V, C], () => size * random.normal())
      const labels = tensor('i32', [N], () => random.int(0, V - 1))
      const weight = tensor('f32', [N], () => 1)
      const { nll, dx, dw } = await check(t, {
        op: 'linear_cross_entropy_bwd',
        label: `logits of about ${size ** 2} ${F}`,
        args: {
          x,
          w,
          labels,
          weight,
          nll: output('f32', [N]),
          dx: output(F, [N, C]),
          dw: output('f32', [V, C]),
          chunk: 4,
        },
        reference: (p) => crossEntropy(p, { x, w, labels, weight }),
      })
      t.ok(
        [nll, dx, dw].every((result) => result!.values.every(Number.isFinite)),
        'all finite',
      )
    }
  }
})

t.test('a sure and right prediction keeps its small loss and gradient', availability(), async (t) => {
  // p of the label is 1 - 1e-7 or so: 1 - p must not be computed from a rounded p alone.
  const [C, V] = [1, 3]
  const x = tensor('f32', [1, C], [1])
  const w = tensor('f32', [V, C], [16, 0, 0])
  const labels = tensor('i32', [1], [0])
  const weight = tensor('f32', [1], [1])
  const { dw } = await check(t, {
    op: 'linear_cross_entropy_bwd',
    label: 'sure',
    args: {
      x,
      w,
      labels,
      weight,
      nll: output('f32', [1]),
      dx: output('f32', [1, C]),
      dw: output('f32', [V, C]),
      chunk: 1,
    },
    reference: (p) => crossEntropy(p, { x, w, labels, weight }),
  })
  t.ok(Math.abs(dw!.values[1]! / Math.exp(-16) - 1) < 1e-6, 'the small shares are right')
})

t.test('where no label counts, nothing is added', availability(), async (t) => {
  const random = new Random(5)
  const [N, C, V] = [11, 9, 21]
  for (const addend of ADDENDS) {
    const x = tensor('f32', [N, C], () => random.normal())
    const w = tensor('f32', [V, C], () => random.normal())
    const labels = tensor('i32', [N], (n) => -1 - n)
    const weight = tensor('f32', [N], () => 1)
    const dw_add = addend === 'absent' ? undefined : tensor('f32', [V, C], () => random.normal())
    const args = { x, w, labels, weight, dw_add }
    const { dx, dw } = await check(t, {
      op: 'linear_cross_entropy_bwd',
      label: `all ignored, dw_add ${addend}`,
      args: { ...args, nll: output('f32', [N]), dx: output('f32', [N, C]), dw: output('f32', [V, C]), chunk: 4 },
      alias: addend === 'aliased' ? { dw_add: 'dw' } : {},
      reference: (p) => crossEntropy(p, args),
    })
    t.ok(
      dx!.values.every((value) => value === 0),
      'dx is 0',
    )
    t.ok(
      dw!.values.every((value, i) => value === (dw_add?.values[i] ?? 0)),
      'dw is dw_add',
    )
  }
})

t.test('NaN and infinity show in their row', availability(), async (t) => {
  const random = new Random(6)
  const [N, C, V] = [9, 11, 37]
  for (const value of [NaN, Infinity]) {
    const x = tensor('f32', [N, C], (i) => (i === 4 * C + 3 ? value : random.normal()))
    const w = tensor('f32', [V, C], () => random.normal())
    const labels = tensor('i32', [N], () => random.int(0, V - 1))
    const weight = tensor('f32', [N], () => 1)
    const all = await runAll(t, {
      op: 'linear_cross_entropy_bwd',
      label: `x holds ${value}`,
      args: {
        x,
        w,
        labels,
        weight,
        nll: output('f32', [N]),
        dx: output('f32', [N, C]),
        dw: output('f32', [V, C]),
        chunk: 5,
      },
    })
    for (const [variant, results] of all) {
      const nll = [...new Float32Array(results.get('nll')!.buffer)]
      const dx = new Float32Array(results.get('dx')!.buffer)
      t.ok(
        nll.every((loss, n) => Number.isFinite(loss) === (n !== 4)),
        `${variant}: only the loss of row 4 is not finite`,
      )
      t.ok(
        dx.every((slope, i) => Number.isNaN(slope) === (Math.floor(i / C) === 4)),
        `${variant}: only row 4 of dx is NaN`,
      )
      t.ok(
        new Float32Array(results.get('dw')!.buffer).every(Number.isNaN),
        `${variant}: dw is NaN: the step is skipped`,
      )
    }
  }
})

t.test('the chunk changes no more than rounding does', availability(), async (t) => {
  // From a row at a time to more rows than there are.
  const random = new Random(7)
  const [N, C, V] = [150, 24, 75]
  const x = tensor('f32', [N, C], () => random.normal())
  const w = tensor('f32', [V, C], () => random.normal())
  const labels = labelsOf(random, N, V)
  for (const chunk of [1, 17, 149, 150, 1000]) {
    await check(t, {
      op: 'linear_cross_entropy_fwd',
      label: `chunk ${chunk}`,
      args: { x, w, labels, nll: output('f32', [N]), chunk },
      reference: (p) => ({ nll: crossEntropy(p, { x, w, labels }).nll }),
    })
  }
})

t.test('at least 200 shapes of each op', availability(), async (t) => {
  checkShapes(t, 'linear_cross_entropy_fwd', 'linear_cross_entropy_bwd')
})

t.teardown(() => t.comment(`largest error: ${worst.ratio.toFixed(2)} of what is allowed, ${worst.label}`))
