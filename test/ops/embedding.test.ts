import t from 'tap'
import {
  ADDENDS,
  availability,
  check,
  checkShapes,
  combination,
  FLOATS,
  type HostTensor,
  ODD,
  output,
  type Precision,
  Random,
  seeds,
  tensor,
  worst,
} from './harness.js'

function gather(ids: HostTensor, w: HostTensor, C: number): Float64Array {
  const y = new Float64Array(ids.size * C)
  for (let n = 0; n < ids.size; n++) {
    const id = ids.values[n]!
    for (let c = 0; c < C; c++) y[n * C + c] = id < 0 || id >= w.dims[0]! ? NaN : w.values[id * C + c]!
  }
  return y
}

function scatter(p: Precision, ids: HostTensor, dy: HostTensor, add: HostTensor | undefined, V: number): Float64Array {
  const C = dy.dims[1]!
  const dw = new Float64Array(V * C)
  if (add) dw.set(add.values)
  for (let n = 0; n < ids.size; n++) {
    const id = ids.values[n]!
    if (id < 0 || id >= V) continue
    for (let c = 0; c < C; c++) dw[id * C + c] = p.r(dw[id * C + c]! + dy.values[n * C + c]!)
  }
  return dw
}

/** Around the channels that a warp takes at a time, by their width: 128, 512 and 1024. */
const WIDE = [504, 511, 512, 513, 520, 639, 1016, 1023, 1024, 1025, 1032, 1040, 2056]

t.test('embedding_fwd', availability(), async (t) => {
  const random = new Random(1)
  for (const i of seeds(212)) {
    const [W, F, wide] = combination(i, FLOATS, FLOATS, WIDE)
    const N = random.pick(i < 160 ? [...ODD, 200, 257] : [1, 7, 8, 9])
    const V = random.pick(ODD)
    const C = i < 40 ? 1 + i : i < 160 ? random.pick([...ODD, 200]) : wide
    const ids = tensor('i32', [N], () => random.int(0, V - 1))
    const w = tensor(W, [V, C], () => random.normal())
    await check(t, {
      op: 'embedding_fwd',
      label: `N ${N} V ${V} C ${C} ${W} to ${F}`,
      args: { ids, w, y: output(F, [N, C]) },
      reference: () => ({ y: gather(ids, w, C) }),
      bitwise: true,
    })
  }
})

t.test(
  'embedding_fwd: special values pass through, ids outside give NaN and touch nothing',
  availability(),
  async (t) => {
    for (const [W, F] of [
      ['f32', 'f32'],
      ['bf16', 'bf16'],
      ['f32', 'bf16'],
      ['bf16', 'f32'],
    ] as const) {
      const special = [NaN, Infinity, -Infinity, -0, 0, 3.4e38, 1e-40, 2 ** -126, 1 + 2 ** -8, 1 + 3 * 2 ** -8]
      const w = tensor(W, [3, 37], (i) => special[i % special.length]!)
      const ids = tensor('i32', [6], [2, -1, 0, 3, 2147483647, -2147483648])
      await check(t, {
        op: 'embedding_fwd',
        label: `special values ${W} to ${F}`,
        args: { ids, w, y: output(F, [6, 37]) },
        reference: () => ({ y: gather(ids, w, 37) }),
        bitwise: true,
      })
    }
  },
)

t.test('embedding_bwd', availability(), async (t) => {
  const random = new Random(2)
  for (const i of seeds(212)) {
    const [F, G, addend, wide] = combination(i, FLOATS, FLOATS, ADDENDS, WIDE)
    const N = random.pick([...ODD, 200])
    const V = random.pick([1, 2, 3, 7, 30, 31, 32, 33, 64, 131, 257])
    const C = i < 40 ? 1 + i : i < 160 ? random.pick([...ODD, 150]) : wide
    const ids = tensor('i32', [N], () => (random.next() < 0.05 ? -1 : random.int(0, V - 1)))
    const dy = tensor(F, [N, C], () => random.normal())
    const add = addend === 'absent' ? undefined : tensor(G, [V, C], () => random.normal())
    await check(t, {
      op: 'embedding_bwd',
      label: `N ${N} V ${V} C ${C} ${F} to ${G}, add ${addend}`,
      args: { ids, dy, add, dw: output(G, [V, C]) },
      alias: addend === 'aliased' ? { add: 'dw' } : {},
      reference: (p) => ({ dw: scatter(p, ids, dy, add, V) }),
    })
  }
})

t.test('embedding_bwd: sorting many tokens of a large vocabulary', availability(), async (t) => {
  const random = new Random(4)
  const cases = [511, 512, 513, 1025, 3000].flatMap((N) => [1023, 1024, 1025, 2500].map((V) => [N, V] as const))
  for (const [i, [N, V]] of cases.entries()) {
    // evenly, or half of them the same token
    const ids = tensor('i32', [N], () => (i % 2 && random.next() < 0.5 ? V - 1 : random.int(0, V - 1)))
    const dy = tensor('f32', [N, 5], () => random.normal())
    await check(t, {
      op: 'embedding_bwd',
      label: `N ${N} V ${V}`,
      args: { ids, dy, dw: output('f32', [V, 5]) },
      // summed in the order of n, nothing else
      reference: ({ exact }) => ({
        dw: scatter({ exact, r: Math.fround, store: () => Math.fround }, ids, dy, undefined, V),
      }),
      bitwise: true,
    })
  }
})

t.test('embedding_bwd: a frequent token keeps counting in bf16', availability(), async (t) => {
  // 1000 ones: a running sum in bf16 stops at 256.
  const ids = tensor('i32', [1000], () => 1)
  const dy = tensor('bf16', [1000, 19], () => 1)
  await check(t, {
    op: 'embedding_bwd',
    label: '1000 times the same token',
    args: { ids, dy, dw: output('bf16', [3, 19]) },
    reference: (p) => ({ dw: scatter(p, ids, dy, undefined, 3) }),
  })
})

t.test('embedding_bwd: NaN stays in its own row', availability(), async (t) => {
  const random = new Random(3)
  const ids = tensor('i32', [5], [0, 2, 1, 2, 0])
  const dy = tensor('f32', [5, 21], (i) => (i === 2 * 21 + 4 ? NaN : i === 21 ? Infinity : random.normal()))
  const { dw } = await check(t, {
    op: 'embedding_bwd',
    label: 'NaN and infinity',
    args: { ids, dy, dw: output('f32', [4, 21]) },
    reference: (p) => ({ dw: scatter(p, ids, dy, undefined, 4) }),
  })
  t.equal(dw!.values.filter((x) => Number.isNaN(x)).length, 1)
})

t.test('at least 200 shapes of each op', availability(), async (t) => {
  checkShapes(t, 'embedding_fwd', 'embedding_bwd')
})

t.teardown(() => t.comment(`largest error: ${worst.ratio.toFixed(2)} of what is allowed, ${worst.label}`))
