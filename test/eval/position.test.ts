import { join } from 'node:path'
import t from 'tap'
import { type LossModel } from '../../lib/eval/perplexity.js'
import { logBins, perplexityByPosition } from '../../lib/eval/position.js'
import { Llama } from '../../lib/model/llama.js'
import { fixtures } from '../golden.js'

/** A model whose loss is a function of a token and of how many it sees; `rows` records what it was fed. */
function fake(loss: (id: number, seen: number) => number, bosId?: number): LossModel & { rows: number[][] } {
  const rows: number[][] = []
  const tokenLosses = async (tokens: readonly (readonly number[])[]) => {
    const [row] = tokens as [readonly number[]]
    rows.push([...row])
    const data = Float32Array.from(row, (_, t) => (t + 1 < row.length ? loss(row[t + 1]!, t + 1) : 0))
    return { type: 'float32' as const, dims: [1, row.length], data }
  }
  return { config: { bosId } as LossModel['config'], tokenLosses: tokenLosses as never, rows }
}

const document = (length: number, level: number, source = `text ${level}`) => ({
  source,
  ids: Array<number>(length).fill(level),
})

t.test('bins grow in proportion and leave no distance out', async (t) => {
  t.same(logBins(15, 1), [
    { from: 1, to: 1 },
    { from: 2, to: 3 },
    { from: 4, to: 7 },
    { from: 8, to: 15 },
  ])
  for (const [end, perOctave] of [
    [3, 1],
    [17, 1],
    [1000, 2],
    [2047, 3],
    [100, 8],
  ] as const) {
    const bins = logBins(end, perOctave)
    const distances = bins.flatMap(({ from, to }) => Array.from({ length: to - from + 1 }, (_, i) => from + i))
    t.same(
      distances,
      Array.from({ length: end }, (_, i) => i + 1),
      `${end}, ${perOctave} an octave`,
    )
  }
})

t.test('a loss that falls up to 16 tokens is found to do so', async (t) => {
  // Documents differ by far more than their positions do.
  const model = fake((id, seen) => id + 1 / Math.min(seen, 16) + (id === 5 ? -1e-5 : 1e-5) * seen, 1)
  const documents = [document(128, 2), document(300, 5), document(63, 3), document(20, 4)]
  const progress: number[] = []
  const result = await perplexityByPosition(model, documents, {
    ...{ window: 64, onProgress: ({ done, total }) => progress.push(done / total) },
  })
  t.match(result, { window: 64, bos: true, documents: 3, skipped: 1, windows: 2 + 4 + 1, helpsUpTo: 31 })
  t.ok(model.rows.every((row) => row[0] === 1 && row.length === 64))
  t.same(
    result.bins.map(({ from, to }) => [from, to]),
    [
      [1, 1],
      [2, 3],
      [4, 7],
      [8, 15],
      [16, 31],
      [32, 63],
    ],
  )
  t.same(
    result.bins.map(({ targets }) => targets),
    [7, 14, 28, 56, 112, 224],
  )
  t.same([progress.length, progress.at(-1)], [7, 1])
  const [first, second] = result.bins
  t.match(first, { gain: undefined, gainError: undefined })
  t.ok(Math.abs(second!.gain! - (first!.nll - second!.nll)) < 1e-12)
  t.ok(second!.gainError! < 0.01 && second!.standardError! > 0.5, 'a gain is within documents')
  t.ok(second!.interval![0] < second!.nll && second!.nll < second!.interval![1])
  const level = await perplexityByPosition(
    fake((id) => id),
    documents,
    { window: 64 },
  )
  t.match(level, { helpsUpTo: 0, bos: false, windows: 2 + 4 })
})

