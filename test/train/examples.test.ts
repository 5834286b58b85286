// Training on prompts with completions, of which only the completions are learned.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { Llama } from '../../lib/model/llama.js'
import { DataLoader, type DataSettings } from '../../lib/train/data.js'
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js'
import { fixtures, relativeError } from '../golden.js'

const dir = mkdtempSync(join(tmpdir(), 'ropewalk-examples-'))
t.teardown(() => rmSync(dir, { recursive: true }))

const load = () => Llama.load(join(fixtures, 'gqa-linear4-f32'))
const pairs = Array.from({ length: 12 }, (_, i) => ({
  prompt: `Which rope is number ${i}? It is`,
  completion: ` the ${'long '.repeat((i * 5) % 7)}one.`,
}))
const data = join(dir, 'pairs.jsonl')
writeFileSync(data, pairs.map((pair) => `${JSON.stringify(pair)}\n`).join(''))
const base: TrainerOptions = {
  ...{ data, fields: { prompt: 'prompt', completion: 'completion' }, context: 96, steps: 4, learningRate: 1e-3 },
  ...{ warmupSteps: 0, cacheDir: join(dir, 'cache') },
}

async function weightsOf(model: Llama): Promise<number[]> {
  const all: number[] = []
  for (const { name } of model.parameters()) {
    for (const value of (await model.read(name)).data) all.push(value)
  }
  return all
}

async function trained(
  options: TrainerOptions,
  steps = options.steps!,
): Promise<{ losses: number[]; weights: number[] }> {
  using model = await load()
  using trainer = new Trainer(model, { ...base, ...options })
  const losses: number[] = []
  for await (const { loss, step } of trainer.run()) {
    losses.push(loss)
    if (step === steps) break
  }
  return { losses, weights: await weightsOf(model) }
}

t.test('a step equals one on labels masked by hand, a row an example', async (t) => {
  using model = await load()
  const tokenizer = await model.tokenizer()
  // By hand: a row for each example, nothing shared; pads have the label -100.
  const time = 96
  const rows = pairs.map(({ prompt, completion }) => {
    const ids = [...tokenizer.encode(prompt + completion), tokenizer.eosId!]
    const masked = tokenizer.encode(prompt).length
    t.strictSame(ids.slice(0, masked), tokenizer.encode(prompt), 'the prompt is the beginning of the whole')
    const rest = Array<number>(time - ids.length)
    return {
      ids: [...ids, ...rest.fill(0)],
      labels: [...ids.map((id, i) => (i < masked ? -100 : id)), ...rest.fill(-100)],
    }
  })
  const labels = rows.map((row) => row.labels)
  const tokens = rows.map(({ ids }) => ids)
  const loss = await model.loss(tokens, { labels })
  using trainer = new Trainer(model, { learningRate: 1e-3, warmupSteps: 0, maxGradNorm: 1e-9 })
  const byHand = await trainer.step(tokens, { labels })
  t.ok(Math.abs(byHand.loss - loss) < 1e-6)

  // All windows of the data in one step, packed: the same predictions, so the same gradient.
  using other = await load()
  const lengths = rows.map(({ labels }) => labels.findLastIndex((id) => id >= 0) + 1)
  let [windows, room] = [0, 0]
  for (const length of lengths) {
    if (length > room) [windows, room] = [windows + 1, time]
    room -= length
  }
  const options = { ...base, packing: 'documents', steps: 1, maxGradNorm: 1e-9 } as const
  using packed = new Trainer(other, { ...options, batchSize: windows })
  const first = (await packed.run().next()).value
  t.ok(windows < pairs.length, 'several examples share a window')
  t.ok(Math.abs(first!.loss - byHand.loss) < 1e-6, `loss ${first!.loss}, by hand ${byHand.loss}`)
  t.ok(Math.abs(first!.gradNorm / byHand.gradNorm - 1) < 1e-5, `norm ${first!.gradNorm}, by hand ${byHand.gradNorm}`)
  const settings = {
    ...base,
    data: [data],
    packing: 'documents',
    seed: 0,
    field: 'text',
    validation: undefined,
  } as const
  const loader = await DataLoader.open(
    { ...settings, context: time, eosId: tokenizer.eosId } as DataSettings,
    tokenizer,
  )
  const { sample } = await loader.next({ epoch: 0, index: 0 }, windows)
  using fresh = await load()
  const gradients = await fresh.gradients(sample.tokens, sample.options)
  for (const [name, { data }] of await fresh.gradients(tokens, { labels })) {
    const error = relativeError(gradients.get(name)!.data, data)
    t.ok(error < 1e-5, `gradient of ${name}: off by ${error.toExponential(1)}`)
  }
  using whole = await load()
  t.ok(Math.abs((await whole.loss(tokens)) - loss) > 0.01, 'the mask matters')
})

t.test('resumed and accumulated runs end with the same bits', async (t) => {
  for (const packing of ['documents', 'concat'] as const) {
    const options = { packing, batchSize: 1, accumulate: 2 }
    const { losses, weights } = await trained(options)
    t.equal(losses.length, 4)
    const output = join(dir, packing)
    const before = await trained({ ...options, output, saveEvery: 1 }, 2)
    const after = await trained({ ...options, output, saveEvery: 1, resume: true })
    t.strictSame([...before.losses, ...after.losses], losses)
    t.strictSame(after.weights, weights)
    using model = await load()
    using other = new Trainer(model, {
      ...base,
      ...options,
      output,
      resume: true,
      fields: { prompt: 'completion', completion: 'prompt' },
      steps: 6,
    })
    await t.rejects(
      other.run().next(),
      { code: 'ERR_RESUME', message: /field or fields/ },
      'other masks are other data',
    )
  }
})

t.test('validation counts completions only; options', async (t) => {
  using model = await load()
  using trainer = new Trainer(model, { ...base, steps: 1, validation: data, learningRate: 0, packing: 'documents' })
  const result = (await trainer.run().next()).value
  const tokenizer = await model.tokenizer()
  let [sum, count] = [0, 0]
  for (const { prompt, completion } of pairs) {
    const ids = [...tokenizer.encode(prompt + completion), tokenizer.eosId!]
    const masked = tokenizer.encode(prompt).length
    const { data } = await model.tokenLosses([ids], { labels: [ids.map((id, i) => (i < masked ? -100 : id))] })
    sum += data.reduce((a, b) => a + b, 0)
    count += ids.length - masked
  }
  t.ok(Math.abs(result!.validation!.loss! / (sum / count) - 1) < 1e-5)
  for (const [options, name, message] of [
    [{ fields: 'x' }, 'TypeError', 'fields is "x", but must be an object { prompt, completion }'],
    [{ fields: { prompt: 'a' } }, 'TypeError', 'fields.completion is missing'],
    [{ fields: { prompt: 'a', completion: 1 } }, 'TypeError', 'fields.completion is 1, but must be a string'],
    [{ fields: { prompt: 'a', answer: 'b' } }, 'TypeError', /unknown option "fields\.answer"/],
    [{ field: 'text' }, 'TypeError', /field is "text", but fields is given as well/],
    [{ pose: { length: 128 } }, 'RangeError', /pose takes parts of longer texts/],
  ] as const) {
    t.throws(() => new Trainer(model, { ...base, ...options } as never), { name, message })
  }
})
