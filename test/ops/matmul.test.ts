import t, { type Test } from 'tap'
import {
  ADDENDS,
  availability,
  check,
  checkGradient,
  checkShapes,
  combination,
  FLOATS,
  fromBf16Bits,
  type HostTensor,
  ODD,
  output,
  type Precision,
  Random,
  RESIDUES,
  runAll,
  seeds,
  tensor,
  worst,
} from './harness.js'
import { FORMATS, quantizedTensor } from './quantized-reference.js'

type Layout = 'nn' | 'nt' | 'tn'
const LAYOUTS: readonly Layout[] = ['nn', 'nt', 'tn']

const aDims = (layout: Layout, M: number, K: number): number[] => (layout === 'tn' ? [K, M] : [M, K])
const bDims = (layout: Layout, N: number, K: number): number[] => (layout === 'nt' ? [N, K] : [K, N])

function multiply(
  p: Precision,
  layout: Layout,
  a: ArrayLike<number>,
  b: ArrayLike<number>,
  add: ArrayLike<number> | undefined,
  M: number,
  N: number,
  K: number,
): Float64Array {
  const c = new Float64Array(M * N)
  const { fround } = Math
  const [am, ak] = layout === 'tn' ? [1, M] : [K, 1]
  const [bn, bk] = layout === 'nt' ? [K, 1] : [1, N]
  for (let m = 0; m < M; m++) {
    for (let n = 0; n < N; n++) {
      let sum = 0
      // two loops instead of p.r: calls of a closure would be most of the tests' time
      if (p.exact) for (let k = 0; k < K; k++) sum += a[m * am + k * ak]! * b[n * bn + k * bk]!
      else for (let k = 0; k < K; k++) sum = fround(sum + fround(a[m * am + k * ak]! * b[n * bn + k * bk]!))
      c[m * N + n] = add ? p.r(add[m * N + n]! + sum) : sum
    }
  }
  return c
}

const exact: Precision = { exact: true, r: (x) => x, store: () => (x) => x }

/** Largest sum of absolute terms: where few results are compared, they may be small by chance. */
function terms(layout: Layout, a: HostTensor, b: HostTensor, M: number, N: number, K: number): number {
  const sums = multiply(exact, layout, a.values.map(Math.abs), b.values.map(Math.abs), undefined, M, N, K)
  return sums.reduce((most, sum) => Math.max(most, sum), 0)
}

