import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { Llama } from '../../lib/model/llama.js'
import type { LoadOptions } from '../../lib/model/load.js'
import { DataLoader } from '../../lib/train/data.js'
import { type StepResult, Trainer, type TrainerOptions } from '../../lib/train/trainer.js'
import { caseNames, fixtures, norm, openGolden, relativeError } from '../golden.js'

const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-trainer-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

const load = (name = 'gqa-linear4-f32', options: LoadOptions = {}) =>
  Llama.load(join(fixtures, name), { device: 'cpu', ...options })

/** All weights, bit by bit. */
async function weightsOf(model: Llama): Promise<string> {
  const parts: string[] = []
  for (const { name } of model.parameters()) {
    const { data } = await model.read(name)
    parts.push(Buffer.from(data.buffer).toString('base64'))
  }
  return parts.join()
}

const data = join(dir, 'data.jsonl')
const words = 'the rope was laid along the walk and every strand of it was stretched until it held'.split(' ')
const texts = Array.from({ length: 40 }, (_, i) =>
  Array.from({ length: 20 + (i % 13) }, (_, j) => words[(i * 7 + j * j * 3 + (j >> 2)) % words.length]).join(' '),
)
fs.writeFileSync(data, texts.map((text) => `${JSON.stringify({ text })}\n`).join(''))
const base: TrainerOptions = { data, context: 32, steps: 4, learningRate: 1e-3, cacheDir: join(dir, 'cache') }
const tokens = [Array.from({ length: 24 }, (_, i) => (i * 37 + 11) % 300)]

async function all(trainer: Trainer, signal?: AbortSignal): Promise<StepResult[]> {
  const results: StepResult[] = []
  for await (const result of trainer.run(signal ? { signal } : {})) results.push(result)
  return results
}

// Torch's float64 run is the reference; its own float32 run is off by f32_vs_f64_delta_rel, ours by no more than 1.5 times
// that: which of two float32 runs is nearer is chance.
for (const name of caseNames) {
  t.test(`golden: ${name}`, async (t) => {
    const golden = await openGolden(name)
    const variants = Object.entries<any>(golden.json.adamw?.variants ?? {})
    const steps = golden.names.filter((name) => name.startsWith('train_ids.')).sort()
    const batches = await Promise.all(steps.map((step) => golden.ints(step)))
    for (const [variant, want] of variants) {
      using model = await load(name, { dtype: 'float32' })
      const { lr: learningRate, weight_decay: weightDecay, max_norm: maxGradNorm } = want
      using trainer = new Trainer(model, { learningRate, weightDecay, maxGradNorm, warmupSteps: 0 })
      const before = new Map<string, Float32Array>()
      for (const { name } of model.parameters()) before.set(name, (await model.read(name)).data as Float32Array)
      for (const [i, tokens] of batches.entries()) {
        const { loss, gradNorm, skipped } = await trainer.step(tokens)
        const lossError = Math.abs(loss / want.loss[i] - 1)
        const normError = Math.abs(gradNorm / want.grad_norm_before_clip[i] - 1)
        t.ok(!skipped && lossError < 5e-6, `${variant}: loss ${i} is off by ${lossError}`)
        t.ok(normError < 2e-5, `${variant}: gradient norm ${i} is off by ${normError}`)
      }
      t.ok(Math.abs((await model.loss(batches[0]!)) / want.loss[3] - 1) < 5e-6, `${variant}: loss after`)
      let worst = 0
      for (const [name, old] of before) {
        const delta = ((await model.read(name)).data as Float32Array).map((value, n) => value - old[n]!)
        worst = Math.max(worst, Math.abs(norm(delta) / want.delta_norms[name] - 1))
        if (want.stored !== 'all' && !want.stored.includes(name)) continue
        const stored = await golden.floats(`delta.${variant}.${name}`)
        worst = Math.max(worst, relativeError(delta, stored.data))
      }
      const noise = want.f32_vs_f64_delta_rel
      t.ok(worst <= 1.5 * noise, `${variant}: deltas are off by ${worst}, those of torch in float32 by ${noise}`)
    }
    if (variants.length === 0) t.pass('this case has no optimizer steps')
    await golden.close()
  })
}

