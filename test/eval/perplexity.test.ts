import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { type LossModel, perplexity, readTokenDocuments, slidingWindows } from '../../lib/eval/perplexity.js'
import { Llama } from '../../lib/model/llama.js'
import { caseNames, fixtures, openGolden } from '../golden.js'

/** nll of a token, made up, that depends on the token, its place in the window and the window's length. */
const madeUp = (row: readonly number[], t: number): number => 1 + (row[t]! % 7) / 3 + t / row.length

/** A model with made-up losses; `rows` records what it was fed. */
function fake(bosId?: number): LossModel & { rows: number[][] } {
  const rows: number[][] = []
  const tokenLosses = async (tokens: readonly (readonly number[])[], options: { labels: number[][] }) => {
    const [row] = tokens as [readonly number[]]
    const [labels] = options.labels as [number[]]
    rows.push([...row])
    const data = Float32Array.from(row, (_, t) =>
      t + 1 < row.length && labels[t + 1] !== -100 ? madeUp(row, t + 1) : 0,
    )
    return { type: 'float32' as const, dims: [1, row.length], data }
  }
  return { config: { bosId } as LossModel['config'], tokenLosses: tokenLosses as never, rows }
}

const document = (length: number, source = 'text', start = 1) => ({
  source,
  ids: Array.from({ length }, (_, i) => 10 + ((start + i * i * 7) % 83)),
})

t.test('sliding windows of the fixtures equal transformers', async (t) => {
  let found = 0
  for (const name of caseNames) {
    const golden = await openGolden(name)
    t.teardown(() => golden.close())
    if (!golden.json.sliding_ppl) continue
    found++
    const { window, stride, tokens, nll_sum, n_targets, ppl } = golden.json.sliding_ppl
    const ids = [...(await golden.ints('ppl_ids')).data]
    using model = await Llama.load(golden.dir, { dtype: 'float32' })
    const steps: number[] = []
    const [result] = await perplexity(model, [{ source: name, ids }], {
      ...{ windows: [window], stride, bos: false },
      onProgress: ({ done, total }) => steps.push(done / total),
    })
    t.match(result, { window, stride, bos: false, tokens, targets: n_targets, documents: 1, skipped: 0 }, name)
    const error = Math.abs(result!.nll * n_targets - nll_sum) / nll_sum
    t.ok(error < 1e-6, `${name}: sum of nll off by ${error.toExponential(1)} < 1e-6`)
    t.ok(Math.abs(result!.perplexity / ppl - 1) < 1e-5, `${name}: perplexity ${result!.perplexity}, expected ${ppl}`)
    t.equal(steps.length, result!.windows)
    t.equal(steps.at(-1), 1)
  }
  t.ok(found >= 2, 'there are goldens')
})

t.test('windows cover each token once', async (t) => {
  t.same(slidingWindows(10, 4, 2), [
    { begin: 0, end: 4, fresh: 4 },
    { begin: 2, end: 6, fresh: 2 },
    { begin: 4, end: 8, fresh: 2 },
    { begin: 6, end: 10, fresh: 2 },
  ])
  t.same(slidingWindows(3, 8, 2), [{ begin: 0, end: 3, fresh: 3 }])
  for (const [length, size, stride] of [
    [1, 1, 1],
    [17, 5, 5],
    [17, 5, 4],
    [100, 64, 7],
    [64, 64, 64],
  ] as const) {
    const windows = slidingWindows(length, size, stride)
    const scored = windows.flatMap(({ end, fresh }) => Array.from({ length: fresh }, (_, i) => end - fresh + i))
    t.same(
      scored,
      Array.from({ length }, (_, i) => i),
      `${length} ${size} ${stride}`,
    )
    t.ok(windows.every(({ begin, end, fresh }) => end - begin <= size && end - begin >= fresh))
  }
})