for (const [seed, layout] of LAYOUTS.entries()) {
  const op = `matmul_${layout}`

  t.test(op, availability(), async (t) => {
    const random = new Random(1 + seed)
    const sizes = [...ODD, ...RESIDUES]
    const large = [
      [130, 270, 300],
      [193, 97, 515],
      [257, 129, 64],
      [1, 333, 400],
      [7, 513, 257],
      [65, 33, 1100],
      [300, 5, 270],
    ] as const
    // 24 combinations of dtypes and add; few rows, some rows and many rows take different paths
    for (const i of seeds(192)) {
      const [F, W, G, addend] = combination(i, FLOATS, FLOATS, FLOATS, ADDENDS)
      const [M, N, K] =
        i < 7 * 24
          ? [random.pick([random.int(1, 40), random.pick(sizes)]), random.pick(sizes), random.pick([...sizes, 200])]
          : large[i % large.length]!
      const a = tensor(F, aDims(layout, M, K), () => random.normal())
      const b = tensor(W, bDims(layout, N, K), () => random.normal())
      const add = addend === 'absent' ? undefined : tensor(G, [M, N], () => random.normal())
      await check(t, {
        op,
        label: `${M}x${N}x${K} ${F} ${W} ${G}, add ${addend}`,
        args: { a, b, add, c: output(G, [M, N]) },
        alias: addend === 'aliased' ? { add: 'c' } : {},
        reference: (p) => ({ c: multiply(p, layout, a.values, b.values, add?.values, M, N, K) }),
        ...(M * N < 256 && { scale: { c: terms(layout, a, b, M, N, K) } }),
      })
    }
  })

  t.test(`${op}: every size from 1 to 128 in each dimension`, availability(), async (t) => {
    // All sizes together: the steps have no divisor in common with 128.
    const random = new Random(11 + seed)
    for (const i of seeds(256)) {
      const [M, N, K] = [37, 53, 29].map((step) => 1 + ((i * step) % 128)) as [number, number, number]
      const F = i < 128 ? 'f32' : 'bf16'
      const a = tensor(F, aDims(layout, M, K), () => random.normal())
      const b = tensor(F, bDims(layout, N, K), () => random.normal())
      await check(t, {
        op,
        label: `${M}x${N}x${K} ${F}`,
        args: { a, b, c: output(random.pick(FLOATS), [M, N]) },
        reference: (p) => ({ c: multiply(p, layout, a.values, b.values, undefined, M, N, K) }),
        ...(M * N < 256 && { scale: { c: terms(layout, a, b, M, N, K) } }),
      })
    }
  })

  t.test(`${op}: exact integers`, availability(), async (t) => {
    // Sums of small integers have one right value in any order: every term is there exactly once.
    const random = new Random(21 + seed)
    for (const [M, N, K] of [
      [1, 1, 1],
      [1, 64, 513],
      [5, 100, 700],
      [33, 47, 129],
      [70, 300, 260],
      [200, 70, 90],
      [130, 20, 4200],
    ] as const) {
      for (const F of FLOATS) {
        const a = tensor(F, aDims(layout, M, K), () => random.int(-8, 8))
        const b = tensor(F, bDims(layout, N, K), () => random.int(-8, 8))
        const add = tensor('f32', [M, N], () => random.int(-1000, 1000))
        await check(t, {
          op,
          label: `integers ${M}x${N}x${K} ${F}`,
          args: { a, b, add, c: output('f32', [M, N]) },
          reference: (p) => ({ c: multiply(p, layout, a.values, b.values, add.values, M, N, K).map((x) => x + 0) }),
          bitwise: true,
        })
      }
    }
  })

  t.test(`${op}: large shapes, by their product with a vector`, availability(), async (t) => {
    // c x = a (b x) costs the reference next to nothing; in small integers both sides are exact. The simulated GPU would
    // take most of the file's time for the longest sum, and crosses all edges of its tiles and stages with a third of it.
    const random = new Random(26 + seed)
    for (const [M, N, K] of [
      [340, 1030, 520],
      [129, 1100, process.env['ROPEWALK_TEST_DEVICE'] === 'simt' ? 1370 : 4100],
      [16, 2100, 300],
      [128, 600, 1030],
    ] as const) {
      const a = tensor('f32', aDims(layout, M, K), () => random.int(-8, 8))
      const b = tensor('bf16', bDims(layout, N, K), () => random.int(-8, 8))
      const x = new Float64Array(N).map(() => random.int(-8, 8))
      const wanted = multiply(
        exact,
        layout,
        a.values,
        multiply(exact, layout === 'nt' ? 'tn' : 'nn', b.values, x, undefined, K, 1, N),
        undefined,
        M,
        1,
        K,
      )
      const all = await runAll(t, { op, label: `${M}x${N}x${K}`, args: { a, b, c: output('f32', [M, N]) } })
      for (const [variant, results] of all) {
        const c = new Float32Array(results.get('c')!.buffer)
        t.strictSame(multiply(exact, 'nn', c, x, undefined, M, 1, N), wanted, `${M}x${N}x${K}, ${variant}`)
      }
    }
  })

  t.test(`${op}: rows in whole pieces`, availability(), async (t) => {
    // What a GPU reads and writes 16 bytes at a time where rows allow it: their lengths are multiples of 8, every other
    // size is free. Up to 4 rows and more than 512 terms go ways of their own. The last 64 are for tensor cores, whose
    // smaller tile is of 64 x 64 x 64, and meet every residue of it.
    const random = new Random(51 + seed)
    for (const i of seeds(96 + 64)) {
      const [F, W, G, addend] = combination(i < 96 ? i : 4 * i + 3, FLOATS, FLOATS, FLOATS, ADDENDS)
      const whole = { nn: [false, true, true], nt: [false, i % 3 === 0, true], tn: [true, true, false] }[layout]
      const few = i < 96 && i % 4 === 1 && layout === 'nt'
      const sizes =
        i < 96
          ? [few ? random.int(1, 5) : random.int(1, 140), random.int(1, 140), random.int(1, 400)]
          : [1 + ((i * 37) % 128), 1 + ((i * 53) % 128), 1 + ((i * 29) % 320)]
      const [M, N, K] = sizes.map(
        (size, d) => (whole[d] ? Math.ceil(size / 8) * 8 : size) + (d === 2 && i < 96 && i % 8 === 3 ? 640 : 0),
      ) as [number, number, number]
      const a = tensor(F, aDims(layout, M, K), () => random.normal())
      const b = tensor(W, bDims(layout, N, K), () => random.normal())
      const add = addend === 'absent' ? undefined : tensor(G, [M, N], () => random.normal())
      await check(t, {
        op,
        label: `${M}x${N}x${K} ${F} ${W} ${G}, add ${addend}`,
        args: { a, b, add, c: output(G, [M, N]) },
        alias: addend === 'aliased' ? { add: 'c' } : {},
        reference: (p) => ({ c: multiply(p, layout, a.values, b.values, add?.values, M, N, K) }),
        ...(M * N < 256 && { scale: { c: terms(layout, a, b, M, N, K) } }),
      })
    }
  })

  t.test(`${op}: tiles of 128 and 256`, availability(), async (t) => {
    // By the product with a vector, as above; sums of -1, 0 and 1 are exact in bf16 too. The sizes choose the large tiles
    // of the CUDA kernels (on 4 simulated SMs; a GPU needs larger ones) and cross their edges and pipelines.
    const random = new Random(61 + seed)
    const onGpu = process.env['ROPEWALK_TEST_DEVICE']?.startsWith('cuda')
    for (const i of seeds(onGpu ? 10 : 30)) {
      const large = i % 2 === 0
      const [m, n] = onGpu ? (large ? [2048, 4096] : [1024, 2048]) : large ? [256, 512] : [256, 256]
      const whole = { nn: [false, true, true], nt: [false, false, true], tn: [true, true, false] }[layout]
      const [M, N, K] = [m + i - 20, n + random.int(-40, 24), 1 + ((i * 89) % 420)].map((size, d) =>
        whole[d] ? Math.ceil(size / 8) * 8 : size,
      ) as [number, number, number]
      const G = i % 4 < 2 ? 'bf16' : 'f32'
      const digit = () => random.int(-1, 1)
      const a = tensor(i % 6 === 5 ? 'f32' : 'bf16', aDims(layout, M, K), digit)
      const b = tensor('bf16', bDims(layout, N, K), digit)
      const add = i % 3 === 0 ? undefined : tensor(G, [M, N], digit)
      const x = new Float64Array(N).map(digit)
      const bx = multiply(exact, layout === 'nt' ? 'tn' : 'nn', b.values, x, undefined, K, 1, N)
      const offset = add && multiply(exact, 'nn', add.values, x, undefined, M, 1, N)
      const wanted = multiply(exact, layout, a.values, bx, offset, M, 1, K)
      const label = `${M}x${N}x${K} ${a.dtype} ${G}${add ? ', add' : ''}`
      const all = await runAll(t, { op, label, args: { a, b, add, c: output(G, [M, N]) } })
      for (const [variant, results] of all) {
        const { buffer } = results.get('c')!.slice()
        const c = G === 'f32' ? new Float32Array(buffer) : Float64Array.from(new Uint16Array(buffer), fromBf16Bits)
        t.strictSame(multiply(exact, 'nn', c, x, undefined, M, 1, N), wanted, `${label}, ${variant}`)
      }
    }
  })

  t.test(`${op}: NaN and infinity reach their row or column and nothing else`, availability(), async (t) => {
    const random = new Random(31 + seed)
    for (const [M, N, K] of [
      [3, 17, 9],
      [40, 50, 33],
      [129, 65, 37],
    ] as const) {
      const row = M >> 1
      const column = N - 1
      const spoiltA = random.int(0, K - 1)
      const a = tensor('f32', aDims(layout, M, K), () => random.normal())
      const b = tensor('f32', bDims(layout, N, K), () => 0.5 + random.next())
      a.values[layout === 'tn' ? spoiltA * M + row : row * K + spoiltA] = NaN
      b.values[layout === 'nt' ? column * K + spoiltA : spoiltA * N + column] = Infinity
      const { c } = await check(t, {
        op,
        label: `special ${M}x${N}x${K}`,
        infinityMayBeNaN: true,
        args: { a, b, c: output('f32', [M, N]) },
        reference: (p) => ({ c: multiply(p, layout, a.values, b.values, undefined, M, N, K) }),
      })
      t.equal(c!.values.filter((x) => !Number.isFinite(x)).length, M + N - 1)
    }
  })

  t.test(`${op}: nothing is rounded between blocks of the sum`, availability(), async (t) => {
    // A large first term and many small ones: a sum kept in bf16 at any point would lose them.
    const [M, N, K] = [9, 20, 1500]
    const a = tensor('bf16', aDims(layout, M, K), () => 1)
    const b = tensor('bf16', bDims(layout, N, K), (i) =>
      (layout === 'nt' ? i % K : Math.floor(i / N)) === 0 ? 1024 : 1,
    )
    await check(t, {
      op,
      label: 'bf16 in and out',
      args: { a, b, c: output('bf16', [M, N]) },
      reference: (p) => ({ c: multiply(p, layout, a.values, b.values, undefined, M, N, K) }),
      bitwise: true,
    })
  })
}

