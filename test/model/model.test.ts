import { readdirSync, readFileSync } from 'node:fs'
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { Continuation } from '../../lib/model/generate.js'
import { Llama } from '../../lib/model/llama.js'
import type { LoadOptions } from '../../lib/model/load.js'
import { Trainer } from '../../lib/train/trainer.js'
import { caseNames, fixtures, norm, openGolden, relativeError } from '../golden.js'

/** Of the goldens and of packed documents; all other tests are about the CPU. */
const goldenDevice = process.env['ROPEWALK_TEST_DEVICE'] ?? 'cpu'

// Tolerances are the manifest's: 20 times the noise of transformers' own float32 run, gradients to 1e-4. On a GPU a
// bfloat16 model has bfloat16 activations, on the CPU where they are asked for: then one and a half times the largest error, over these cases, of transformers'
// own bfloat16 run (5.18 on torch 2.13, CPU, eager), and twice that for the mean loss, in which errors cancel by chance.
const FLOAT32 = { logits: 1e-4, loss: 1e-5, gradient: 1e-4, norm: 1e-4, total: 1e-5 }
const BFLOAT16 = { logits: 0.08, loss: 1.6e-3, gradient: 0.24, norm: 0.07, total: 0.023 }
const BFLOAT16_NLL = 0.35

for (const name of caseNames) {
  t.test(`golden: ${name}`, async (t) => {
    const golden = await openGolden(name)
    const { json } = golden
    // In float32, and with the checkpoint's own dtype: on the CPU bf16 weights widen exactly, so nothing else may change.
    const runs: LoadOptions[] = [{ dtype: 'float32' }]
    if (json.dtype_on_disk === 'bfloat16') runs.push({ dtype: 'bfloat16' })
    if (runs.length > 1 && goldenDevice === 'cpu') runs.push({ dtype: 'bfloat16', activations: 'bfloat16' })
    for (const run of runs) {
      using model = await Llama.load(golden.dir, { device: goldenDevice, ...run })
      const dtype = Object.values(run).join(', activations ')
      const exact = dtype === 'float32' || (goldenDevice === 'cpu' && !run.activations)
      const allowed = exact ? FLOAT32 : BFLOAT16
      const ids = await golden.ints('input_ids')
      const [rows, time] = ids.dims as [number, number]

      const logits = await model.logits(ids)
      const want = await golden.floats('logits')
      const vocabulary = model.config.vocabSize
      t.same(logits.dims, [rows, time, vocabulary])
      const positions: number[] = json.logits_positions === 'all' ? [...Array(time).keys()] : json.logits_positions
      let worst = 0
      for (let b = 0; b < rows; b++) {
        positions.forEach((position, i) => {
          for (let v = 0; v < vocabulary; v++) {
            const got = logits.data[(b * time + position) * vocabulary + v]!
            worst = Math.max(worst, Math.abs(got - want.data[(b * positions.length + i) * vocabulary + v]!))
          }
        })
      }
      const tolerance = Math.max(20 * json.noise.logits_f32_vs_f64_max, allowed.logits * json.noise.logits_absmax)
      t.ok(worst <= tolerance, `${dtype}: logits differ by ${worst}, allowed ${tolerance}`)

      const nll = await model.tokenLosses(ids)
      const wantNll = await golden.floats('token_nll')
      let worstNll = 0
      for (let b = 0; b < rows; b++) {
        for (let i = 0; i < time - 1; i++) {
          worstNll = Math.max(worstNll, Math.abs(nll.data[b * time + i]! - wantNll.data[b * (time - 1) + i]!))
        }
        t.equal(nll.data[b * time + time - 1], 0, 'nothing is predicted at the last position')
      }
      const nllTolerance = exact ? 20 * json.noise.nll_f32_vs_f64_max : BFLOAT16_NLL
      t.ok(worstNll <= nllTolerance, `${dtype}: nll differ by ${worstNll}`)
      const lossError = Math.abs((await model.loss(ids)) / json.mean_loss_f64 - 1)
      t.ok(lossError < allowed.loss, `${dtype}: mean loss is off by ${lossError}`)
      const masked = /first (\d+) columns/.exec(json.masked_labels)!
      const labels = { dims: ids.dims, data: ids.data.map((id, n) => (n % time < Number(masked[1]) ? -100 : id)) }
      const maskedLoss = await model.loss(ids, { labels })
      const maskedError = Math.abs(maskedLoss / json.mean_loss_masked_labels_f64 - 1)
      t.ok(maskedError < allowed.loss, `${dtype}: loss of masked labels is off by ${maskedError}`)

      if (json.grad) {
        const gradients = await model.gradients(ids)
        t.same([...gradients.keys()].sort(), Object.keys(json.grad.norms).sort(), 'a gradient for every parameter')
        let total = 0
        for (const [parameter, { data }] of gradients) {
          const size = norm(data)
          total += size * size
          const error = Math.abs(size - json.grad.norms[parameter]) / json.grad.norms[parameter]
          t.ok(error < allowed.norm, `${parameter}: gradient norm is off by ${error}`)
        }
        const totalError = Math.abs(Math.sqrt(total) / json.grad.total_norm - 1)
        t.ok(totalError < allowed.total, `${dtype}: total gradient norm is off by ${totalError}`)
        for (const stored of golden.names.filter((tensor) => tensor.startsWith('grad.'))) {
          const { dims, data } = await golden.floats(stored)
          const got = gradients.get(stored.slice(5))!
          t.same(got.dims, dims)
          const error = relativeError(got.data, data)
          t.ok(error < allowed.gradient, `${dtype} ${stored}: relative error ${error}`)
        }
      }
      if (json.greedy && exact) {
        const written: number[] = []
        const options = { prompt: json.greedy.prompt_ids, maxTokens: json.greedy.new_ids.length, stopIds: [] }
        for await (const { id } of model.generate(options)) written.push(id)
        t.same(written, json.greedy.new_ids, 'greedy continuation')
      }
    }
    await golden.close()
  })
}

