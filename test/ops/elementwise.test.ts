import t from 'tap'
import {
  availability,
  BLOCKS,
  check,
  checkShapes,
  DRAWN,
  FLOATS,
  ODD,
  output,
  Random,
  RESIDUES,
  tensor,
} from './harness.js'

// The last ones are more than the emulated GPU holds at a time: its grid goes round.
const SIZES = [...ODD, ...RESIDUES, ...BLOCKS, ...DRAWN, 16383, 16384, 16385, 16400, 33001, 70001, 131081]

t.test('add', availability(), async (t) => {
  const random = new Random(1)
  for (const N of SIZES) {
    for (const F of FLOATS) {
      for (const dims of [[N], N % 3 === 0 ? [3, N / 3] : [N, 1, 1]]) {
        const a = tensor(F, dims, () => random.normal())
        const b = tensor(F, dims, () => random.normal())
        await check(t, {
          op: 'add',
          label: `(${dims.join(',')}) ${F}`,
          args: { a, b, y: output(F, dims) },
          reference: () => ({ y: a.values.map((x, j) => Math.fround(x + b.values[j]!)) }),
          bitwise: true,
        })
      }
    }
  }
})

t.test('add: special values', availability(), async (t) => {
  const values = [0, -0, 1, -1, Infinity, -Infinity, NaN, 3.4028234663852886e38, 1e-45, -1e-45, 2 ** -126]
  for (const F of FLOATS) {
    const n = values.length
    const a = tensor(F, [n * n], (i) => values[i % n]!)
    const b = tensor(F, [n * n], (i) => values[Math.floor(i / n)]!)
    await check(t, {
      op: 'add',
      label: `special values ${F}`,
      args: { a, b, y: output(F, [n * n]) },
      reference: () => ({ y: a.values.map((x, j) => Math.fround(x + b.values[j]!)) }),
      bitwise: true,
    })
  }
})

t.test('scale', availability(), async (t) => {
  const random = new Random(3)
  for (const [i, N] of SIZES.entries()) {
    for (const F of FLOATS) {
      const x = tensor(F, N % 3 === 0 ? [3, N / 3] : [N], () => random.normal())
      const a = [2, 1 / 3, -0.7, 1e-3, 0, 16][i % 6]!
      await check(t, {
        op: 'scale',
        label: `${N} ${F} by ${a}`,
        args: { x, y: output(F, x.dims), a },
        reference: () => ({ y: x.values.map((value) => Math.fround(value * Math.fround(a))) }),
        bitwise: true,
      })
    }
  }
  const values = [0, -0, 1, -1, Infinity, -Infinity, NaN, 3.4028234663852886e38, 1e-45, 2 ** -126]
  for (const a of [2, -0.5, 0, Infinity]) {
    for (const F of FLOATS) {
      const x = tensor(F, [values.length], values)
      await check(t, {
        op: 'scale',
        label: `special values ${F} by ${a}`,
        args: { x, y: output(F, x.dims), a },
        reference: () => ({ y: x.values.map((value) => Math.fround(value * a)) }),
        bitwise: true,
      })
    }
  }
})

t.test('cast', availability(), async (t) => {
  const random = new Random(2)
  for (const N of SIZES) {
    for (const F of FLOATS) {
      for (const G of FLOATS) {
        const x = tensor(F, [N], () => random.normal() * 10 ** random.int(-30, 30))
        await check(t, {
          op: 'cast',
          label: `${N} ${F} to ${G}`,
          args: { x, y: output(G, [N]) },
          reference: () => ({ y: x.values }),
          bitwise: true,
        })
      }
    }
  }
})

t.test('cast: ties, infinities, NaN, subnormals, overflow', availability(), async (t) => {
  const edges = [
    0,
    -0,
    NaN,
    Infinity,
    -Infinity,
    1e-45,
    -1e-45,
    2 ** -126,
    3.4028234663852886e38,
    3.3961775292304957e38,
  ]
  // 1 + i / 1024: every position of a tie and its neighbours
  const ties = Array.from({ length: 64 }, (_, i) => 1 + i / 1024)
  const near = ties.flatMap((x) => [x + 2 ** -23, x - 2 ** -23, -x])
  const all = [...edges, ...ties, ...near]
  for (const shift of [0, 1, 5]) {
    for (const [F, G] of [
      ['f32', 'bf16'],
      ['bf16', 'f32'],
      ['f32', 'f32'],
      ['bf16', 'bf16'],
    ] as const) {
      const x = tensor(F, [all.length - shift], all.slice(shift))
      await check(t, {
        op: 'cast',
        label: `edges ${F} to ${G}, from ${shift}`,
        args: { x, y: output(G, [all.length - shift]) },
        reference: () => ({ y: x.values }),
        bitwise: true,
      })
    }
  }
})

t.test('fill', availability(), async (t) => {
  const values = [0, -0, 1, -1.5, 0.1, Infinity, -Infinity, 1e-40, 3.4e38, Math.PI]
  for (const [i, N] of SIZES.entries()) {
    for (const F of FLOATS) {
      for (const value of [values[i % 10]!, values[(i + 5) % 10]!]) {
        await check(t, {
          op: 'fill',
          label: `${N} ${F} with ${value}`,
          args: { y: output(F, [N]), value },
          reference: () => ({ y: new Float64Array(N).fill(Math.fround(value)) }),
          bitwise: true,
        })
      }
    }
  }
})

t.test('at least 200 shapes of each op', availability(), async (t) => checkShapes(t, 'add', 'scale', 'cast', 'fill'))