// ---- a quantised b ----

for (const [seed, layout] of (['nn', 'nt'] as const).entries()) {
  const op = `matmul_${layout}`

  t.test(`${op}: a quantised b`, availability(), async (t) => {
    // Rows that are whole blocks, which a GPU reads 16 bytes at a time, and others; few, some and many rows of a.
    const random = new Random(71 + seed)
    const sizes = [...ODD, ...RESIDUES]
    for (let i = 0; i < 200; i++) {
      const [format, F, G, addend, whole] = combination(i, FORMATS, FLOATS, FLOATS, ADDENDS, [true, false])
      const length = whole ? 64 * random.int(1, i % 5 === 0 ? 10 : 4) : random.pick([...sizes, 200, 300])
      const other = random.pick(sizes)
      const [N, K] = layout === 'nt' ? [other, length] : [length, whole ? random.int(1, 200) : other]
      const M = random.pick([random.int(1, 5), random.int(6, 40), random.pick(sizes), i % 20 === 0 ? 300 : 70])
      const a = tensor(F, [M, K], () => random.normal())
      const { b, values } = quantizedTensor(format, bDims(layout, N, K), () => random.normal(), F)
      const add = addend === 'absent' ? undefined : tensor(G, [M, N], () => random.normal())
      await check(t, {
        op,
        label: `${M}x${N}x${K} ${F} ${format} ${G}, add ${addend}`,
        args: { a, b, add, c: output(G, [M, N]) },
        alias: addend === 'aliased' ? { add: 'c' } : {},
        reference: (p) => ({ c: multiply(p, layout, a.values, values, add?.values, M, N, K) }),
        scale: { c: terms(layout, a, { ...b, values }, M, N, K) },
      })
    }
  })

  t.test(`${op}: a quantised b has the bits that dequantize gives`, availability(), async (t) => {
    // By the product with unit vectors: absmax of many sizes, of which no part may be kept more exactly here than there.
    const random = new Random(75 + seed)
    for (const [i, rows] of [3, 12, 100, 200].entries()) {
      for (const format of FORMATS) {
        for (const F of FLOATS) {
          const K = i % 2 === 0 ? 256 : 200
          const N = layout === 'nt' ? 70 : 64 * (1 + i) + (i % 2)
          const a = tensor(F, [rows, K], (at) => Number(at % K === (Math.floor(at / K) * 37) % K))
          const element = (at: number) => 10 ** ((at >> 6) % 5) * random.normal()
          const { b, values } = quantizedTensor(format, bDims(layout, N, K), element, F)
          const chosen = new Float64Array(rows * N).map((_, at) => {
            const [k, n] = [(Math.floor(at / N) * 37) % K, at % N]
            return values[layout === 'nt' ? n * K + k : k * N + n]! + 0
          })
          await check(t, {
            op,
            label: `${rows}x${N}x${K} ${F} ${format}`,
            args: { a, b, c: output('f32', [rows, N]) },
            reference: () => ({ c: chosen }),
            bitwise: true,
          })
        }
      }
    }
  })

  t.test(`${op}: a quantised b in tiles of 128 and 256, by their product with a vector`, availability(), async (t) => {
    // As for plain matrices. Every block of 64 has an element of the largest magnitude, so that -1, 0 and 1 are exact.
    const random = new Random(81 + seed)
    const onGpu = process.env['ROPEWALK_TEST_DEVICE']?.startsWith('cuda')
    for (let i = 0; i < (onGpu ? 8 : 16); i++) {
      const format = FORMATS[i % 2]!
      const large = i % 4 < 2
      const [m, n] = onGpu ? (large ? [2048, 4096] : [1024, 2048]) : large ? [256, 512] : [256, 256]
      const short = random.int(0, 3)
      const N = layout === 'nt' ? n - 8 * short : n - 64 * (short % 2)
      const [M, K] = [m + i - 12, layout === 'nt' ? 64 * random.int(1, 7) : random.int(1, 50) * 8]
      const F = i % 8 > 5 ? 'f32' : 'bf16'
      const G = i % 3 === 0 ? 'f32' : 'bf16'
      const a = tensor(F, [M, K], () => random.int(-1, 1))
      const one = (at: number) => (at % 64 === 0 ? 1 : random.int(-1, 1))
      const { b, values } = quantizedTensor(format, bDims(layout, N, K), one, F)
      t.ok(values.every((x) => Math.abs(x) === 1 || Math.abs(x) < 1e-6 || x === 0))
      const add = i % 5 === 0 ? undefined : tensor(G, [M, N], () => random.int(-1, 1))
      const x = new Float64Array(N).map(() => random.int(-1, 1))
      const bx = multiply(exact, layout === 'nt' ? 'tn' : 'nn', values, x, undefined, K, 1, N)
      const offset = add && multiply(exact, 'nn', add.values, x, undefined, M, 1, N)
      const wanted = multiply(exact, layout, a.values, bx, offset, M, 1, K)
      const label = `${M}x${N}x${K} ${F} ${format} ${G}${add ? ', add' : ''}`
      const all = await runAll(t, { op, label, args: { a, b, add, c: output(G, [M, N]) } })
      for (const [variant, results] of all) {
        const { buffer } = results.get('c')!.slice()
        const c = G === 'f32' ? new Float32Array(buffer) : Float64Array.from(new Uint16Array(buffer), fromBf16Bits)
        t.strictSame(multiply(exact, 'nn', c, x, undefined, M, 1, N), wanted, `${label}, ${variant}`)
      }
    }
  })
}