const folder = join(fixtures, 'gqa-linear4-f32')
const load = (options = {}) => Llama.load(folder, { device: 'cpu', ...options })
const random = (count: number, limit: number, seed = 1): number[] => {
  let state = seed
  return Array.from({ length: count }, () => (state = (state * 48271) % 2147483647) % limit)
}
const bytesOf = (array: ArrayBufferView) => Buffer.from(array.buffer, array.byteOffset, array.byteLength)

t.test('the same bits from run to run and with 1, 2 and 3 threads', async (t) => {
  const tokens = [random(100, 400), random(100, 400, 7)]
  const results: Buffer[] = []
  for (const threads of [1, 2, 3, 2]) {
    using model = await load({ threads })
    const parts = [bytesOf((await model.logits(tokens)).data)]
    for (const { data } of (await model.gradients(tokens)).values()) parts.push(bytesOf(data))
    results.push(Buffer.concat(parts))
  }
  for (const result of results.slice(1)) t.ok(result.equals(results[0]!))
})

t.test('packed documents do not see each other, to the bit', async (t) => {
  using model = await load({ device: goldenDevice })
  const [a, b, c] = [random(37, 400), random(50, 400, 3), random(37, 400, 9)] as [number[], number[], number[]]
  const positions = [[...a.keys(), ...b.keys()]]
  const first = [[...a.map(() => 0), ...b.map(() => a.length)]]
  const labels = [[...a, -100, ...b.slice(1)]]
  const packed = await model.tokenLosses([[...a, ...b]], { positions, first, labels })
  const other = await model.tokenLosses([[...c, ...b]], { positions, first, labels: [[...c, -100, ...b.slice(1)]] })
  t.ok(bytesOf(packed.data.slice(a.length)).equals(bytesOf(other.data.slice(a.length))), 'the second is unchanged')
  t.notOk(bytesOf(packed.data.slice(0, a.length)).equals(bytesOf(other.data.slice(0, a.length))), 'the first is not')
  const alone = await model.tokenLosses([b])
  t.ok(relativeError(packed.data.slice(a.length), alone.data) < 1e-5, 'and equals the document alone')
  const whole = await model.tokenLosses([[...a, ...b]])
  t.ok(relativeError(whole.data.slice(a.length), alone.data) > 1e-3, 'which it would not if it saw the first')
})

