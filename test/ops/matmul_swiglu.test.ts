import t, { type Test } from 'tap'
import {
  availability,
  check,
  combination,
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

function product(p: Precision, a: HostTensor, w: HostTensor, M: number, N: number, K: number): Float64Array {
  const c = new Float64Array(M * N)
  const { fround } = Math
  for (let m = 0; m < M; m++) {
    for (let n = 0; n < N; n++) {
      let sum = 0
      // two loops instead of p.r: calls of a closure would be most of the test's time
      if (p.exact) for (let k = 0; k < K; k++) sum += a.values[m * K + k]! * w.values[n * K + k]!
      else for (let k = 0; k < K; k++) sum = fround(sum + fround(a.values[m * K + k]! * w.values[n * K + k]!))
      c[m * N + n] = sum
    }
  }
  return c
}

/** y is made from gate and up as they are stored. */
function forward(p: Precision, a: HostTensor, wGate: HostTensor, wUp: HostTensor, M: number, N: number, K: number) {
  const { r } = p
  const gate = product(p, a, wGate, M, N, K)
  const up = product(p, a, wUp, M, N, K)
  const stored = p.store(a.dtype)
  const y = gate.map((x, i) => {
    const g = stored(x)
    return r(r(g * r(1 / r(1 + r(Math.exp(-g))))) * stored(up[i]!))
  })
  return { gate, up, y }
}

async function checkShape(
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
    reference: (p) => forward(p, a, wGate!, wUp!, M, N, K),
    scale: { gate: 1, up: 1, y: 1 },
  })
}

t.test('matmul_swiglu', availability(), async (t) => {
  const random = new Random(1)
  const sizes = [...ODD, ...RESIDUES]
  for (let i = 0; i < 96; i++) {
    const [F, W] = combination(i, FLOATS, FLOATS) as [HostTensor['dtype'], HostTensor['dtype']]
    const K = random.pick([...sizes, 200])
    await checkShape(t, random, [random.pick([random.int(1, 40), random.pick(sizes)]), random.pick(sizes), K], F, W)
  }
})

t.test('matmul_swiglu: rows in whole pieces, on tensor cores', availability(), async (t) => {
  // Every number of whole pieces in both tiles of the CUDA kernel (64 and 128 columns of each matrix), every residue of
  // rows, pipelines shorter and longer than their stages.
  const random = new Random(2)
  for (let i = 0; i < 96; i++) {
    const M = 5 + ((i * 37) % 140)
    const N = 8 * (1 + (i % 34))
    await checkShape(t, random, [M, N, 8 * random.int(1, i % 8 === 0 ? 60 : 24)], 'bf16', 'bf16')
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
    await checkShape(t, random, onGpu ? [m * 4, n * 4, K] : [m, n, K], 'bf16', 'bf16')
  }
})

t.teardown(() => t.comment(`largest error: ${worst.ratio.toFixed(2)} of what is allowed, ${worst.label}`))