t.test('matmul_swiglu: quantised matrices', availability(), async (t) => {
  const random = new Random(91)
  for (let i = 0; i < 24; i++) {
    const [format, F] = combination(i, FORMATS, FLOATS)
    const [M, N, K] = [random.int(1, 70), random.int(1, 90), i % 3 === 0 ? random.int(1, 90) : 64 * random.int(1, 3)]
    const a = tensor(F, [M, K], () => random.normal())
    const [gate, up] = [0, 1].map(() => quantizedTensor(format, [N, K], () => random.normal() / Math.sqrt(K), F))
    const plain = ({ b, values }: typeof gate & {}): HostTensor => ({ ...b, values })
    await check(t, {
      op: 'matmul_swiglu',
      label: `${M}x${N}x${K} ${F} ${format}`,
      args: {
        a,
        w_gate: gate!.b,
        w_up: up!.b,
        gate: output(F, [M, N]),
        up: output(F, [M, N]),
        y: output(F, [M, N]),
      },
      reference: (p) => gated(p, a, plain(gate!), plain(up!), M, N, K),
      scale: { gate: 1, up: 1, y: 1 },
    })
  }
})

// ---- matmul_swiglu ----

/** y is made from gate and up as they are stored. */
function gated(p: Precision, a: HostTensor, wGate: HostTensor, wUp: HostTensor, M: number, N: number, K: number) {
  const { r } = p
  const gate = multiply(p, 'nt', a.values, wGate.values, undefined, M, N, K)
  const up = multiply(p, 'nt', a.values, wUp.values, undefined, M, N, K)
  const stored = p.store(a.dtype)
  const y = gate.map((x, i) => {
    const g = stored(x)
    return r(r(g * r(1 / r(1 + r(Math.exp(-g))))) * stored(up[i]!))
  })
  return { gate, up, y }
}

