// LoRA in the model: against PEFT's own results, its files, merging, and what it refuses.
import * as fs from 'node:fs'
import fsp from 'node:fs/promises'
import { syncBuiltinESMExports } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { openSafetensors, writeSafetensors } from '../../lib/files/safetensors.js'
import { Llama } from '../../lib/model/llama.js'
import type { LoraOptions } from '../../lib/model/lora.js'
import { Trainer } from '../../lib/train/trainer.js'
import { fixtures, relativeError } from '../golden.js'

const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-lora-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

const CASES = { all: 'gqa-linear4-f32', rslora: 'sharded-tied-linear8' } as const
const devices = ['cpu', ...(process.env['ROPEWALK_SIMT_LIBRARY'] === undefined ? [] : ['simt'])]
const base = (name: keyof typeof CASES): string => join(fixtures, CASES[name])
const adapter = (name: keyof typeof CASES): string => join(fixtures, 'peft', name)
const json = (path: string): any => JSON.parse(fs.readFileSync(path, 'utf8'))

async function golden(name: keyof typeof CASES) {
  const file = await openSafetensors(join(adapter(name), 'golden.safetensors'))
  const floats = async (key: string) => new Float32Array(Uint8Array.from(await file.read(key)).buffer)
  const ids = new Int32Array(Uint8Array.from(await file.read('input_ids')).buffer)
  const tokens = { dims: file.tensors.get('input_ids')!.dims, data: ids }
  const gradients = [...file.tensors.keys()].filter((key) => key.startsWith('grad.'))
  return { tokens, floats, gradients, close: () => file.close() }
}

const bytesOf = async (model: Llama): Promise<Buffer[]> =>
  Promise.all(model.parameters().map(async ({ name }) => Buffer.from((await model.read(name)).data.buffer)))

for (const device of devices) {
  for (const name of ['all', 'rslora'] as const) {
    t.test(`an adapter that PEFT wrote: ${name} on ${device}`, async (t) => {
      const want = await golden(name)
      using model = await Llama.load(base(name), { device, adapter: adapter(name) })
      t.strictSame(model.warnings, [])
      t.match(model.adapter, name === 'all' ? { rank: 4, alpha: 12, alsoTrain: ['embed', 'norm'] } : { rank: 3 })
      // The same bounds as for the checkpoints without an adapter, a few units in the last place of float32.
      const logits = await want.floats('logits')
      const error = relativeError((await model.logits(want.tokens)).data, logits)
      t.ok(error < 1e-6, `logits are off by ${error}`)
      const [loss] = await want.floats('loss')
      t.ok(Math.abs((await model.loss(want.tokens)) / loss! - 1) < 1e-6)
      const gradients = await model.gradients(want.tokens)
      t.equal(
        [...gradients.keys()].filter((key) => key.includes('lora_')).length,
        2 * 2 * model.adapter!.targets.length,
      )
      t.ok(want.gradients.length > 7)
      for (const key of want.gradients) {
        const off = relativeError(gradients.get(key.slice(5))!.data, await want.floats(key))
        t.ok(off < 3e-6, `${key} is off by ${off}`)
      }

      // Token by token, with a cache, is the same model.
      const row = [...want.tokens.data.subarray(0, 12)]
      const vocabulary = model.config.vocabSize
      const last = (await model.logits([row])).data.subarray(11 * vocabulary)
      const likeliest = last.indexOf(Math.max(...last))
      for await (const { id } of model.generate({ prompt: row, maxTokens: 1, stopIds: [] })) t.equal(id, likeliest)

      // Merged: each weight has one more rounding, of half a unit in its last place (2^-24), and products of B A another
      // order of summation: noise of the size that float32 has anyway.
      await t.rejects(model.save(join(dir, 'unmerged')), { message: /has an adapter: merge\(\) it first/ })
      await model.merge()
      t.equal(model.adapter, undefined)
      const merged = relativeError((await model.logits(want.tokens)).data, logits)
      t.ok(merged < 1e-6, `merged logits are off by ${merged}`)
      await model.save(join(dir, `merged-${device}-${name}`))
      using plain = await Llama.load(join(dir, `merged-${device}-${name}`), { device })
      t.strictSame((await plain.logits(want.tokens)).data, (await model.logits(want.tokens)).data)
      await t.rejects(model.merge(), { message: /no adapter/ })
      await t.rejects(model.saveAdapter(join(dir, 'none')), { message: /no adapter/ })
      await want.close()
    })
  }
}