t.test('positions may skip: only distances count', async (t) => {
  using model = await load()
  const tokens = [random(40, 400)]
  const shifted = await model.logits(tokens, { positions: [tokens[0]!.map((_, i) => i + 1000)] })
  t.ok(relativeError(shifted.data, (await model.logits(tokens)).data) < 1e-5)
  const skipping = await model.logits(tokens, { positions: [tokens[0]!.map((_, i) => 3 * i)] })
  t.ok(relativeError(skipping.data, (await model.logits(tokens)).data) > 1e-3)
})

t.test('calls may overlap: each gets its own answer', async (t) => {
  using model = await load()
  const batches = [1, 2, 3, 4].map((seed) => [random(30, 400, seed)])
  const serial: number[] = []
  for (const tokens of batches) serial.push(await model.loss(tokens))
  t.same(await Promise.all(batches.map((tokens) => model.loss(tokens))), serial)
})

t.test('read and write', async (t) => {
  using model = await load()
  t.same(model.parameters()[0], { name: 'model.embed_tokens.weight', dims: [400, 32], type: 'float32' })
  const before = await model.loss([[1, 2, 3, 4, 5]])
  const weight = await model.read('model.norm.weight')
  t.same(weight.dims, [32])
  await model.write('model.norm.weight', { ...weight, data: (weight.data as Float32Array).map((x) => x * 2) })
  t.not(await model.loss([[1, 2, 3, 4, 5]]), before)
  await model.write('model.norm.weight', weight)
  t.equal(await model.loss([[1, 2, 3, 4, 5]]), before)

  using half = await load({ dtype: 'bfloat16' })
  const rounded = await half.read('model.norm.weight')
  t.equal(rounded.type, 'bfloat16')
  await half.write('model.norm.weight', weight)
  t.same(await half.read('model.norm.weight'), rounded, 'float32 is rounded on the way in')
})

t.test('save, load, save: the same bytes, and the same model', async (t) => {
  const place = await mkdtemp(join(tmpdir(), 'ropewalk-save-'))
  t.teardown(() => rm(place, { recursive: true, force: true }))
  for (const name of ['gqa-linear4-f32', 'sharded-tied-linear8', 'yarn8', 'llama3-8', 'gqa-linear16-old']) {
    const [one, two] = [join(place, `${name}-1`), join(place, `${name}-2`)]
    using model = await Llama.load(join(fixtures, name), { device: 'cpu' })
    await model.save(one)
    using again = await Llama.load(one, { device: 'cpu' })
    await again.save(two)
    for (const file of ['config.json', 'model.safetensors', 'tokenizer.json']) {
      t.ok((await readFile(join(one, file))).equals(await readFile(join(two, file))), `${name}: ${file}`)
    }
    if (name === 'gqa-linear4-f32') {
      t.ok((await readFile(join(one, 'model.safetensors'))).equals(await readFile(join(folder, 'model.safetensors'))))
    }
    const tokens = [random(64, model.config.vocabSize)]
    t.equal(await again.loss(tokens), await model.loss(tokens))
    await t.rejects(model.save(one), { message: /exists|overwrite/ }, 'an existing folder is not replaced unasked')
    await model.save(one, { overwrite: true })
  }
  using model = await Llama.load(join(fixtures, 'sharded-tied-linear8'), { device: 'cpu' })
  await model.save(join(place, 'shards'), { maxShardBytes: 20_000 })
  using again = await Llama.load(join(place, 'shards'), { device: 'cpu' })
  t.equal(await again.loss([[1, 2, 3]]), await model.loss([[1, 2, 3]]))
  t.match(readFileSync(join(place, 'shards', 'model.safetensors.index.json'), 'utf8'), /model-00002-of-0000/)
})