async function checkGated(
  t: Test,
  random: Random,
  [M, N, K]: [number, number, number],
  F: HostTensor['dtype'],
  W: HostTensor['dtype'],
): Promise<void> {
  const a = tensor(F, [M, K], () => random.normal())
  const [wGate, wUp] = [0, 1].map(() => tensor(W, [N, K], () => random.normal() / Math.sqrt(K)))
  await check(t, {
    op: 'matmul_swiglu',
    label: `${M}x${N}x${K} ${F} ${W}`,
    args: {
      a,
      w_gate: wGate!,
      w_up: wUp!,
      gate: output(F, [M, N]),
      up: output(F, [M, N]),
      y: output(F, [M, N]),
    },
    reference: (p) => gated(p, a, wGate!, wUp!, M, N, K),
    scale: { gate: 1, up: 1, y: 1 },
  })
}

t.test('matmul_swiglu', availability(), async (t) => {
  const random = new Random(1)
  const sizes = [...ODD, ...RESIDUES]
  for (const i of seeds(112)) {
    const [F, W] = combination(i, FLOATS, FLOATS) as [HostTensor['dtype'], HostTensor['dtype']]
    const K = random.pick([...sizes, 200])
    await checkGated(t, random, [random.pick([random.int(1, 40), random.pick(sizes)]), random.pick(sizes), K], F, W)
  }
})

