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
  seeds,
  tensor,
  worst,
} from './harness.js'

function forward(p: Precision, x: HostTensor, w: HostTensor, eps: number) {
  const { r } = p
  const [N, C] = x.dims as [number, number]
  const y = new Float64Array(N * C)
  const rstd = new Float64Array(N)
  for (let n = 0; n < N; n++) {
    let sum = 0
    for (let c = 0; c < C; c++) sum = r(sum + r(x.values[n * C + c]! * x.values[n * C + c]!))
    rstd[n] = r(1 / r(Math.sqrt(r(r(sum / C) + eps))))
    for (let c = 0; c < C; c++) y[n * C + c] = r(w.values[c]! * r(x.values[n * C + c]! * rstd[n]!))
  }
  return { y, rstd }
}

interface Backward {
  x: HostTensor
  w: HostTensor
  rstd: HostTensor
  dy: HostTensor
  add: HostTensor | undefined
  dw_add: HostTensor | undefined
}

function backward(p: Precision, { x, w, rstd, dy, add, dw_add }: Backward) {
  const { r } = p
  const [N, C] = x.dims as [number, number]
  const dx = new Float64Array(N * C)
  const dw = new Float64Array(C)
  for (let n = 0; n < N; n++) {
    const scale = rstd.values[n]!
    let sum = 0
    for (let c = 0; c < C; c++) {
      const at = n * C + c
      sum = r(sum + r(r(w.values[c]! * dy.values[at]!) * x.values[at]!))
      dw[c] = r(dw[c]! + r(r(dy.values[at]! * x.values[at]!) * scale))
    }
    const slope = r(r(r(scale * scale) * scale) * r(sum / C))
    for (let c = 0; c < C; c++) {
      const at = n * C + c
      const value = r(r(r(w.values[c]! * dy.values[at]!) * scale) - r(x.values[at]! * slope))
      dx[at] = add ? r(add.values[at]! + value) : value
    }
  }
  if (dw_add) for (let c = 0; c < C; c++) dw[c] = r(dw_add.values[c]! + dw[c]!)
  return { dx, dw }
}

const exact: Precision = { exact: true, r: (x) => x, store: () => (x) => x }
const CHANNELS = [...ODD, ...RESIDUES, 200, 257, 384]
const ROWS = [...ODD, 62, 130, 191, 200]

/** Around the widths at which the CUDA kernels change: 384, 768 (1 warp), 3072, 6144 (8 warps), 12288 (registers). */
const WIDE = [383, 385, 388, 760, 767, 769, 776, 1032, 1999, 2048, 3071, 3076]
const WIDEST = [4096, 6136, 6145, 6152, 12289, 12296]

t.test('rmsnorm_fwd', availability(), async (t) => {
  const random = new Random(1)
  for (const i of seeds(216)) {
    const [F, W, eps, wide] = combination(i, FLOATS, FLOATS, [1e-5, 1e-6, 0.5], [...WIDE, ...WIDEST])
    const N = i < 160 ? random.pick(ROWS) : random.int(1, 3)
    const C = i < 160 ? CHANNELS[Math.floor(i / 4) % CHANNELS.length]! : wide
    const size = 10 ** random.int(-3, 3)
    const x = tensor(F, [N, C], () => size * random.normal())
    const w = tensor(W, [C], () => 1 + 0.3 * random.normal())
    await check(t, {
      op: 'rmsnorm_fwd',
      label: `N ${N} C ${C} ${F} ${W}, size ${size}, eps ${eps}`,
      args: { x, w, y: output(F, [N, C]), rstd: output('f32', [N]), eps },
      reference: (p) => forward(p, x, w, Math.fround(eps)),
    })
  }
})

t.test('rmsnorm_bwd', availability(), async (t) => {
  const random = new Random(2)
  for (const i of seeds(216)) {
    const [F, W, addend, dwAddend, G] = combination(i, FLOATS, FLOATS, ADDENDS, ADDENDS, FLOATS)
    const N = i < 144 ? random.pick(ROWS) : random.int(1, 9)
    const C =
      i < 144 ? CHANNELS[(i * 7) % CHANNELS.length]! : (WIDEST[i - 210] ?? WIDE[Math.floor(i / 4) % WIDE.length]!)
    const x = tensor(F, [N, C], () => random.normal())
    const w = tensor(W, [C], () => 1 + 0.3 * random.normal())
    const rstd = tensor('f32', [N], forward(exact, x, w, 1e-5).rstd)
    const dy = tensor(F, [N, C], () => random.normal())
    const add = addend === 'absent' ? undefined : tensor(F, [N, C], () => random.normal())
    const dw_add = dwAddend === 'absent' ? undefined : tensor(G, [C], () => random.normal())
    await check(t, {
      op: 'rmsnorm_bwd',
      label: `N ${N} C ${C} ${F} ${W} ${G}, add ${addend}, dw_add ${dwAddend}`,
      args: { x, w, rstd, dy, add, dw_add, dx: output(F, [N, C]), dw: output(G, [C]) },
      alias: { ...(addend === 'aliased' && { add: 'dx' }), ...(dwAddend === 'aliased' && { dw_add: 'dw' }) },
      reference: (p) => backward(p, { x, w, rstd, dy, add, dw_add }),
      // a sum over N of random signs, of which only C results are compared
      scale: { dw: C < 64 ? 2 * Math.sqrt(N) : 0 },
    })
  }
})