t.test('extending composes, and is written in every spelling', async (t) => {
  const place = await mkdtemp(join(tmpdir(), 'ropewalk-extend-'))
  t.teardown(() => rm(place, { recursive: true, force: true }))
  using model = await load({ rope: { type: 'linear', factor: 2 } })
  t.equal(model.contextWindow, 256)
  t.equal(model.config.rope.factor, 8)
  await model.save(join(place, 'x'))
  const config = JSON.parse(await readFile(join(place, 'x', 'config.json'), 'utf8'))
  t.equal(config.rope_theta, 10000)
  t.match(config.rope_scaling, { type: 'linear', factor: 8 })
  t.match(config.rope_parameters, { rope_type: 'linear', factor: 8, rope_theta: 10000 })
  t.equal(config.max_position_embeddings, 256)
  t.equal(config.initializer_range, 0.02, 'what is not understood is kept')
  using again = await Llama.load(join(place, 'x'), { device: 'cpu' })
  t.equal(await again.loss([random(200, 400)]), await model.loss([random(200, 400)]))
  using plain = await load({ rope: 'none' })
  t.equal(plain.config.rope.type, 'default')
  t.not(await plain.loss([random(100, 400)]), await (await load()).loss([random(100, 400)]))
})

t.test('wrong arguments are named', async (t) => {
  await t.rejects(Llama.load('/nowhere/at/all'), { message: /nowhere.*(not|no such)/s })
  await t.rejects(load({ dtype: 'float16' }), { message: /dtype is "float16"/ })
  await t.rejects(load({ devise: 'cpu' }), { message: /unknown option "devise"/ })
  await t.rejects(load({ device: 'cpuu' }), { message: /unknown device "cpuu"; did you mean "cpu"/ })
  await t.rejects(load({ device: 'cuda' }), { message: /CUDA backend unavailable/ })
  await t.rejects(load({ rope: { type: 'yarn', factor: 2 } }), { message: /linear/ })
  const model = await load()
  await t.rejects(model.logits([[400]]), { name: 'RangeError', message: /tokens\[0\]\[0\] is 400.*0 to 399/ })
  await t.rejects(model.logits([[1.5]]), { name: 'TypeError', message: /tokens\[0\]\[0\] is 1.5/ })
  await t.rejects(model.logits([[1, 2], [3]]), { message: /row 1 has 1 entries, row 0 has 2/ })
  await t.rejects(model.logits([]), { name: 'TypeError' })
  await t.rejects(model.logits([[1, 2], null as never]), { message: /tokens\[1\] is null, not a row/ })
  await t.rejects(model.logits({ dims: [1.5, 2], data: new Int32Array(3) }), {
    name: 'RangeError',
    message: /dims are \(1.5,2\)/,
  })
  await t.rejects(model.logits([[]]), { message: /no tokens/ })
  await t.rejects(model.logits({ dims: [1, 3], data: Int32Array.of(1) }), { message: /data has 1 entries/ })
  await t.rejects(model.loss([[1]]), { message: /no label counts/ })
  await t.rejects(model.loss([[1, 2]], { labels: [[1, 500]] }), { message: /labels\[0\]\[1\] is 500/ })
  await t.rejects(model.loss([[1, 2]], { first: [[0, 2]] }), { message: /first\[0\]\[1\] is 2/ })
  await t.rejects(model.loss([[1, 2]], { positions: [[0, -1]] }), { message: /positions\[0\]\[1\] is -1/ })
  await t.rejects(model.read('lm_heat.weight'), { message: /no parameter is called "lm_heat.weight"/ })
  await t.rejects(model.write('model.norm.weight', { type: 'float32', dims: [31], data: new Float32Array(31) }), {
    message: /dims are \(31\), expected \(32\)/,
  })
  await t.rejects(model.write('model.norm.weight', { type: 'float32', dims: [32], data: new Int32Array(32) }), {
    name: 'TypeError',
  })
  const next = (options: object) => model.generate({ prompt: [1], ...options }).next()
  await t.rejects(next({ temperature: -1 }), { message: /temperature is -1/ })
  await t.rejects(next({ topP: 0 }), { message: /topP is 0/ })
  await t.rejects(next({ maxTokens: 0 }), { message: /maxTokens is 0/ })
  await t.rejects(next({ prompt: [] }), { message: /no tokens/ })
  model.dispose()
  model.dispose()
  await t.rejects(model.loss([[1, 2]]), { message: /disposed/ })
})

