// Attention by distance: against transformers' own weights and scores, and on models whose answers are known.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { runCommand } from '../../lib/cli/commands.js'
import { attentionResolution } from '../../lib/eval/resolution.js'
import { ScoreSum } from '../../lib/eval/scores.js'
import { Llama } from '../../lib/model/llama.js'
import { queriesAndKeys } from '../../lib/model/readout.js'
import { fixtures, openGolden } from '../golden.js'

// Made by transformers (eager attention, float64): attention weights, and scores of its own rotated queries and keys.
const golden = JSON.parse(readFileSync(new URL('./resolution.golden.json', import.meta.url), 'utf8')).cases

/** The rows of a case as documents; its BOS is already the model's, so the model must not add one. */
async function documentsOf(name: string) {
  const file = await openGolden(name)
  const { dims, data } = await file.ints('input_ids')
  await file.close()
  const [rows, time] = dims as [number, number]
  const ids = Array.from({ length: rows }, (_, b) => Array.from(data.subarray(b * time, (b + 1) * time)))
  return { time, documents: ids.map((ids, b) => ({ source: `row ${b}`, ids })) }
}

for (const [name, expected] of Object.entries<any>(golden)) {
  t.test(`weights and scores by distance are those of transformers: ${name}`, async (t) => {
    using model = await Llama.load(`${fixtures}/${name}`, { dtype: 'float32', device: 'cpu' })
    const { time, documents } = await documentsOf(name)
    model.config.bosId = undefined
    const options = { context: time, queries: time, range: expected.bucket, trials: 0 }
    const result = await attentionResolution(model, documents, options)
    t.equal(result.queries, documents.length * (time - 8))
    const close = (a: number, b: number, tolerance: number): boolean => Math.abs(a - b) <= tolerance
    for (const [i, { layer, near, ranges, first }] of result.layers.entries()) {
      t.equal(layer, i)
      near.forEach((head, h) =>
        head.forEach((weight, n) =>
          t.ok(close(weight, expected.near[i][h][n], 2e-6), `layer ${i}, head ${h}, distance ${n}`),
        ),
      )
      t.equal(ranges.length, expected.buckets[i].length)
      // the model runs in float32: a few roundings of the largest scores there are
      const noise = 1e-6 * Math.max(...expected.buckets[i].map((range: { bound: number }) => range.bound))
      for (const [r, range] of ranges.entries()) {
        const want = expected.buckets[i][r]
        for (const field of ['from', 'to', 'max', 'min', 'mean', 'deviation', 'bound'] as const) {
          const message = `layer ${i}, range ${r}, ${field}: ${range[field]}, ${want[field]}`
          t.ok(close(range[field], want[field], noise), message)
        }
        t.ok(range.max <= range.bound)
      }
      t.ok(close(first.max, expected.first[i], noise))
    }
    // over layers: the largest of the largest, the mean of the means by head
    const all = result.layers.flatMap(({ near }) => near)
    t.ok(
      result.near.every((weight, n) => close(weight, all.reduce((sum, head) => sum + head[n]!, 0) / all.length, 1e-12)),
    )
    t.equal(result.ranges[0]!.max, Math.max(...result.layers.map(({ ranges }) => ranges[0]!.max)))
  })
}

t.test('sums of parts are the sum of all', async (t) => {
  const values = Array.from({ length: 50 }, (_, i) => Math.sin(i * i))
  const [whole, left, right] = [new ScoreSum(), new ScoreSum(), new ScoreSum()]
  values.forEach((value, i) => {
    whole.add(value, 2)
    ;(i < 13 ? left : right).add(value, 2)
  })
  left.merge(right)
  left.merge(new ScoreSum())
  const [a, b] = [whole.values(), left.values()]
  for (const field of ['count', 'max', 'min', 'bound'] as const) t.equal(a[field], b[field])
  const mean = values.reduce((sum, value) => sum + value, 0) / 50
  t.ok(Math.abs(b.mean - mean) < 1e-14 && Math.abs(a.deviation - b.deviation) < 1e-14)
  t.ok(Math.abs(a.deviation - Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / 50)) < 1e-14)
})

