// Models whose matrices are quantised: what the files become, against a plain model with the same values, merging, and
// what is refused.
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { Llama } from '../../lib/model/llama.js'
import type { LoadOptions } from '../../lib/model/load.js'
import { fromBfloat16 } from '../../lib/runtime/bfloat16.js'
import { tensorBytes } from '../../lib/runtime/tensor.js'
import { Trainer } from '../../lib/train/trainer.js'
import { fixtures, relativeError } from '../golden.js'
import { dequantized, type Format, FORMATS, quantized } from '../ops/quantized-reference.js'

const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-quantize-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

const devices = ['cpu', ...(process.env['ROPEWALK_SIMT_LIBRARY'] === undefined ? [] : ['simt'])]
const NAMES = ['gqa-linear4-f32', 'mha-bf16', 'sharded-tied-linear8'] // rows of 32, 64 and 40
const tokens = [Array.from({ length: 24 }, (_, i) => (i * 37 + 11) % 300)]
const isBlockMatrix = (name: string): boolean => /layers.*_proj/.test(name)

const load = (name: string, options: LoadOptions): Promise<Llama> => Llama.load(join(fixtures, name), options)

async function values(model: Llama, name: string): Promise<Float32Array> {
  const { data } = await model.read(name)
  return data instanceof Uint16Array ? Float32Array.from(data, fromBfloat16) : data
}

for (const device of devices) {
  for (const quantize of FORMATS) {
    t.test(`the files' own values, rounded: ${quantize} on ${device}`, async (t) => {
      for (const name of NAMES) {
        using plain = await load(name, { device: 'cpu' })
        const loaded = [
          await load(name, { device, quantize }),
          await load(name, { device, quantize, map: false }),
          await load(name, { device, quantize, dtype: plain.dtype === 'float32' ? 'bfloat16' : 'float32' }),
        ]
        for (const [i, model] of loaded.entries()) {
          t.equal(model.quantization, quantize)
          t.equal(model.parameterCount, plain.parameterCount)
          for (const { name, dims, type } of model.parameters()) {
            t.equal(type, isBlockMatrix(name) ? quantize : model.dtype, name)
            const before = await values(plain, name)
            const after = await values(model, name)
            if (!isBlockMatrix(name)) {
              if (i < 2) t.strictSame(after, before, `${name} is as it was`)
              continue
            }
            t.strictSame((await model.read(name)).dims, dims)
            const want = Float32Array.from(dequantized(quantize, quantized(quantize, before), before.length))
            t.strictSame(after, want, name)
          }
        }
        const [, read] = loaded as [Llama, Llama]
        const { weights, device: own } = read
        const largest = Math.max(...[...weights].map(({ value }) => value.size)) * (plain.dtype === 'float32' ? 4 : 2)
        t.equal(own.allocatedBytes, weights.bytes + own.workspaceBytes)
        t.ok(own.peakAllocatedBytes <= own.allocatedBytes + largest, 'never more than one matrix beside them')
        for (const model of loaded) model.dispose()
      }
    })

    t.test(`the same as a plain model of these values: ${quantize} on ${device}`, async (t) => {
      for (const name of NAMES) {
        using model = await load(name, { device, quantize })
        using plain = await load(name, { device, ...(device === 'cpu' && { dtype: 'float32' }) })
        for (const { name } of model.parameters().filter(({ name }) => isBlockMatrix(name))) {
          await plain.write(name, await model.read(name))
        }
        const options = {
          lora: { rank: 2, targets: ['q_proj', 'down_proj'] },
          warmupSteps: 0,
          learningRate: 1e-2,
        } as const
        for (const one of [model, plain]) {
          using trainer = new Trainer(one, options)
          await trainer.step(tokens)
        }
        // Adapters are trained alike; their B, which began as 0, has the sign of a gradient.
        const narrow = device === 'simt' && plain.dtype === 'bfloat16'
        const bound = narrow ? 3e-2 : 1e-5
        const off = relativeError((await model.logits(tokens)).data, (await plain.logits(tokens)).data)
        t.ok(off < bound, `${name}: logits are off by ${off}`)
        const [ours, theirs] = [await model.gradients(tokens), await plain.gradients(tokens)]
        t.strictSame([...ours.keys()].sort(), [...theirs.keys()].sort())
        for (const [key, { data, dims }] of ours) {
          t.strictSame(dims, theirs.get(key)!.dims)
          const off = relativeError(data, theirs.get(key)!.data)
          t.ok(off < bound, `${name}: the gradient of ${key} is off by ${off}`)
        }
        await checkGeneration(t, model)
      }
    })
  }
}