t.test('every element of a merged weight is rounded once', async (t) => {
  for (const dtype of ['float32', 'bfloat16'] as const) {
    using model = await Llama.load(base('all'), { device: 'cpu', dtype, adapter: adapter('all') })
    const name = 'model.layers.1.mlp.down_proj'
    const numbers = async (key: string): Promise<number[]> => {
      const { type, data } = await model.read(key)
      return Array.from(data, (x) => (type === 'float32' ? x : new Float32Array(Uint32Array.of(x << 16).buffer)[0]!))
    }
    const [w, a, b] = await Promise.all(
      ['weight', 'lora_A.weight', 'lora_B.weight'].map((x) => numbers(`${name}.${x}`)),
    )
    await model.merge()
    const merged = await numbers(`${name}.weight`)
    const [rows, columns, rank] = [32, 64, 4]
    let worst = 0
    for (let o = 0; o < rows; o++) {
      for (let i = 0; i < columns; i++) {
        let [exact, size] = [w![o * columns + i]!, Math.abs(w![o * columns + i]!)]
        for (let r = 0; r < rank; r++) {
          const term = 3 * b![o * rank + r]! * a![r * columns + i]!
          exact += term
          size += Math.abs(term)
        }
        // scaling B, rank products and sums in float32 (2^-24 each, of no more than `size`), then the store (2^-8)
        const bound = (rank + 2) * 2 ** -24 * size + (dtype === 'bfloat16' ? 2 ** -8 * Math.abs(exact) : 0)
        worst = Math.max(worst, Math.abs(merged[o * columns + i]! - exact) / bound)
      }
    }
    t.ok(worst <= 1, `${dtype}: ${worst} of the bound`)
    t.ok(worst > 0.05, 'which is not loose')
  }
})

t.test('what is saved is what PEFT reads', async (t) => {
  for (const name of ['all', 'rslora'] as const) {
    const out = join(dir, `saved-${name}`)
    using model = await Llama.load(base(name), {
      device: 'cpu',
      adapter: adapter(name),
      rope: { type: 'linear', factor: 2 },
    })
    await model.saveAdapter(out)
    await t.rejects(model.saveAdapter(out), { code: 'ERR_EXISTS' })
    await model.saveAdapter(out, { overwrite: true })
    t.strictSame(fs.readdirSync(out).sort(), [
      'README.md',
      'adapter_config.json',
      'adapter_model.safetensors',
      'config.json',
    ])
    const [ours, theirs] = [out, adapter(name)].map((path) => json(join(path, 'adapter_config.json')))
    for (const [field, value] of Object.entries<any>(ours)) {
      if (field === 'base_model_name_or_path') t.equal(value, base(name))
      else if (field === 'target_modules') t.strictSame([...value].sort(), [...theirs[field]].sort())
      else if (field === 'modules_to_save' && value) t.ok(theirs[field].every((one: string) => value.includes(one)))
      else t.equal(value, theirs[field], field)
    }
    const files = await Promise.all(
      [out, adapter(name)].map((path) => openSafetensors(join(path, 'adapter_model.safetensors'))),
    )
    t.strictSame([...files[0]!.tensors.keys()].sort(), [...files[1]!.tensors.keys()].sort())
    for (const key of files[0]!.tensors.keys()) {
      t.strictSame(Buffer.from(await files[0]!.read(key)), Buffer.from(await files[1]!.read(key)), key)
    }
    await Promise.all(files.map((file) => file.close()))
    // The stretched positions come with it, in a file and in words.
    t.equal(json(join(out, 'config.json')).rope_parameters.factor, name === 'all' ? 8 : 16)
    t.match(fs.readFileSync(join(out, 'README.md'), 'utf8'), /PeftModel.from_pretrained\(base, adapter\)/)
    using again = await Llama.load(base(name), { device: 'cpu', adapter: out })
    t.equal(again.contextWindow, model.contextWindow)
    const tokens = [[1, 5, 9, 7]]
    t.strictSame((await again.logits(tokens)).data, (await model.logits(tokens)).data)
    using other = await Llama.load(base(name), { device: 'cpu', adapter: out, rope: { type: 'linear', factor: 3 } })
    t.match(other.warnings, [/trained with other positions than those given/])
    using same = await Llama.load(base(name), { device: 'cpu', adapter: out, rope: { type: 'linear', factor: 2 } })
    t.strictSame(same.warnings, [])
  }
  await t.rejects(Llama.load(join(dir, 'saved-all'), { device: 'cpu' }), {
    message: /an adapter, not a model: give the model/,
  })
})