t.test('queries and keys of some layers are those of all, and only they are given', async (t) => {
  using model = await Llama.load(`${fixtures}/gqa-linear4-f32`, { device: 'cpu' })
  const row = Array.from({ length: 20 }, (_, i) => i + 3)
  const both = await queriesAndKeys(model, [row, row], [1, 0])
  t.strictSame(
    both.map(({ layer, q, k }) => [layer, q.length, k.length]),
    [
      [1, 2 * 20 * 4 * 8, 2 * 20 * 2 * 8],
      [0, 2 * 20 * 4 * 8, 2 * 20 * 2 * 8],
    ],
  )
  t.strictSame((await queriesAndKeys(model, [row, row], [0]))[0], both[1])
  // the first token's keys of layer 0 know only itself, so they are the same wherever it stands
  const turned = (await queriesAndKeys(model, [[7, ...row]], [0]))[0]!
  t.strictSame(turned.k.subarray(16, 32), both[1]!.k.subarray(0, 16), 'unrotated')
})

const config = (more = {}) => ({
  ...{ architectures: ['LlamaForCausalLM'], model_type: 'llama', hidden_size: 16, intermediate_size: 16 },
  ...{ num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, vocab_size: 32, bos_token_id: 0 },
  ...{ max_position_embeddings: 64, rms_norm_eps: 1e-6, rope_theta: 10000, hidden_act: 'silu', ...more },
})
const text = { source: 'text', ids: Array.from({ length: 300 }, (_, i) => 1 + ((i * 7) % 31)) }
const small = { context: 64, queries: 9, trials: 2, distances: [1, 3], range: 16 }

t.test('a model without attention attends to all alike, and copies nothing', async (t) => {
  using model = await Llama.create(config(), { device: 'cpu', seed: 1 })
  for (const { name, dims } of model.parameters()) {
    const data = new Float32Array(dims.reduce((a, b) => a * b, 1))
    if (/q_proj/.test(name)) await model.write(name, { type: 'float32', dims, data })
  }
  const result = await attentionResolution(model, [text], { ...small, queries: 1000 })
  // mean over t = 8 .. 63 of 1 / (t + 1)
  const alike = Array.from({ length: 56 }, (_, i) => 1 / (i + 9)).reduce((sum, weight) => sum + weight / 56, 0)
  t.ok(result.near.every((weight) => Math.abs(weight - alike) < 1e-12))
  t.ok(result.ranges.every(({ max, min, bound }) => max === 0 && min === 0 && bound === 0))
  t.ok(result.copies.every(({ accuracy, targets }) => accuracy <= 0.2 && targets === 30))
})

t.test('a model that repeats its input is right at distance 1 and wrong elsewhere', async (t) => {
  using model = await Llama.create(config({ hidden_size: 32 }), { device: 'cpu' })
  // the embedding and the output are the unit matrix, and the blocks add nothing
  for (const { name, dims } of model.parameters()) {
    const data = new Float32Array(dims.reduce((a, b) => a * b, 1))
    if (/embed|lm_head/.test(name)) for (let i = 0; i < 32; i++) data[i * 32 + i] = 1
    else if (/norm/.test(name)) data.fill(1)
    await model.write(name, { type: 'float32', dims, data })
  }
  const { copies } = await attentionResolution(model, [text], { ...small, trials: 6, distances: [1, 5] })
  t.equal(copies[0]!.accuracy, 1)
  t.ok(copies[1]!.accuracy < 0.25, `${copies[1]!.accuracy}`)
})

