import t from 'tap'
import {
  ADDENDS,
  availability,
  check,
  checkShapes,
  combination,
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

function dot({ r }: Precision, a: HostTensor, b: HostTensor, add?: HostTensor): number[] {
  let sum = 0
  for (let i = 0; i < a.size; i++) sum = r(sum + r(a.values[i]! * b.values[i]!))
  return [add ? r(add.values[0]! + sum) : sum]
}

/** The rounding of a sum is proportional to its terms, and there is one result only. */
const terms = (a: HostTensor, b: HostTensor): number =>
  a.values.reduce((sum, x, i) => sum + Math.abs(x * b.values[i]!), 0)

const SIZES = [...ODD, ...RESIDUES, ...DRAWN, 1000, 4095, 4096, 4097, 4111, 8191, 12289, 50021]

t.test('dot', availability(), async (t) => {
  const random = new Random(1)
  for (const N of SIZES) {
    for (const addend of ADDENDS) {
      const a = tensor('f32', [N], () => random.normal())
      const b = tensor('f32', [N], () => random.normal())
      const add = addend === 'absent' ? undefined : tensor('f32', [1], [random.normal()])
      await check(t, {
        op: 'dot',
        label: `${N}, add ${addend}`,
        args: { a, b, add, y: output('f32', [1]) },
        alias: addend === 'aliased' ? { add: 'y' } : {},
        reference: (p) => ({ y: dot(p, a, b, add) }),
        scale: { y: terms(a, b) },
      })
    }
  }
})

t.test('sum_squares', availability(), async (t) => {
  const random = new Random(2)
  for (const [i, N] of SIZES.entries()) {
    for (const j of [0, 1, 2, 3]) {
      const [G, addend] = combination(2 * i + j, FLOATS, ADDENDS)
      const x = tensor(G, [N], () => random.normal())
      const add = addend === 'absent' ? undefined : tensor('f32', [1], [random.normal()])
      await check(t, {
        op: 'sum_squares',
        label: `${N} ${G}, add ${addend}`,
        args: { x, add, y: output('f32', [1]) },
        alias: addend === 'aliased' ? { add: 'y' } : {},
        reference: (p) => ({ y: dot(p, x, x, add) }),
      })
    }
  }
})

t.test('sums keep small terms beside many large ones', availability(), async (t) => {
  // 2^17 ones and then 2^17 times 2^-10: one running sum in f32 loses the small ones to rounding, blocks do not.
  const N = 2 ** 18
  const a = tensor('f32', [N], (i) => (i < N / 2 ? 1 : 2 ** -10))
  const ones = tensor('f32', [N], () => 1)
  await check(t, {
    op: 'dot',
    label: 'ones and small ones',
    args: { a, b: ones, y: output('f32', [1]) },
    reference: () => ({ y: [2 ** 17 + 2 ** 7] }),
  })
})

t.test('more than all blocks of the CUDA kernel take at a time', availability(), async (t) => {
  // Whole numbers, whose sum is below 2^24: exact in any order.
  const N = 4096 * 1024 + 4101
  const x = tensor('f32', [N], (i) => i % 3)
  await check(t, {
    op: 'sum_squares',
    label: `${N}`,
    args: { x, y: output('f32', [1]) },
    reference: (p) => ({ y: dot(p, x, x) }),
    bitwise: true,
  })
})

t.test('the same bits wherever a tensor starts', availability(), async (t) => {
  const random = new Random(4)
  for (const N of [37, 4099, 9001]) {
    const a = tensor('f32', [N], () => random.normal())
    const b = tensor('f32', [N], () => random.normal())
    const bits = { dot: new Set<number>(), sum_squares: new Set<number>() }
    for (let i = 0; i < 8; i++) {
      // each run is shifted by 0 to 3 elements at random
      const y = output('f32', [1])
      const label = `${N}, run ${i}`
      const scale = { y: terms(a, b) }
      const [dots, squares] = [
        await check(t, { op: 'dot', label, args: { a, b, y }, reference: (p) => ({ y: dot(p, a, b) }), scale }),
        await check(t, { op: 'sum_squares', label, args: { x: a, y }, reference: (p) => ({ y: dot(p, a, a) }) }),
      ]
      bits.dot.add(dots['y']!.values[0]!)
      bits.sum_squares.add(squares['y']!.values[0]!)
    }
    t.strictSame([bits.dot.size, bits.sum_squares.size], [1, 1], `${N}: one result each`)
  }
})

t.test('NaN, infinity, overflow', availability(), async (t) => {
  const N = 4099
  for (const [label, at, value] of [
    ['NaN first', 0, NaN],
    ['NaN last', N - 1, NaN],
    ['infinity', 2000, Infinity],
    ['overflow of a square', 4096, 1e30],
  ] as const) {
    const x = tensor('f32', [N], (i) => (i === at ? value : 0.01))
    await check(t, {
      op: 'sum_squares',
      label,
      args: { x, y: output('f32', [1]) },
      reference: (p) => ({ y: dot(p, x, x) }),
    })
    const ones = tensor('f32', [N], () => 1)
    await check(t, {
      op: 'dot',
      label,
      args: { a: x, b: ones, y: output('f32', [1]) },
      reference: (p) => ({ y: dot(p, x, ones) }),
    })
  }
})

t.test('at least 200 shapes of each op', availability(), async (t) => checkShapes(t, 'dot', 'sum_squares'))

t.teardown(() => t.comment(`largest error: ${worst.ratio.toFixed(2)} of what is allowed, ${worst.label}`))