t.test('matmul_swiglu: rows in whole pieces, on tensor cores', availability(), async (t) => {
  // Every number of whole pieces in both tiles of the CUDA kernel (64 and 128 columns of each matrix), every residue of
  // rows, pipelines shorter and longer than their stages.
  const random = new Random(2)
  for (const i of seeds(96)) {
    const M = 5 + ((i * 37) % 140)
    const N = 8 * (1 + (i % 34))
    await checkGated(t, random, [M, N, 8 * random.int(1, i % 8 === 0 ? 60 : 24)], 'bf16', 'bf16')
  }
})

t.test('matmul_swiglu: the tile of 128 x 256', availability(), async (t) => {
  // The large one is chosen where there is work for all SMs: 4 simulated ones, far more on a GPU.
  const random = new Random(3)
  const onGpu = process.env['ROPEWALK_TEST_DEVICE']?.startsWith('cuda')
  for (const [m, n, K] of [
    [250, 264, 200],
    [256, 256, 72],
    [131, 504, 136],
    [384, 376, 264],
  ] as const) {
    await checkGated(t, random, onGpu ? [m * 4, n * 4, K] : [m, n, K], 'bf16', 'bf16')
  }
})

t.test('the three layouts are the gradients of each other', async (t) => {
  // c = a b: da = dc b^T is nt, db = a^T dc is tn.
  const random = new Random(41)
  const [M, N, K] = [4, 5, 6]
  const [a, b, dc] = [M * K, K * N, M * N].map((size) => new Float64Array(size).map(() => random.normal())) as [
    Float64Array,
    Float64Array,
    Float64Array,
  ]
  const f = () => multiply(exact, 'nn', a, b, undefined, M, N, K).reduce((sum, c, i) => sum + c * dc[i]!, 0)
  checkGradient(t, 'da', f, a, multiply(exact, 'nt', dc, b, undefined, M, K, N), random)
  checkGradient(t, 'db', f, b, multiply(exact, 'tn', a, dc, undefined, K, N, M), random)
})

t.test('at least 200 shapes of each op', availability(), async (t) => {
  checkShapes(t, 'matmul_nn', 'matmul_nt', 'matmul_tn', 'matmul_swiglu')
})

t.teardown(() => t.comment(`largest error: ${worst.ratio.toFixed(2)} of what is allowed, ${worst.label}`))
