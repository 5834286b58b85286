// QLoRA: adapters trained beside a quantised base, which stays as it is; what is planned is what is taken; resuming.
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { Llama } from '../../lib/model/llama.js'
import type { LoraOptions } from '../../lib/model/lora.js'
import { presetConfig } from '../../lib/model/presets.js'
import { parameterShapes, readConfig } from '../../lib/model/config.js'
import { tensorBytes } from '../../lib/runtime/tensor.js'
import { fit } from '../../lib/train/fit.js'
import type { MemoryOptions } from '../../lib/train/memory.js'
import { plan } from '../../lib/train/planner.js'
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js'
import { fixtures } from '../golden.js'
import { type Format, FORMATS } from '../ops/quantized-reference.js'

const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-train-quantize-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

const devices = ['cpu', ...(process.env['ROPEWALK_SIMT_LIBRARY'] === undefined ? [] : ['simt'])]
const load = (name: string, device: string, quantize?: Format) =>
  Llama.load(join(fixtures, name), { device, ...(quantize && { quantize }) })
const tokens = Array.from({ length: 2 }, (_, b) => Array.from({ length: 24 }, (_, i) => (i * 37 + b * 5 + 11) % 300))
const everything: LoraOptions = {
  rank: 3,
  targets: ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'],
  alsoTrain: ['norm'],
}

/** The bytes of every weight as it is kept, and of the adapter. */
async function bitsOf(model: Llama): Promise<Map<string, string>> {
  const all = [...model.weights, ...(model.lora?.parameters ?? [])]
  const bytes = async ({ value }: (typeof all)[0]) => Buffer.from(await model.device.download(value)).toString('base64')
  return new Map(await Promise.all(all.map(async (one) => [one.name, await bytes(one)] as const)))
}

async function train(model: Llama, lora: LoraOptions, memory: MemoryOptions = {}) {
  const options = { learningRate: 1e-2, warmupSteps: 0, context: 24, batchSize: 2, lora, memory }
  using trainer = new Trainer(model, options)
  const losses: number[] = []
  for (let step = 0; step < 3; step++) losses.push((await trainer.step(tokens)).loss)
  const { allocatedBytes, hostBytes, mappedBytes } = model.device
  const plain = model.weights.bytes - planned(model)
  t.equal(allocatedBytes + (mappedBytes > 0 ? plain : 0), trainer.plan().totalBytes, 'planned is allocated')
  t.equal(hostBytes, trainer.plan().hostBytes)
  return { losses, after: await bitsOf(model) }
}

/** Bytes of the quantised matrices of a model, each at a multiple of 256. */
function planned(model: Llama): number {
  const { weights, quantization } = model
  let bytes = 0
  for (const { name, value } of weights) {
    if (quantization && /layers.*_proj/.test(name))
      bytes += Math.ceil(tensorBytes(quantization, value.size) / 256) * 256
  }
  return bytes
}

for (const device of devices) {
  for (const quantize of FORMATS) {
    t.test(`${quantize} on ${device}`, async (t) => {
      for (const name of ['gqa-linear4-f32', 'mha-bf16', 'sharded-tied-linear8']) {
        for (const lora of [{}, everything]) {
          using model = await load(name, device, quantize)
          const before = await bitsOf(model)
          const { losses, after } = await train(model, lora)
          for (const [key, bits] of before) {
            const trains = /norm/.test(key) && lora.alsoTrain !== undefined
            t.equal(after.get(key) !== bits, trains, `${key} ${trains ? 'is trained' : 'is untouched'}`)
          }
          t.ok(losses[2]! < losses[0]!, 'it learns')
          // Near to what an adapter of the plain model does, as near as the weights are.
          using plain = await load(name, device)
          const other = await train(plain, lora)
          const bound = quantize === 'int8' ? 0.02 : 0.06
          for (const [i, loss] of losses.entries()) {
            t.ok(Math.abs(loss / other.losses[i]! - 1) < bound, `${name}: ${loss}, plain ${other.losses[i]}`)
          }
          for (const memory of [
            { checkpointLayers: 1, offloadCheckpoints: true },
            { gradients: 'fused', offloadOptimizer: true },
          ] as const) {
            using again = await load(name, device, quantize)
            t.strictSame(await train(again, lora, memory), { losses, after }, JSON.stringify(memory))
          }
        }
      }
    })
  }
}