t.test('rmsnorm_bwd: more rows than blocks, sums that no shared memory holds', availability(), async (t) => {
  const random = new Random(5)
  for (const [N, C, F] of [
    [2049, 385, 'f32'],
    [8191, 5, 'f32'],
    [8193, 16, 'bf16'],
    [9000, 3, 'bf16'],
    [5, 41480, 'bf16'],
  ] as const) {
    const x = tensor(F, [N, C], () => random.normal())
    const w = tensor(F, [C], () => 1 + 0.3 * random.normal())
    const rstd = tensor('f32', [N], () => 0.5 + random.next())
    const dy = tensor(F, [N, C], () => random.normal())
    await check(t, {
      op: 'rmsnorm_bwd',
      label: `N ${N} C ${C} ${F}`,
      args: { x, w, rstd, dy, dx: output(F, [N, C]), dw: output('f32', [C]) },
      reference: (p) => backward(p, { x, w, rstd, dy, add: undefined, dw_add: undefined }),
      scale: { dw: 2 * Math.sqrt(N) },
    })
  }
})

t.test('the same bits wherever a tensor starts', availability(), async (t) => {
  const random = new Random(6)
  for (const [N, C, F] of [
    [9, 40, 'bf16'],
    [5, 776, 'bf16'],
    [5, 772, 'f32'],
  ] as const) {
    const x = tensor(F, [N, C], () => random.normal())
    const w = tensor(F, [C], () => 1 + 0.3 * random.normal())
    const dy = tensor(F, [N, C], () => random.normal())
    const rstd = tensor('f32', [N], forward(exact, x, w, 1e-5).rstd)
    const seen = new Set<string>()
    for (let i = 0; i < 8; i++) {
      // each run is shifted by 0 to 3 elements at random
      const label = `N ${N} C ${C} ${F}, run ${i}`
      const results = {
        ...(await check(t, {
          op: 'rmsnorm_fwd',
          label,
          args: { x, w, y: output(F, [N, C]), rstd: output('f32', [N]), eps: 1e-5 },
          reference: (p) => forward(p, x, w, Math.fround(1e-5)),
        })),
        ...(await check(t, {
          op: 'rmsnorm_bwd',
          label,
          args: { x, w, rstd, dy, dx: output(F, [N, C]), dw: output('f32', [C]) },
          reference: (p) => backward(p, { x, w, rstd, dy, add: undefined, dw_add: undefined }),
          scale: { dw: 2 * Math.sqrt(N) },
        })),
      }
      seen.add(JSON.stringify(Object.values(results).map(({ values }) => [...values])))
    }
    t.equal(seen.size, 1, `N ${N} C ${C} ${F}: one result`)
  }
})

t.test('rmsnorm_bwd: the reference agrees with finite differences', async (t) => {
  const random = new Random(3)
  for (const [N, C] of [
    [1, 1],
    [1, 7],
    [5, 16],
    [9, 33],
  ] as const) {
    const x = tensor('f32', [N, C], () => random.normal())
    const w = tensor('f32', [C], () => 1 + 0.3 * random.normal())
    const dy = tensor('f32', [N, C], () => random.normal())
    const add = tensor('f32', [N, C], () => random.normal())
    const f = () => {
      const { y } = forward(exact, x, w, 1e-2)
      return y.reduce((sum, value, i) => sum + value * dy.values[i]!, 0)
    }
    const rstd = { ...tensor('f32', [N], () => 0), values: forward(exact, x, w, 1e-2).rstd }
    const { dx, dw } = backward(exact, { x, w, rstd, dy, add: undefined, dw_add: undefined })
    checkGradient(t, `dx (${N},${C})`, f, x.values, dx, random)
    checkGradient(t, `dw (${N},${C})`, f, w.values, dw, random)
    const added = backward(exact, { x, w, rstd, dy, add, dw_add: undefined }).dx
    t.ok(
      added.every((value, i) => Math.abs(value - dx[i]! - add.values[i]!) < 1e-12),
      'add is added',
    )
  }
})

t.test('rmsnorm: zero rows, NaN and infinity stay in their rows', availability(), async (t) => {
  const random = new Random(4)
  for (const F of FLOATS) {
    for (const C of [5, 37, 128]) {
      const x = tensor(F, [5, C], (i) => {
        const row = Math.floor(i / C)
        if (row === 1) return 0
        if (row === 2 && i % C === C - 1) return NaN
        return row === 3 && i % C === 0 ? Infinity : random.normal()
      })
      const w = tensor('f32', [C], () => random.normal())
      const { y } = await check(t, {
        op: 'rmsnorm_fwd',
        label: `special rows ${F} C ${C}`,
        args: { x, w, y: output(F, [5, C]), rstd: output('f32', [5]), eps: 1e-6 },
        reference: (p) => forward(p, x, w, Math.fround(1e-6)),
      })
      t.ok(
        y!.values.subarray(C, 2 * C).every((value) => value === 0),
        'a row of zeros gives zeros',
      )
      t.ok(y!.values.subarray(2 * C, 3 * C).every(Number.isNaN), 'NaN fills its row')
    }
  }
})

t.test('at least 200 shapes of each op', availability(), async (t) => checkShapes(t, 'rmsnorm_fwd', 'rmsnorm_bwd'))

t.teardown(() => t.comment(`largest error: ${worst.ratio.toFixed(2)} of what is allowed, ${worst.label}`))