t.test('an adapter of another base is refused, also where its tensors would fit', async (t) => {
  const out = join(dir, 'another-base')
  using model = await Llama.load(base('all'), { device: 'cpu' })
  using trainer = new Trainer(model, { learningRate: 1e-2, lora: { rank: 2 } })
  await trainer.step([[1, 5, 9, 7]])
  await model.saveAdapter(out)
  const path = join(out, 'config.json')
  const saved = json(path)
  const load = async (config: object) => {
    fs.writeFileSync(path, JSON.stringify({ ...saved, ...config }))
    using loaded = await Llama.load(base('all'), { device: 'cpu', adapter: out })
    return loaded.adapter
  }
  const { hidden_size: hidden, num_attention_heads: heads, num_key_value_heads: kvHeads } = saved
  const headDim = hidden / heads
  const others: [string, object][] = [
    ['hidden_size', { hidden_size: 2 * hidden, head_dim: headDim }],
    ['intermediate_size', { intermediate_size: saved.intermediate_size + 2 }],
    ['num_hidden_layers', { num_hidden_layers: saved.num_hidden_layers + 1 }],
    [
      'num_attention_heads',
      { num_attention_heads: 2 * heads, num_key_value_heads: 2 * kvHeads, head_dim: headDim / 2 },
    ],
    ['num_key_value_heads', { num_key_value_heads: heads }],
    ['head_dim', { head_dim: 2 * headDim }],
    ['vocab_size', { vocab_size: saved.vocab_size + 1 }],
    ['rms_norm_eps', { rms_norm_eps: 3e-3 }],
  ]
  for (const [field, config] of others) {
    const { [field]: other } = config as Record<string, number>
    const message = `${path}: ${field} is ${other}, but the base's is ${saved[field] ?? headDim}: the adapter was trained on another base`
    const error = await load(config).then(
      () => undefined,
      (reason: unknown) => reason as Error & { code: string },
    )
    t.equal(error?.code, 'ERR_CONFIG', field)
    t.ok(error?.message.startsWith(message), `${field}: ${error?.message}`)
  }
  // What the base leaves to its default is no difference, and an NTK extension changes rope_theta.
  t.match(await load({ head_dim: undefined }), { rank: 2 })
  t.match(await load({ head_dim: headDim }), { rank: 2 })
  t.match(await load({ rope_theta: 123456, rope_parameters: undefined, rope_scaling: undefined }), { rank: 2 })
  fs.rmSync(path)
  using without = await Llama.load(base('all'), { device: 'cpu', adapter: out })
  t.match(without.adapter, { rank: 2 })
})

t.test('a tied embedding that is trained is saved twice, and read as one', async (t) => {
  const out = join(dir, 'tied')
  using model = await Llama.load(base('rslora'), { device: 'cpu' })
  const options = { learningRate: 1e-2, warmupSteps: 0, lora: { rank: 2, alsoTrain: ['embed'] } } as const
  using trainer = new Trainer(model, options)
  await trainer.step([[1, 5, 9, 7, 3, 2]])
  await model.saveAdapter(out)
  t.strictSame(json(join(out, 'adapter_config.json')).modules_to_save, ['embed_tokens', 'lm_head'])
  const path = join(out, 'adapter_model.safetensors')
  const file = await openSafetensors(path)
  const key = 'base_model.model.lm_head.weight'
  t.strictSame(await file.read(key), await file.read('base_model.model.model.embed_tokens.weight'))
  using again = await Llama.load(base('rslora'), { device: 'cpu', adapter: out })
  t.strictSame(await bytesOf(again), await bytesOf(model))
  const entries = await Promise.all(
    [...file.tensors.values()].map(async (tensor) => {
      const data = await file.read(tensor.name)
      if (tensor.name === key) data[5]! ^= 1
      return { ...tensor, data: () => data }
    }),
  )
  await file.close()
  const load = () => Llama.load(base('rslora'), { device: 'cpu', adapter: out })
  fs.rmSync(path)
  await writeSafetensors(path, entries, [])
  await t.rejects(load(), {
    code: 'ERR_TENSORS',
    message: /lm_head and embed_tokens differ, but in this base they are one/,
  })
  fs.rmSync(path)
  await writeSafetensors(
    path,
    entries.filter(({ name }) => name !== key),
    [],
  )
  await t.rejects(load(), { code: 'ERR_TENSORS', message: /changes one of them only: lm_head.weight is missing/ })
})