t.test('resuming changes no bit, and needs the same base', async (t) => {
  const data = join(dir, 'data.txt')
  fs.writeFileSync(data, 'the rope was laid along the walk and every strand of it was stretched. '.repeat(20))
  const run = async (output: string, quantize: Format | undefined, steps: number, more: TrainerOptions = {}) => {
    using model = await load('gqa-linear4-f32', 'cpu', quantize)
    const options = { data, context: 16, steps, saveEvery: 2, cacheDir: join(dir, 'cache'), lora: everything, ...more }
    using trainer = new Trainer(model, { ...options, output, learningRate: 1e-2, warmupSteps: 0 })
    for await (const _ of trainer.run()) void _
    return await bitsOf(model)
  }
  const whole = await run(join(dir, 'whole'), 'nf4', 6)
  await run(join(dir, 'parts'), 'nf4', 4)
  const parts = await run(join(dir, 'parts'), 'nf4', 6, { resume: true })
  t.strictSame(parts, whole)
  for (const other of ['int8', undefined] as const) {
    await t.rejects(run(join(dir, 'parts'), other, 8, { resume: true }), {
      code: 'ERR_RESUME',
      message: other ? /quantization was "nf4" .* is "int8" now/ : /quantization was "nf4" .* is undefined now/,
    })
  }
  // A checkpoint is an adapter like any other, for the quantised base and the plain one.
  const adapter = join(dir, 'parts', 'checkpoint-000006')
  const base = join(fixtures, 'gqa-linear4-f32')
  using quantised = await Llama.load(base, { device: 'cpu', quantize: 'nf4', adapter })
  t.strictSame(await bitsOf(quantised), whole)
  using plain = await Llama.load(base, { device: 'cpu', adapter })
  const off = Math.abs((await plain.loss(tokens)) / (await quantised.loss(tokens)) - 1)
  t.ok(off > 0 && off < 0.03, `the loss is off by ${off}`)
})

t.test('what is planned', async (t) => {
  const request = { model: '7b', context: 8192, lora: { rank: 16 }, memory: { checkpointLayers: 1 } }
  const [plain, nf4, int8] = await Promise.all([
    plan(request),
    plan({ ...request, quantize: 'nf4' }),
    plan({ ...request, quantize: 'int8' }),
  ])
  const config = readConfig(presetConfig('7b'), '7b')
  const shapes = parameterShapes(config).map(({ name, dims }) => ({ name, size: dims.reduce((a, b) => a * b, 1) }))
  const matrices = shapes.filter(({ name }) => /layers.*_proj/.test(name))
  for (const [format, { bytes, quantization }] of [
    ['nf4', nf4],
    ['int8', int8],
  ] as const) {
    t.equal(quantization, format)
    const packed = matrices.reduce((sum, { size }) => sum + Math.ceil(tensorBytes(format, size) / 256) * 256, 0)
    const removed = matrices.reduce((sum, { size }) => sum + 2 * size, 0)
    t.equal(bytes.weights, plain.bytes.weights - removed + packed)
    for (const part of ['gradients', 'optimizer', 'checkpoints', 'activations', 'logits'] as const) {
      t.equal(bytes[part], plain.bytes[part], part)
    }
  }
  t.equal(nf4.flopsPerStep, plain.flopsPerStep)
  t.ok(nf4.trafficPerStep < plain.trafficPerStep)
  t.ok(nf4.requiredBytes < plain.requiredBytes - 9e9)
  await t.rejects(plan({ model: '7b', context: 8192, quantize: 'nf4' }), {
    name: 'RangeError',
    message: /the weights are quantised \(nf4\), too coarse for updates/,
  })
  await t.rejects(plan({ ...request, quantize: 'nf5' as never }), { name: 'RangeError', message: /quantize is "nf5"/ })
  await t.rejects(plan({ ...request, lora: { rank: 5000 } }), { name: 'RangeError', message: /lora.rank is 5000/ })
})

t.test('what fits', async (t) => {
  const model = {
    ...{ architectures: ['LlamaForCausalLM'], model_type: 'llama', hidden_size: 1024, intermediate_size: 2816 },
    ...{ num_hidden_layers: 2, num_attention_heads: 8, vocab_size: 512, max_position_embeddings: 128 },
  }
  const request = { model, context: 64, lora: { rank: 4 }, quantize: 'nf4' as const, memory: { checkpointLayers: 1 } }
  const { requiredBytes: limit } = await plan(request)
  const { sets } = await fit({ ...request, limit })
  t.ok(sets.length > 0)
  for (const { plan: found, memory } of sets) {
    const again = await plan({ ...request, limit, memory })
    t.equal(again.requiredBytes, found.requiredBytes)
    t.ok(again.fits)
  }
  const { sets: none, problem } = await fit({ ...request, quantize: undefined, limit })
  t.strictSame(none, [])
  t.ok(problem!.missingBytes > 20e6)
})