t.test('options', async (t) => {
  using model = await load()
  const bad: [object, typeof TypeError | typeof RangeError, RegExp][] = [
    [{ learninRate: 1 }, TypeError, /unknown option "learninRate"; did you mean "learningRate"\?/],
    [{ frobnicate: 1 }, TypeError, /unknown option "frobnicate"; known are data, context, steps/],
    [{ steps: '5' }, TypeError, /steps is "5", but must be a number/],
    [{ steps: 0 }, RangeError, /steps is 0, but must be a whole number >= 1/],
    [{ context: 1 }, RangeError, /context is 1, but must be a whole number >= 2/],
    [{ learningRate: -1 }, RangeError, /learningRate is -1/],
    [{ learningRate: NaN }, RangeError, /learningRate is NaN/],
    [{ betas: 0.9 }, TypeError, /betas is 0.9, but must be two numbers/],
    [{ betas: [0.9, 1] }, RangeError, /betas\[1\] is 1, but must be in \[0, 1\)/],
    [{ eps: 0 }, RangeError, /eps is 0/],
    [
      { schedule: 'cosin' },
      RangeError,
      /schedule is "cosin", but must be one of constant, linear, cosine; did you mean "cosine"\?/,
    ],
    [{ packing: 'none' }, RangeError, /packing is "none", but must be one of concat, documents/],
    [{ finalFraction: 2 }, RangeError, /finalFraction is 2/],
    [{ data: [] }, RangeError, /data is an empty list/],
    [{ data: ['a', 5] }, TypeError, /data\[1\] is 5, but must be a string/],
    [{ validation: 1.5 }, RangeError, /validation is 1.5/],
    [{ validation: 0 }, RangeError, /validation is 0/],
    [{ evalEvery: 5 }, TypeError, /nothing to evaluate/],
    [{ evaluate: 5 }, TypeError, /evaluate is 5, but must be a function/],
    [{ keep: 1 }, RangeError, /keep is 1, but must be a whole number >= 2/],
    [{ resume: true }, TypeError, /no output folder/],
    [{ resume: 5 }, TypeError, /resume is 5/],
    [{ appendEos: 'yes' }, TypeError, /appendEos is "yes", but must be true or false/],
    [{ seed: -1 }, RangeError, /seed is -1/],
    [{ pose: 5 }, TypeError, /pose is 5, but must be an object/],
    [{ pose: {} }, TypeError, /pose.length is missing/],
    [{ pose: { lenght: 64 } }, TypeError, /unknown option "pose.lenght"; did you mean "length"\?/],
    [{ pose: { length: 64, chunks: 1 } }, RangeError, /pose.chunks is 1, but must be a whole number >= 2/],
    [{ pose: { length: 31 }, context: 32 }, RangeError, /pose.length is 31, but context is 32/],
    [{ pose: { length: 64, chunks: 33 }, context: 32 }, RangeError, /pose.chunks is 33, but context is 32/],
    [{ pose: { length: 256 }, context: 32 }, RangeError, /pose.length is 256, but the model's context window is 128/],
    [{ pose: { length: 64 }, packing: 'documents' }, RangeError, /packing is 'documents', whose positions restart/],
    [{ pose: { length: 64 }, validation: 0.1 }, RangeError, /validation is 0.1, but with pose .* files of their own/],
    [{ context: 4096 }, RangeError, /context is 4096, but the model's context window is 128: .* factor: 32 /],
  ]
  for (const [options, type, message] of bad)
    t.throws(() => new Trainer(model, options as never), { name: type.name, message })
  t.throws(() => new Trainer(model, null as never), TypeError)
  using trainer = new Trainer(model, {})
  t.throws(() => trainer.plan(), { message: /context is missing/ })
  await t.rejects(all(trainer), { message: /context is missing/ })
  await t.rejects(trainer.save(), { message: /needs the option output/ })
  await t.rejects(trainer.step([Array(200).fill(1)]), { message: /factor: 2 / })
  await t.rejects(trainer.step([[1]]), { message: /no label counts/ })
  await t.rejects(trainer.step([[999]]), { message: /tokens\[0\]\[0\] is 999/ })
  t.equal(trainer.state.step, 0, 'what is refused is no step')
  using without = new Trainer(model, { context: 8 })
  await t.rejects(all(without), { message: /needs the option data/ })
  const gone = new Trainer(model)
  gone.dispose()
  await t.rejects(gone.step(tokens), { message: /disposed/ })
  using dry = await Llama.load(join(fixtures, 'mha-f32'), { device: 'dry' })
  await t.rejects(new Trainer(dry).step(tokens), { message: /dry device/ })
})

t.test('memory and operations are known before', async (t) => {
  for (const [name, dtype] of [
    ['gqa-linear4-f32', 'float32'],
    ['mha-bf16', 'bfloat16'],
  ] as const) {
    for (const [more, map] of [
      [{}, true],
      [{ batchSize: 2, accumulate: 3, validation: 2 }, false],
    ] as const) {
      const options = { ...base, ...more, steps: 2 }
      using planned = await Llama.load(join(fixtures, name), { device: 'dry' })
      const plan = new Trainer(planned, options).plan()
      using model = await load(name, { map })
      t.equal(model.dtype, dtype)
      using trainer = new Trainer(model, options)
      t.strictSame(trainer.plan(), plan, 'the same on every device')
      const { allocatedBytes, mappedBytes } = model.device
      t.equal(allocatedBytes, map ? 0 : plan.weightsBytes, 'planning allocates nothing')
      t.equal(mappedBytes, map ? fs.statSync(join(fixtures, name, 'model.safetensors')).size : 0)
      const results = await all(trainer)
      t.equal(model.device.peakAllocatedBytes, plan.totalBytes, `${name} ${JSON.stringify(more)}: to the byte`)
      t.equal(model.device.mappedBytes, 0, 'weights that are trained lie in memory')
      const { flopsPerSecond, seconds } = results[1]!
      t.ok(Math.abs((flopsPerSecond * seconds) / plan.flopsPerStep - 1) < 1e-9)
      t.equal(plan.gradientBytes, model.weights.elements * 4)
      trainer.dispose()
      t.equal(model.device.allocatedBytes, plan.weightsBytes, 'all is given back')
      t.type(await model.loss(tokens), 'number', 'and the model stays')
    }
  }
})

t.test('run', async (t) => {
  using model = await load()
  const output = join(dir, 'run')
  const seen: string[] = []
  using trainer = new Trainer(model, {
    ...base,
    ...{ steps: 6, batchSize: 2, accumulate: 2, output, saveEvery: 4, evalEvery: 3, validation: 3, peakFlops: 1e12 },
    evaluate: async (given) => {
      t.equal(given, trainer)
      return { score: await model.loss(tokens) }
    },
    onProgress: (progress) => seen.push(progress.stage),
  })
  const results = await all(trainer)
  t.strictSame(
    results.map(({ step }) => step),
    [1, 2, 3, 4, 5, 6],
  )
  for (const { tokens, seconds, tokensPerSecond, mfu, flopsPerSecond, skipped, learningRate, step } of results) {
    t.equal(tokens, 128)
    t.equal(tokensPerSecond, tokens / seconds)
    t.equal(mfu, flopsPerSecond / 1e12)
    t.equal(skipped, false)
    t.equal(learningRate, 1e-3 * (0.1 + (0.9 * (step - 1)) / 20))
  }
  t.match(results[2]!.validation, { loss: Number, score: Number })
  t.ok(results[5]!.validation!.loss! < results[2]!.validation!.loss!, 'it learns')
  t.notOk(results[3]!.validation)
  t.equal(results[5]!.validation!.score, await model.loss(tokens))
  t.strictSame(fs.readdirSync(output).sort(), ['checkpoint-000004', 'checkpoint-000006', 'metrics.jsonl'])
  const lines = fs.readFileSync(join(output, 'metrics.jsonl'), 'utf8').trim().split('\n')
  t.strictSame(
    lines.map((line) => JSON.parse(line)),
    results,
  )
  t.ok(seen.includes('checkpoint') && seen.includes('hash'))
  t.strictSame(await all(trainer), [], 'done is done')
  t.match(trainer.state, { step: 6, applied: 6, skipped: 0, tokens: 768, interrupted: false })

  // The validation loss is the mean over the predictions of the validation windows.
  const encoder = await model.tokenizer()
  const settings = { data: [data], context: 32, packing: 'concat', seed: 0, validation: 3, field: 'text' } as const
  const loader = await DataLoader.open({ ...settings, eosId: 2, cacheDir: base.cacheDir }, encoder)
  let sum = 0
  for await (const { sample } of loader.validation(1)) sum += await model.loss(sample.tokens)
  t.ok(Math.abs(sum / 3 - results[5]!.validation!.loss!) < 1e-6)
})

t.test('micro-batches are one batch', async (t) => {
  const losses: number[][] = []
  const norms: number[][] = []
  for (const [batchSize, accumulate] of [
    [4, 1],
    [2, 2],
    [1, 4],
  ] as const) {
    using model = await load()
    using trainer = new Trainer(model, { ...base, batchSize, accumulate, packing: 'documents' })
    const results = await all(trainer)
    losses.push(results.map(({ loss }) => loss))
    norms.push(results.map(({ gradNorm }) => gradNorm))
  }
  for (const values of [losses, norms]) {
    for (const other of values.slice(1)) t.ok(relativeError(other, values[0]!) < 1e-5, `${other} and ${values[0]}`)
  }
  t.notSame(norms[0], norms[1], 'though added in another order')
})

t.test('the same bits with 1 and 2 threads', async (t) => {
  const ends: string[] = []
  for (const threads of [1, 2]) {
    using model = await load('gqa-d64-linear8', { threads })
    using trainer = new Trainer(model, { ...base, accumulate: 2 })
    const results = await all(trainer)
    ends.push(`${results.map(({ loss, gradNorm }) => [loss, gradNorm])} ${await weightsOf(model)}`)
  }
  t.ok(ends[0] === ends[1])
})

t.test('packed documents do not see each other', async (t) => {
  using model = await load()
  const build = async (texts: string[]) => {
    const path = join(dir, `packed-${texts.join('').length}-${texts[0]!.slice(0, 3)}.jsonl`)
    fs.writeFileSync(path, texts.map((text) => `${JSON.stringify({ text })}\n`).join(''))
    const encoder = { hash: path, encode: (text: string) => Array.from(text, (c) => c.charCodeAt(0)) }
    const settings = { data: [path], context: 20, packing: 'documents', seed: 0, validation: undefined } as const
    const loader = await DataLoader.open(
      { ...settings, eosId: 2, field: 'text', cacheDir: join(dir, 'cache') },
      encoder,
    )
    const { sample } = await loader.next({ epoch: 0, index: 0 }, 1)
    return sample
  }
  // two documents of 10 tokens each; the first differs
  const [one, two] = [await build(['abcabcabc', 'xyzzyxyzz']), await build(['qrstuvwop', 'xyzzyxyzz'])]
  const losses = await Promise.all([one, two].map(({ tokens, options }) => model.tokenLosses(tokens, options)))
  const of = (i: number, from: number, to: number) => [...losses[i]!.data.subarray(from, to)]
  t.notSame(of(0, 0, 9), of(1, 0, 9))
  t.strictSame(of(0, 10, 20), of(1, 10, 20), 'the second document, bit by bit')
  t.equal(losses[0]!.data[9], 0, 'the end of the first predicts nothing')
  // Gradients of the second document alone: labels of the first are ignored, its tokens still differ.
  const gradients = await Promise.all(
    [one, two].map(({ tokens, options }) => {
      const { dims, data } = options.labels as { dims: number[]; data: Int32Array }
      const labels = { dims, data: data.map((id, n) => (n < 10 ? -100 : id)) }
      return model.gradients(tokens, { ...options, labels })
    }),
  )
  for (const [name, { data }] of gradients[0]!) t.strictSame(data, gradients[1]!.get(name)!.data, name)
  t.notSame(
    (await model.tokenLosses(one.tokens)).data.subarray(10),
    (await model.tokenLosses(two.tokens)).data.subarray(10),
  )
})

t.test('a loss that is not finite changes nothing', async (t) => {
  for (const [name, value, memory, kinds] of [
    ['mha-f32', NaN, {}, ['m', 'v']],
    ['mha-f32', 3e38, {}, ['m', 'v']],
    ['mha-bf16', Infinity, {}, ['m', 'master', 'v']],
    ['mha-bf16', NaN, { masters: 'remainder', moments: '8bit' }, ['low', 'm', 'm_scale', 'v', 'v_scale']],
  ] as const) {
    using model = await load(name)
    const output = join(dir, `bad-${name}-${value}`)
    using trainer = new Trainer(model, { maxSkipped: 3, learningRate: 1e-3, output, context: 32, memory })
    await trainer.step(tokens)
    const target = 'model.layers.1.mlp.down_proj.weight'
    const good = await model.read(target)
    const spoilt = { ...good, type: 'float32' as const, data: new Float32Array(good.data.length).fill(value) }
    await model.write(target, spoilt)
    const before = await weightsOf(model)
    const states = async () => {
      const found: Record<string, string> = {}
      for (const { name, tensor } of trainer['optimizer']!.entries()) {
        found[name] = Buffer.from(await model.device.download(tensor)).toString('base64')
      }
      return found
    }
    const kept = await states()
    const names = Object.keys(kept)
    t.strictSame([...new Set(names.map((name) => name.split('.')[0]))].sort(), kinds)
    for (const { name } of model.parameters()) t.ok(names.includes(`m.${name}`) && names.includes(`v.${name}`), name)
    for (let i = 0; i < 2; i++) {
      const { skipped, loss, gradNorm } = await trainer.step(tokens)
      t.ok(skipped && !(Number.isFinite(loss) && Number.isFinite(gradNorm)), `${loss}, ${gradNorm}`)
    }
    t.match(trainer.state, { step: 3, applied: 1, skipped: 2, skippedInARow: 2 })
    t.ok((await weightsOf(model)) === before, 'weights')
    t.strictSame(await states(), kept, 'moments, their scales, masters or remainders')
    await t.rejects(trainer.step(tokens), {
      code: 'ERR_NOT_FINITE',
      message: /^step 4: .* not finite in 3 steps in a row; the last batch was the tokens given to step/,
    })
    if (value !== 3e38) {
      await t.rejects(trainer.save(), { code: 'ERR_NOT_FINITE', message: new RegExp(target) })
      t.strictSame(fs.existsSync(output) ? fs.readdirSync(output) : [], [], 'no checkpoint of damaged weights')
    }
    await model.write(target, good)
    const { skipped } = await trainer.step(tokens)
    t.notOk(skipped)
    t.match(trainer.state, { applied: 2, skipped: 3, skippedInARow: 0 })
    t.ok((await weightsOf(model)) !== before, 'the comparison sees an update of weights')
    const after = await states()
    for (const kind of kinds) {
      const ofKind = names.filter((name) => name.startsWith(`${kind}.`))
      t.ok(
        ofKind.some((name) => after[name] !== kept[name]),
        `and of ${kind}`,
      )
    }
  }
  using model = await load('mha-f32')
  await model.write('model.norm.weight', { type: 'float32', dims: [32], data: new Float32Array(32).fill(NaN) })
  using trainer = new Trainer(model, { ...base, steps: 50, maxSkipped: 4 })
  const seen: StepResult[] = []
  const run = async () => {
    for await (const result of trainer.run()) seen.push(result)
  }
  await t.rejects(run(), {
    code: 'ERR_NOT_FINITE',
    message: /^step 4: .*; the last batch was window \d+ \(data.jsonl, document \d+, tokens \d+\.\.\d+\)/,
  })
  t.equal(seen.length, 3)
})

t.test('a signal ends a run after its step', async (t) => {
  using model = await load()
  const output = join(dir, 'signal')
  const abort = new AbortController()
  using trainer = new Trainer(model, { ...base, steps: 1000, output })
  const results: StepResult[] = []
  for await (const result of trainer.run({ signal: abort.signal })) {
    results.push(result)
    if (result.step === 3) setImmediate(() => abort.abort())
  }
  t.ok(results.length < 20, `${results.length} steps`)
  t.match(trainer.state, { step: results.length, interrupted: true })
  const saved = `checkpoint-${String(results.length).padStart(6, '0')}`
  t.ok(fs.existsSync(join(output, saved, 'trainer.json')))
  using early = new Trainer(model, { ...base, cacheDir: join(dir, 'no-cache') })
  t.strictSame(await all(early, AbortSignal.abort()), [], 'before the first step')
  t.equal(early.state.interrupted, true)
  // A second run of the same trainer goes on.
  using again = new Trainer(model, base)
  for await (const { step } of again.run()) if (step === 2) break
  t.strictSame(
    (await all(again)).map(({ step }) => step),
    [3, 4],
  )
  const one = again.run()
  using other = new Trainer(model, base)
  const first = other.run()
  await first.next()
  await t.rejects(other.run().next(), { message: /already running/ })
  await first.return(undefined)
  await one.return(undefined)
})

t.test('the event loop stays free', async (t) => {
  using model = await load('gqa-d64-linear8')
  using trainer = new Trainer(model, { ...base, context: 256, steps: 8, batchSize: 2 })
  await trainer.step(tokens)
  let last = performance.now()
  let worst = 0
  const timer = setInterval(() => {
    worst = Math.max(worst, performance.now() - last)
    last = performance.now()
  }, 1)
  await all(trainer)
  clearInterval(timer)
  t.ok(worst < 200, `longest pause ${worst.toFixed(1)} ms`)
})