t.test('the seed decides everything; positions decide the scores', async (t) => {
  using model = await Llama.create(config({ num_hidden_layers: 3 }), { device: 'cpu', seed: 2 })
  const steps: number[] = []
  const one = await attentionResolution(model, [text], { ...small, onProgress: ({ done }) => steps.push(done) })
  t.strictSame(
    steps,
    Array.from({ length: 3 * 2 + 2 }, (_, i) => i + 1),
  )
  t.strictSame(await attentionResolution(model, [text], small), one)
  t.notSame((await attentionResolution(model, [text], { ...small, seed: 1 })).near, one.near)
  const last = await attentionResolution(model, [text], { ...small, layers: [2], trials: 0 })
  t.strictSame(last.layers[0], one.layers[2])
  t.equal(one.layers[0]!.ranges.length, 4)
  t.strictSame([one.queries, one.documents, one.skipped], [9, 1, 0])
  using stretched = await Llama.create(config({ rope_scaling: { type: 'linear', factor: 4 } }), {
    device: 'cpu',
    seed: 2,
  })
  const other = await attentionResolution(stretched, [text, { source: 'short', ids: [1, 2] }], small)
  t.equal(other.skipped, 1)
  t.notSame(other.layers[0]!.ranges, one.layers[0]!.ranges)
})

t.test('what is refused, and an abort', async (t) => {
  using model = await Llama.create(config(), { device: 'cpu' })
  for (const [options, message] of [
    [{ context: 9 }, /context: 9, but it must be a whole number of at least 10/],
    [{ layers: [2] }, /layers: 2, but it must be a whole number from 0 to 1/],
    [{ layers: [] }, /layers: the list is empty/],
    [{ layers: [1, 1] }, /names one twice/],
    [{ queries: 0 }, /queries: 0/],
    [{ distances: [0] }, /distances: 0/],
    [{ range: 0.5 }, /range: 0.5/],
  ] as const) {
    await t.rejects(attentionResolution(model, [text], { ...small, ...options }), { message })
  }
  const longer = attentionResolution(model, [text], { ...small, context: 1000 })
  await t.rejects(longer, { code: 'ERR_TEXT_TOO_SHORT', message: /text, has 300 tokens, but the context is 1000/ })
  await t.rejects(attentionResolution(model, [], small), { message: /documents: the list is empty/ })
  const signal = AbortSignal.abort()
  await t.rejects(attentionResolution(model, [text], { ...small, signal }), { name: 'AbortError' })
})

t.test('ropewalk eval attention', async (t) => {
  const data = join(
    t.testdir({ 'text.txt': 'The rope is laid on the walk, strand by strand. '.repeat(40) }),
    'text.txt',
  )
  const run = async (...args: string[]) => {
    const streams = { stdout: '', stderr: '' }
    const sink = (name: 'stdout' | 'stderr') => ({ write: (text: string) => void (streams[name] += text) })
    const command = ['eval', 'attention', `${fixtures}/gqa-linear4-f32`, '--data', data, '--device', 'cpu', ...args]
    return { code: await runCommand(command, { stdout: sink('stdout'), stderr: sink('stderr') }), ...streams }
  }
  const options = ['--context', '48', '--queries', '4', '--trials', '1', '--layers', '1']
  const text = await run(...options, '--baseline')
  t.equal(text.code, 0, text.stderr)
  t.match(text.stdout, /^Mean attention weight by distance\n +0 +1 +2/)
  t.match(text.stdout, /distance +model max +mean +deviation +limit +baseline max/)
  t.match(text.stdout, /\n1 text of 48 tokens; the trained window is/)
  t.match(text.stderr, /model, heads and copies \d+\/16/)
  const { result, baseline } = JSON.parse((await run(...options, '--json')).stdout)
  t.strictSame([result.queries, result.layers[0].layer, baseline], [4, 1, null])
  const refused = await run('--context', '4000')
  t.strictSame([refused.code, refused.stdout], [1, ''])
  t.match(refused.stderr, /tokens, but the context is 4000: give longer documents/)
})