t.test('a gain counts beyond 1.96 standard errors', async (t) => {
  // Three documents gain 1, 1 + spread and 1 - spread in the last bin: a standard error of spread / sqrt(3).
  const last = async (spread: number) => {
    const gains: Record<number, number> = { 2: 1, 3: 1 + spread, 4: 1 - spread }
    const model = fake((id, seen) => id - (seen >= 8 ? gains[id]! : 0))
    const documents = [2, 3, 4].map((level) => document(16, level))
    const { bins, helpsUpTo } = await perplexityByPosition(model, documents, { window: 16 })
    const { gain, gainError } = bins.at(-1)!
    return { ratio: gain! / gainError!, helpsUpTo }
  }
  for (const [spread, helpsUpTo] of [
    [1.5, 0], // 1.15
    [0.9, 0], // 1.92
    [0.85, 15], // 2.04
  ] as const) {
    const found = await last(spread)
    t.ok(Math.abs(found.ratio - Math.sqrt(3) / spread) < 1e-5)
    t.equal(found.helpsUpTo, helpsUpTo, `${found.ratio} standard errors`)
  }
})

t.test('standard errors are those of the ratio estimator', async (t) => {
  // Means 2, 3 and 7 of one, two and one windows: 15 / 4; residuals -1.75, -1.5, 3.25 over 4.
  const documents = [document(8, 2), document(16, 3), document(8, 7)]
  const { bins } = await perplexityByPosition(
    fake((id) => id),
    documents,
    { window: 8 },
  )
  for (const { nll, standardError, gain, gainError } of bins) {
    t.equal(nll, 15 / 4)
    t.ok(Math.abs(standardError! - Math.sqrt(((1.75 ** 2 + 1.5 ** 2 + 3.25 ** 2) / 16) * (3 / 2))) < 1e-12)
    t.ok(gain === undefined || (Math.abs(gain) < 1e-12 && gainError! < 1e-12))
  }
  const [one] = documents
  const single = await perplexityByPosition(
    fake((id, seen) => id / seen),
    [one!],
    { window: 8 },
  )
  t.match(single, { helpsUpTo: undefined, documents: 1 })
  t.match(single.bins[1], { standardError: undefined, interval: undefined, gainError: undefined, gain: Number })
  const few = fake((id) => id)
  await perplexityByPosition(few, documents, { window: 8, windowsPerDocument: 1 })
  t.equal(few.rows.length, 3)
})

t.test('a real model', async (t) => {
  using model = await Llama.load(join(fixtures, 'gqa-linear4-f32'))
  const ids = Array.from({ length: 200 }, (_, i) => 3 + ((i * i * 7) % 250))
  const { bins } = await perplexityByPosition(model, [{ source: 'text', ids }], {
    window: 64,
    bos: false,
    binsPerOctave: 2,
  })
  const { data } = await model.tokenLosses([ids.slice(64, 128)])
  const [one, two] = [await model.tokenLosses([ids.slice(0, 64)]), await model.tokenLosses([ids.slice(128, 192)])]
  t.ok(Math.abs(bins[0]!.nll - (data[0]! + one.data[0]! + two.data[0]!) / 3) < 1e-6)
})

t.test('mistakes are named', async (t) => {
  const run = (options: object, documents = [document(40, 1)]) =>
    perplexityByPosition(
      fake(() => 1),
      documents,
      { window: 16, ...options },
    )
  await t.rejects(run({ window: 3 }), /window is 3, must be a whole number >= 4/)
  await t.rejects(run({ binsPerOctave: 0 }), /binsPerOctave is 0/)
  await t.rejects(run({ windowsPerDocument: 0.5 }), /windowsPerDocument is 0.5/)
  await t.rejects(run({ bos: true }), /no bos_token_id/)
  await t.rejects(run({}, []), /the list is empty/)
  await t.rejects(run({ window: 64 }), { code: 'ERR_TEXT_TOO_SHORT', message: /text 1, has 40 tokens.*needs 64/ })
  await t.rejects(run({ signal: AbortSignal.abort(new Error('enough')) }), /enough/)
})