t.test('adapters that cannot be used', async (t) => {
  let serial = 0
  const load = async (
    config: object,
    change: (name: string) => string | undefined = (name) => name,
    of = base('all'),
  ) => {
    const path = join(dir, `bad-${serial++}`)
    fs.mkdirSync(path)
    fs.writeFileSync(
      join(path, 'adapter_config.json'),
      JSON.stringify({ ...json(join(adapter('all'), 'adapter_config.json')), ...config }),
    )
    const file = await openSafetensors(join(adapter('all'), 'adapter_model.safetensors'))
    const entries = [...file.tensors.values()].flatMap((tensor) => {
      const name = change(tensor.name)
      return name === undefined ? [] : [{ ...tensor, name, data: () => file.read(tensor.name) }]
    })
    await writeSafetensors(join(path, 'adapter_model.safetensors'), entries, [])
    await file.close()
    using model = await Llama.load(of, { device: 'cpu', adapter: path })
    return model.adapter
  }
  t.match(await load({}), { rank: 4 }, 'the adapter itself')
  const configs: [object, RegExp][] = [
    [{ peft_type: 'IA3' }, /peft_type is "IA3", but only LORA/],
    [{ use_dora: true }, /use_dora is true: only plain LoRA is supported/],
    [{ bias: 'all' }, /bias is "all": only plain LoRA/],
    [{ lora_bias: true }, /lora_bias is true/],
    [{ fan_in_fan_out: true }, /fan_in_fan_out is true/],
    [{ rank_pattern: { q_proj: 8 } }, /rank_pattern is \{"q_proj":8\}/],
    [{ alpha_pattern: { q_proj: 8 } }, /alpha_pattern is/],
    [{ layers_to_transform: [0] }, /layers_to_transform is \[0\]/],
    [{ trainable_token_indices: [5] }, /trainable_token_indices is/],
    [{ something_new: { a: 1 } }, /something_new is \{"a":1\}/],
    [{ init_lora_weights: 'pissa' }, /init_lora_weights is "pissa", which changes the base too/],
    [{ r: 0 }, /r is 0, but must be a whole number/],
    [{ r: '4' }, /r is "4"/],
    [{ lora_alpha: 0 }, /lora_alpha is 0, but must be a number > 0/],
  ]
  for (const [config, message] of configs) await t.rejects(load(config), { code: 'ERR_CONFIG', message })
  const drop = (pattern: RegExp) => (name: string) => (pattern.test(name) ? undefined : name)
  const key = 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'
  const tensors: [Parameters<typeof load>, RegExp][] = [
    [[{}, drop(/layers\.1\.self_attn\.q_proj\.lora_A/)], /layers\.1\.self_attn\.q_proj\.lora_A\.weight is missing/],
    [[{}, drop(/input_layernorm/)], /input_layernorm\.weight is missing/],
    [[{}, drop(/lora_/)], /no tensor belongs to an adapter of q_proj/],
    [[{}, (name) => (name === key ? 'base_model.model.score.weight' : name)], /q_proj\.lora_A\.weight is missing/],
    [
      [{}, (name) => (/embed/.test(name) ? 'base_model.model.score.weight' : name)],
      /score\.weight is no part of an adapter/,
    ],
    [[{ r: 5 }], /is \(4,32\), but for this base and rank it has to be \(5,32\)/],
    [[{}, undefined, join(fixtures, 'mha-f32')], /has to be \(.*\): the adapter belongs to another model/],
    [[{}, undefined, base('rslora')], /changes one of them only: lm_head.weight is missing/],
  ]
  for (const [args, message] of tensors) await t.rejects(load(...args), { code: 'ERR_TENSORS', message })

  const empty = join(dir, 'empty')
  fs.mkdirSync(empty)
  const from = (path: string) => Llama.load(base('all'), { device: 'cpu', adapter: path })
  await t.rejects(from(empty), { code: 'ERR_NOT_FOUND', message: /no adapter_config.json: a folder with an adapter/ })
  fs.writeFileSync(join(empty, 'adapter_config.json'), '{}')
  await t.rejects(from(empty), { code: 'ERR_NOT_FOUND', message: /no adapter_model.safetensors/ })
  fs.writeFileSync(join(empty, 'adapter_model.bin'), '')
  await t.rejects(from(empty), { code: 'ERR_PICKLE' })
  await t.rejects(from(join(dir, 'nowhere')), { code: 'ERR_NOT_FOUND' })
  await t.rejects(Llama.load(base('all'), { adapter: 5 as never }), { name: 'TypeError', message: /adapter is 5/ })

  // A NaN in it, behind a header that is right.
  const damaged = join(dir, 'damaged')
  fs.cpSync(adapter('all'), damaged, { recursive: true })
  const path = join(damaged, 'adapter_model.safetensors')
  const file = await openSafetensors(path)
  const { offset } = file.tensors.get(key)!
  await file.close()
  const bytes = fs.readFileSync(path)
  bytes.writeFloatLE(NaN, offset + 8)
  fs.writeFileSync(path, bytes)
  await t.rejects(from(damaged), {
    code: 'ERR_NOT_FINITE',
    message: /q_proj\.lora_A\.weight is NaN or infinite at element 2/,
  })
})