t.test('damaged checkpoints are named', async (t) => {
  const place = await mkdtemp(join(tmpdir(), 'ropewalk-bad-'))
  t.teardown(() => rm(place, { recursive: true, force: true }))
  const variant = async (name: string, change: (config: Record<string, unknown>) => void): Promise<string> => {
    const dir = join(place, name)
    await cp(folder, dir, { recursive: true })
    const config = JSON.parse(await readFile(join(dir, 'config.json'), 'utf8'))
    change(config)
    await writeFile(join(dir, 'config.json'), JSON.stringify(config))
    return dir
  }
  const cases: [string, (config: Record<string, unknown>) => void, RegExp][] = [
    [
      'architecture',
      (c) => Object.assign(c, { model_type: 'gpt2', architectures: ['GPT2LMHeadModel'] }),
      /gpt2.*LLaMA/s,
    ],
    ['bias', (c) => (c.attention_bias = true), /attention_bias is true/],
    ['activation', (c) => (c.hidden_act = 'gelu'), /hidden_act is "gelu"/],
    ['heads', (c) => (c.num_key_value_heads = 3), /not a multiple/],
    ['odd', (c) => (c.head_dim = 7), /head_dim is 7/],
    ['layers', (c) => (c.num_hidden_layers = 3), /model\.layers\.2\..* is missing/],
    ['fewer', (c) => (c.num_hidden_layers = 1), /model\.layers\.1\..* is no parameter/],
    ['shape', (c) => (c.intermediate_size = 65), /gate_proj.*\(64,32\).*\(65,32\)/],
    ['rope', (c) => (c.rope_parameters = { rope_type: 'liner', factor: 4 }), /liner/],
    ['huge', (c) => (c.vocab_size = 1e12), /vocab_size is 1000000000000/],
    ['vocabulary', (c) => delete c.vocab_size, /vocab_size is undefined/],
  ]
  for (const [name, change, message] of cases) {
    await t.rejects(Llama.load(await variant(name, change), { device: 'cpu' }), { message }, name)
  }
  const nan = await variant('nan', () => undefined)
  const file = join(nan, 'model.safetensors')
  const bytes = await readFile(file)
  bytes.writeFloatLE(NaN, bytes.length - 400)
  await writeFile(file, bytes)
  await t.rejects(Llama.load(nan, { device: 'cpu' }), { code: 'ERR_NOT_FINITE', message: /has NaN at element \d+/ })
})

t.test('generation', async (t) => {
  using model = await load()
  const text = async (options: object): Promise<number[]> => {
    const ids: number[] = []
    for await (const { id } of model.generate({ prompt: [1, 313, 297], maxTokens: 20, stopIds: [], ...options }))
      ids.push(id)
    return ids
  }
  // A prompt of several prefill passes and single tokens must continue as one whole pass would.
  const long = random(300, 400)
  const logits = (await model.logits([long])).data.slice(-400)
  const best = logits.indexOf(Math.max(...logits))
  t.equal((await text({ prompt: long, maxTokens: 1 }))[0], best)
  const sampled = await text({ temperature: 1.5, seed: 3 })
  t.same(await text({ temperature: 1.5, seed: 3 }), sampled, 'the same seed gives the same text')
  t.notSame(await text({ temperature: 1.5, seed: 4 }), sampled)
  t.same(await text({ temperature: 1.5, topK: 1 }), await text({}), 'top 1 is greedy')
  const greedy = await text({})
  t.same(await text({ stopIds: [greedy[3]] }), greedy.slice(0, greedy.indexOf(greedy[3]!)), 'ends at a stop id')
  const window = await text({ prompt: random(120, 400), maxTokens: 100 })
  t.equal(window.length, 8, 'ends where the window of 128 is full')
  const controller = new AbortController()
  await t.rejects(
    (async () => {
      for await (const { id } of model.generate({
        prompt: [1],
        maxTokens: 50,
        stopIds: [],
        signal: controller.signal,
      })) {
        if (id >= 0) controller.abort(new Error('enough'))
      }
    })(),
    { message: 'enough' },
  )
  const pieces: string[] = []
  for await (const { text: piece } of model.generate({ prompt: 'The grass', maxTokens: 12, stopIds: [] }))
    pieces.push(piece)
  t.ok(pieces.join('').length > 0)
})

