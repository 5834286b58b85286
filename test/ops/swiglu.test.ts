import t from 'tap'
import {
  availability,
  BLOCKS,
  check,
  checkGradient,
  checkShapes,
  DRAWN,
  FLOATS,
  type HostTensor,
  ODD,
  output,
  type Precision,
  Random,
  RESIDUES,
  tensor,
  worst,
} from './harness.js'

const sigmoid = ({ r }: Precision, g: number): number => r(1 / r(1 + r(Math.exp(-g))))

function forward(p: Precision, gate: HostTensor, up: HostTensor) {
  const { r } = p
  return { y: gate.values.map((g, i) => r(r(g * sigmoid(p, g)) * up.values[i]!)) }
}

function backward(p: Precision, gate: HostTensor, up: HostTensor, dy: HostTensor) {
  const { r } = p
  const dgate = gate.values.map((g, i) => {
    const s = sigmoid(p, g)
    return r(r(dy.values[i]! * up.values[i]!) * r(s * r(1 + r(g * r(1 - s)))))
  })
  const dup = gate.values.map((g, i) => r(dy.values[i]! * r(g * sigmoid(p, g))))
  return { dgate, dup }
}

const exact: Precision = { exact: true, r: (x) => x, store: () => (x) => x }
// The last one is more than the emulated GPU holds at a time: its grid goes round.
const SIZES = [...ODD, ...RESIDUES, ...BLOCKS, ...DRAWN, 16383, 16385, 32769, 70001]

t.test('swiglu_fwd', availability(), async (t) => {
  const random = new Random(1)
  for (const N of SIZES) {
    for (const F of FLOATS) {
      for (const size of [random.pick([0.1, 1]), 10]) {
        const gate = tensor(F, [N], () => size * random.normal())
        const up = tensor(F, [N], () => random.normal())
        await check(t, {
          op: 'swiglu_fwd',
          label: `${N} ${F}, size ${size}`,
          args: { gate, up, y: output(F, [N]) },
          reference: (p) => forward(p, gate, up),
        })
      }
    }
  }
})

t.test('swiglu_bwd', availability(), async (t) => {
  const random = new Random(2)
  for (const N of SIZES) {
    for (const F of FLOATS) {
      for (const size of [random.pick([0.1, 1]), 10]) {
        const gate = tensor(F, [N], () => size * random.normal())
        const up = tensor(F, [N], () => random.normal())
        const dy = tensor(F, [N], () => random.normal())
        await check(t, {
          op: 'swiglu_bwd',
          label: `${N} ${F}, size ${size}`,
          args: { gate, up, dy, dgate: output(F, [N]), dup: output(F, [N]) },
          reference: (p) => backward(p, gate, up, dy),
        })
      }
    }
  }
})

t.test('swiglu_bwd: the reference agrees with finite differences', async (t) => {
  const random = new Random(3)
  const [gate, up, dy] = [3, 1, 1].map((size) => tensor('f32', [40], () => size * random.normal())) as [
    HostTensor,
    HostTensor,
    HostTensor,
  ]
  const f = () => forward(exact, gate, up).y.reduce((sum, y, i) => sum + y * dy.values[i]!, 0)
  const { dgate, dup } = backward(exact, gate, up, dy)
  checkGradient(t, 'dgate', f, gate.values, dgate, random)
  checkGradient(t, 'dup', f, up.values, dup, random)
})

t.test('swiglu: each gate alone, from -200 to 200', availability(), async (t) => {
  // One element a result, so that the error is relative to it: small outputs must be right as well.
  const one = tensor('f32', [1], [1])
  for (let g = -200; g <= 200; g += 12.5) {
    const gate = tensor('f32', [1], [g])
    await check(t, {
      op: 'swiglu_fwd',
      label: `gate ${g}`,
      args: { gate, up: one, y: output('f32', [1]) },
      reference: (p) => forward(p, gate, one),
      // e^-g overflows below -88, and what is then 0 may be as large as 88 e^-87
      scale: g < -80 ? { y: 1e-30 } : { y: 1e-7 },
    })
    await check(t, {
      op: 'swiglu_bwd',
      label: `gate ${g}`,
      args: { gate, up: one, dy: one, dgate: output('f32', [1]), dup: output('f32', [1]) },
      reference: (p) => backward(p, gate, one, one),
      scale: g < -80 ? { dgate: 1e-30, dup: 1e-30 } : { dgate: 1, dup: 1e-7 },
    })
  }
})

t.test('swiglu: special values', availability(), async (t) => {
  // Beside NaN and infinities, the neighbours are finite and must stay right.
  const special = [NaN, 0, 1, Infinity, -0, 88.72, 88.73, -87.34, -88.8, 1e38, -1e38, 1e-40, -1e-40]
  for (const F of FLOATS) {
    const gate = tensor(F, [39], (i) => special[i % special.length]!)
    const up = tensor(F, [39], (i) => (i < 13 ? 1 : i < 26 ? -0.5 : i === 30 ? NaN : 2))
    const dy = tensor(F, [39], (i) => (i === 20 ? NaN : 1))
    await check(t, {
      op: 'swiglu_fwd',
      label: F,
      args: { gate, up, y: output(F, [39]) },
      reference: (p) => forward(p, gate, up),
    })
    await check(t, {
      op: 'swiglu_bwd',
      label: F,
      args: { gate, up, dy, dgate: output(F, [39]), dup: output(F, [39]) },
      reference: (p) => backward(p, gate, up, dy),
    })
  }
})

t.test('at least 200 shapes of each op', availability(), async (t) => checkShapes(t, 'swiglu_fwd', 'swiglu_bwd'))

t.teardown(() => t.comment(`largest error: ${worst.ratio.toFixed(2)} of what is allowed, ${worst.label}`))