t.test("YaRN's convention: BOS before each window, mean over windows", async (t) => {
  const model = fake(1)
  const documents = [document(41, 'a'), document(30, 'b', 5), document(9, 'short')]
  const window = 16
  const stride = 6
  const [result] = await perplexity(model, documents, { windows: [window], stride })

  // compute_perplexity of eval/perplexity.py, written out
  const means: number[] = []
  const all: number[] = []
  for (const { ids } of documents.slice(0, 2)) {
    let previous = 0
    for (let begin = 0; begin < ids.length; begin += stride) {
      const end = Math.min(begin + window - 1, ids.length)
      const row = [1, ...ids.slice(begin, end)]
      const scored = row.map((_, t) => madeUp(row, t)).slice(row.length - (end - previous))
      all.push(...scored)
      means.push(scored.reduce((a, b) => a + b) / scored.length)
      previous = end
      if (end === ids.length) break
    }
  }
  const mean = (values: number[]) => values.reduce((a, b) => a + b) / values.length
  t.ok(Math.abs(result!.perplexityWindowMean / Math.exp(mean(means)) - 1) < 1e-6, 'mean over windows')
  t.ok(Math.abs(result!.perplexity / Math.exp(mean(all)) - 1) < 1e-6, 'mean over tokens')
  t.not(result!.perplexity.toFixed(3), result!.perplexityWindowMean.toFixed(3), 'the two differ')
  t.match(result, { documents: 2, skipped: 1, tokens: 71, targets: 71, windows: means.length, bos: true })
  t.ok(model.rows.every((row) => row[0] === 1 && row.length <= window))
  const [low, high] = result!.interval!
  t.ok(low < result!.perplexity && result!.perplexity < high && result!.standardError! > 0)
})

t.test('without BOS the first token of a document is no target', async (t) => {
  const model = fake()
  const results = await perplexity(model, [document(33)], { windows: [8, 16], stride: 8 })
  t.equal(results.length, 2)
  // windows of 8 that do not overlap: the first token of each has no prediction, the last window has one token only
  t.match(results[0], { window: 8, targets: 28, windows: 5, bos: false, standardError: undefined, interval: undefined })
  t.match(results[1], { window: 16, targets: 32, windows: 4 })
  t.ok(Number.isFinite(results[0]!.perplexityWindowMean))
  const [cut] = await perplexity(model, [document(33)], { windows: [8], stride: 4, truncate: 20 })
  t.equal(cut!.tokens, 20)
})

t.test('mistakes are named', async (t) => {
  const model = fake(1)
  const run = (options: object, documents = [document(40)]) =>
    perplexity(model, documents, { windows: [16], stride: 4, ...options })
  await t.rejects(run({ windows: [] }), /windows must be a list/)
  await t.rejects(run({ windows: [1.5] }), /window is 1.5/)
  await t.rejects(run({ stride: 16 }), /stride is 16, but must be a whole number from 1 to 15/)
  await t.rejects(run({ truncate: 10 }), /truncate is 10/)
  await t.rejects(run({}, []), /the list is empty/)
  await t.rejects(run({ windows: [64] }), { code: 'ERR_TEXT_TOO_SHORT', message: /text has 40 tokens.*needs 63/ })
  await t.rejects(
    run({ windows: [64] }, [document(40), document(50, 'b.jsonl:2')]),
    /the longest of 2 documents, b.jsonl:2, has 50 tokens/,
  )
  await t.rejects(perplexity(fake(), [document(40)], { windows: [16], stride: 4, bos: true }), /no bos_token_id/)
  const stop = new AbortController()
  const aborted = perplexity(model, [document(40)], {
    ...{ windows: [16], stride: 4, signal: stop.signal },
    onProgress: () => stop.abort(new Error('enough')),
  })
  await t.rejects(aborted, /enough/)
})

t.test('documents are read as token ids without special tokens', async (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'ropewalk-perplexity-'))
  t.teardown(() => rmSync(dir, { recursive: true }))
  const path = join(dir, 'texts.jsonl')
  writeFileSync(path, '{"body":"one text"}\n{"body":"and another"}\n')
  using model = await Llama.load(join(fixtures, 'gqa-linear4-f32'), { device: 'dry' })
  const documents = await readTokenDocuments(model, [path], { field: 'body' })
  t.equal(documents.length, 2)
  t.match(documents[1]!.source, /texts\.jsonl/)
  t.notOk(documents[0]!.ids.includes(1), 'no BOS')
  const empty = join(dir, 'empty.jsonl')
  writeFileSync(empty, '')
  await t.rejects(readTokenDocuments(model, [empty]), /empty\.jsonl/)
})