t.test('a long prompt of dynamic frequencies is rotated as one text', async (t) => {
  using model = await Llama.load(join(fixtures, 'dynamic4'), { device: 'cpu', dtype: 'float32' })
  for (const length of [200, 256, 257, 300, 500]) {
    const prompt = random(length, 300, length)
    const { data, dims } = await model.logits([prompt])
    const last = data.slice(-dims[2]!)
    const ids: number[] = []
    for await (const { id } of model.generate({ prompt, maxTokens: 1, stopIds: [] })) ids.push(id)
    t.equal(ids[0], last.indexOf(Math.max(...last)), `${length} tokens`)
    const text = new Continuation(model.device, model.config, model.weights, length)
    t.ok(relativeError(await text.feed(prompt), last) < 1e-5, `${length} tokens: the same logits`)
    text.dispose()
  }
})

t.test('disposing', async (t) => {
  const model = await load()
  const running = model.logits([random(128, 400)])
  t.throws(() => model.dispose(), { message: /still at work/ })
  t.equal((await running).data.length, 128 * 400, 'a refused dispose harms nothing')
  model.dispose()

  const threads = () => readdirSync('/proc/self/task').length
  if (process.platform === 'linux') {
    const before = threads()
    for (let i = 0; i < 10; i++) (await load({ threads: 4 })).dispose()
    t.ok(threads() <= before + 4, `threads of disposed devices are gone: ${before} before, ${threads()} after`)
  }
})

t.test('a model outlives its folder', async (t) => {
  const place = await mkdtemp(join(tmpdir(), 'ropewalk-gone-'))
  t.teardown(() => rm(place, { recursive: true, force: true }))
  await cp(folder, join(place, 'm'), { recursive: true })
  using model = await Llama.load(join(place, 'm'), { device: 'cpu' })
  await rm(join(place, 'm'), { recursive: true })
  await model.save(join(place, 'saved'))
  t.match(model.warnings, [/is gone: the model is saved without its tokenizer/])
  ;(await Llama.load(join(place, 'saved'), { device: 'cpu' })).dispose()
})

t.test('activations in bfloat16 on the CPU: for bfloat16 weights, and not for training', async (t) => {
  await t.rejects(load({ activations: 'bfloat16' }), {
    name: 'RangeError',
    message: 'activations is "bfloat16", but weights are float32, for which they are too coarse: leave the option out',
  })
  await t.rejects(load({ activations: 'half' }), {
    message: /activations is "half", but must be "float32" or "bfloat16"/,
  })
  await t.rejects(load({ activations: 'float32', device: 'dry:cuda' }), { message: /a GPU keeps them as weights/ })
  using exact = await load({ dtype: 'bfloat16', activations: 'float32' })
  using coarse = await load({ dtype: 'bfloat16', activations: 'bfloat16' })
  const tokens = [random(300, 400)]
  const [want, got] = [await exact.loss(tokens), await coarse.loss(tokens)]
  t.not(got, want)
  t.ok(Math.abs(got - want) < 1e-2, `${got} against ${want}`)
  t.throws(() => new Trainer(coarse, {}), { message: /load it without the option/ })
  const options = { prompt: tokens[0]!.slice(0, 20), maxTokens: 4, stopIds: [] }
  for (const model of [exact, coarse]) {
    const written: number[] = []
    for await (const { id } of model.generate(options)) written.push(id)
    t.equal(written.length, 4)
  }
})