t.test('an adapter that cannot be saved leaves what was there', async (t) => {
  using model = await Llama.load(base('all'), { device: 'cpu', adapter: adapter('all') })
  const parent = join(dir, 'parent')
  const out = join(parent, 'adapter')
  const stand = () => fs.readdirSync(out).map((name) => [name, fs.readFileSync(join(out, name)).toString('base64')])
  await model.saveAdapter(out)
  const before = stand()
  const name = 'model.layers.0.self_attn.q_proj.lora_B.weight'
  const { dims, data } = await model.read(name)
  const write = (values: Float32Array) => model.write(name, { type: 'float32', dims, data: values })
  const save = () => model.saveAdapter(out, { overwrite: true })
  await write(new Float32Array(data.length).fill(NaN))
  await t.rejects(save(), { code: 'ERR_NOT_FINITE' })
  await write(new Float32Array(data.length).fill(0.5))
  const real = { ...fsp }
  t.teardown(() => {
    Object.assign(fsp, real)
    syncBuiltinESMExports()
  })
  const full = async () => Promise.reject(Object.assign(new Error('no space left on device'), { code: 'ENOSPC' }))
  for (const call of ['open', 'mkdir', 'rename'] as const) {
    Object.assign(fsp, { [call]: full })
    syncBuiltinESMExports()
    await t.rejects(save(), { code: 'ERR_NO_SPACE' }, call)
    Object.assign(fsp, real)
    syncBuiltinESMExports()
    t.strictSame([fs.readdirSync(parent), stand()], [['adapter'], before], `nothing is half-written: ${call}`)
  }
  await save()
  t.notSame(stand(), before)
})

t.test('an adapter begins as nothing', async (t) => {
  const tokens = [Array.from({ length: 20 }, (_, i) => (i * 37 + 11) % 300)]
  const everything: LoraOptions = {
    targets: ['down_proj', 'q_proj', 'gate_proj', 'up_proj', 'k_proj', 'v_proj', 'o_proj'],
    alsoTrain: ['norm', 'embed'],
  }
  for (const device of devices) {
    for (const lora of [{}, everything]) {
      using model = await Llama.load(base('all'), { device })
      const before = await model.logits(tokens)
      // a step at rate 0
      using trainer = new Trainer(model, { learningRate: 0, lora })
      await trainer.step(tokens)
      t.ok(model.adapter)
      t.strictSame((await model.logits(tokens)).data, before.data, `${device}, ${JSON.stringify(lora)}: the same bits`)
      const a = await model.read('model.layers.1.self_attn.v_proj.lora_A.weight')
      const bound = 1 / Math.sqrt(32)
      const values = Array.from(a.data)
      t.ok(values.every((x) => Math.abs(x) <= bound) && new Set(values).size > 200)
      const deviation = Math.sqrt(values.reduce((sum, x) => sum + x * x, 0) / values.length)
      t.ok(Math.abs(deviation / (bound / Math.sqrt(3)) - 1) < 0.1, 'uniform')
      const b = await model.read('model.layers.1.self_attn.v_proj.lora_B.weight')
      t.ok(b.data.every((x) => x === 0))
      await model.write('model.layers.1.self_attn.v_proj.lora_B.weight', {
        ...b,
        data: new Float32Array(b.data.length).fill(1),
      })
      t.notSame((await model.logits(tokens)).data, before.data)
    }
  }
})