/** Token by token, with a cache, is the same model: few rows have a way of their own. */
async function checkGeneration(t: Test, model: Llama): Promise<void> {
  const vocabulary = model.config.vocabSize
  const prompt = tokens[0]!.slice(0, 12)
  const said: number[] = []
  for await (const { id } of model.generate({ prompt, maxTokens: 3, stopIds: [] })) said.push(id)
  for (const [i, id] of said.entries()) {
    const { data } = await model.logits([[...prompt, ...said.slice(0, i)]])
    const last = data.subarray(data.length - vocabulary)
    // bfloat16 on a GPU may take the other one of two that are nearly alike
    t.ok(last[id]! >= Math.max(...last) - 0.05, `token ${i}: ${id}`)
  }
}

t.test('values that are written are rounded, and must be finite', async (t) => {
  for (const quantize of FORMATS) {
    using model = await load('sharded-tied-linear8', { device: 'cpu', quantize })
    const name = 'model.layers.0.mlp.up_proj.weight'
    const before = await model.read(name)
    const loss = await model.loss(tokens)
    const data = (before.data as Float32Array).map((x, i) => 2 * x + (i % 7) / 100)
    await model.write(name, { ...before, data })
    t.strictSame(
      (await model.read(name)).data,
      Float32Array.from(dequantized(quantize, quantized(quantize, data), data.length)),
    )
    t.not(await model.loss(tokens), loss)
    data[5] = NaN
    await t.rejects(model.write(name, { ...before, data }), {
      name: 'RangeError',
      message: `${name}: element 5 is NaN, which cannot be quantised`,
    })
    await t.rejects(model.write(name, { ...before, dims: [1] }), { name: 'RangeError', message: /dims are \(1\)/ })
  }
})

t.test('a merged model is plain', async (t) => {
  for (const device of devices) {
    for (const [name, adapter] of [
      ['gqa-linear4-f32', 'all'],
      ['sharded-tied-linear8', 'rslora'],
    ] as const) {
      const quantize: Format = name === 'gqa-linear4-f32' ? 'nf4' : 'int8'
      using model = await load(name, { device, quantize, adapter: join(fixtures, 'peft', adapter) })
      const out = join(dir, `merged-${device}-${name}`)
      await t.rejects(model.save(out), { message: /has an adapter: merge\(\) it first/ })
      const logits = (await model.logits(tokens)).data
      await model.merge()
      t.equal(model.quantization, undefined)
      t.ok(model.parameters().every(({ type }) => type === 'float32'))
      const off = relativeError((await model.logits(tokens)).data, logits)
      t.ok(off < 1e-6, `off by ${off}`)
      model.releasePasses()
      const { allocatedBytes, workspaceBytes } = model.device
      t.equal(allocatedBytes, model.weights.bytes + workspaceBytes, 'of its quantised weights nothing is left')
      await model.save(out)
      using again = await Llama.load(out, { device })
      t.strictSame((await again.logits(tokens)).data, (await model.logits(tokens)).data)
      using trainer = new Trainer(model, { learningRate: 1e-3 })
      t.ok((await trainer.step(tokens)).loss > 0, 'all of it can be trained')
    }
  }
})

t.test('what is not possible', async (t) => {
  for (const bad of ['fp4', 'NF4', 4, null]) {
    await t.rejects(load('mha-bf16', { quantize: bad as never }), {
      name: 'RangeError',
      message: /quantize is .*, but must be "nf4" or "int8"/,
    })
  }
  using model = await load('mha-bf16', { device: 'cpu', quantize: 'nf4' })
  t.throws(() => new Trainer(model, { learningRate: 1e-3 }), {
    name: 'RangeError',
    message: /weights are quantised \(nf4\), too coarse for updates: train an adapter beside them \(lora: \{\}\)/,
  })
  await t.rejects(model.save(join(dir, 'quantised')), {
    message: /is quantised \(nf4\), and less exact than .*mha-bf16: load it without quantize to save it/,
  })
  t.notOk(fs.existsSync(join(dir, 'quantised')))
  await t.rejects(model.merge(), { message: /no adapter/ })

  // A damaged checkpoint is found before its values are rounded.
  for (const map of [true, false]) {
    const path = join(dir, `damaged-${map}`)
    fs.cpSync(join(fixtures, 'gqa-linear4-f32'), path, { recursive: true })
    using plain = await load('gqa-linear4-f32', { device: 'cpu' })
    const name = 'model.layers.1.mlp.up_proj.weight'
    const { storage, offset } = plain.weights.get(name).value
    const file = join(path, storage.name.split('/').at(-1)!)
    const bytes = fs.readFileSync(file)
    bytes.writeFloatLE(NaN, offset + 20)
    fs.writeFileSync(file, bytes)
    await t.rejects(Llama.load(path, { device: 'cpu', quantize: 'nf4', map }), {
      code: 'ERR_NOT_FINITE',
      message: /up_proj\.weight has NaN at element 5/,
    })
  }
})

t.test('bytes of a weight', async (t) => {
  const size = 4096 * 11008
  t.ok(Math.abs((8 * tensorBytes('nf4', size)) / size - (4 + 8 / 64 + 32 / 16384)) < 1e-5)
  t.equal((8 * tensorBytes('int8', size)) / size, 8.5)
})
