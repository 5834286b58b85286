// Training adapters: the base stays as it is, every choice of memory computes the same, checkpoints go on to the same bits.
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { Llama } from '../../lib/model/llama.js'
import type { LoraOptions } from '../../lib/model/lora.js'
import { Device } from '../../lib/runtime/device.js'
import type { MemoryOptions } from '../../lib/train/memory.js'
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js'
import { fixtures, relativeError } from '../golden.js'

const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-train-lora-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

const onSimt = process.env['ROPEWALK_SIMT_LIBRARY'] !== undefined
const load = (name = 'gqa-linear4-f32', device = 'cpu') => Llama.load(join(fixtures, name), { device })
const tokens = Array.from({ length: 2 }, (_, b) => Array.from({ length: 24 }, (_, i) => (i * 37 + b * 5 + 11) % 300))
const everything: LoraOptions = {
  rank: 3,
  alpha: 5,
  targets: ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'],
  alsoTrain: ['embed', 'norm'],
}

const text = ({ data }: { data: ArrayBufferView }): string =>
  Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString('base64')

/** All that an adapter has, and the base, bit by bit. */
async function bitsOf(model: Llama): Promise<{ adapter: Map<string, string>; base: Map<string, string> }> {
  const read = async (names: string[]) =>
    new Map(await Promise.all(names.map(async (name) => [name, text(await model.read(name))] as const)))
  return {
    adapter: await read(Array.from(model.lora?.parameters ?? [], ({ name }) => name)),
    base: await read(model.parameters().map(({ name }) => name)),
  }
}

interface Case {
  device: string
  name: string
  lora: LoraOptions
}

async function train({ device, name, lora }: Case, memory: MemoryOptions, more: TrainerOptions = {}) {
  using model = await load(name, device)
  const before = await bitsOf(model)
  const options = { learningRate: 1e-2, warmupSteps: 0, context: 24, batchSize: 2, seed: 4, lora, memory, ...more }
  using trainer = new Trainer(model, options)
  const losses: number[] = []
  const norms: number[] = []
  for (let step = 0; step < 3; step++) {
    const { loss, gradNorm, skipped } = await trainer.step(tokens)
    if (skipped) throw new Error('a step was skipped')
    losses.push(loss)
    norms.push(gradNorm)
  }
  const plan = trainer.plan()
  const { allocatedBytes, mappedBytes, hostBytes } = model.device
  const mapped = mappedBytes > 0 ? model.weights.elements * 4 : 0
  t.equal(allocatedBytes + mapped, plan.totalBytes, `planned is allocated: ${name} ${JSON.stringify(memory)}`)
  t.equal(hostBytes, plan.hostBytes)
  return { before: before.base, after: await bitsOf(model), losses, norms, mapped: mappedBytes > 0 }
}

const SAME: MemoryOptions[] = [
  { checkpointLayers: 1 },
  { checkpointLayers: 2 },
  { checkpointLayers: 1, keepAttention: true, offloadCheckpoints: true },
  { offloadOptimizer: true },
  { gradients: 'fused' },
  { gradients: 'fused', checkpointLayers: 1, offloadCheckpoints: true },
]
const CLOSE: MemoryOptions[] = [
  { mlpRows: 7 },
  { mlpRows: 16, checkpointLayers: 1, logitsRows: 9, gradients: 'fused' },
  { moments: '8bit', checkpointLayers: 1 },
  { moments: 'bfloat16' },
  { gradients: 'bfloat16' },
]
const cases: Case[] = [
  { device: 'cpu', name: 'gqa-linear4-f32', lora: {} },
  { device: 'cpu', name: 'gqa-linear4-f32', lora: everything },
  { device: 'cpu', name: 'mha-bf16', lora: { ...everything, alsoTrain: ['norm', 'head'] } },
  { device: 'cpu', name: 'sharded-tied-linear8', lora: { targets: ['gate_proj', 'down_proj'], alsoTrain: ['embed'] } },
]
if (onSimt) {
  cases.push(
    { device: 'simt', name: 'mha-bf16', lora: everything },
    { device: 'simt', name: 'gqa-linear4-f32', lora: {} },
  )
}

for (const one of cases) {
  const { device, name, lora } = one
  t.test(`${name} on ${device}, ${JSON.stringify(lora)}`, async (t) => {
    const plain = await train(one, {})
    const { before, after, losses } = plain
    for (const [key, bits] of before) {
      const part = /norm/.test(key)
        ? 'norm'
        : /embed/.test(key)
          ? 'embed'
          : key === 'lm_head.weight'
            ? 'head'
            : undefined
      const trains = part !== undefined && lora.alsoTrain?.includes(part) === true
      t.equal(after.base.get(key) !== bits, trains, `${key} ${trains ? 'is trained' : 'is untouched'}`)
    }
    t.ok(losses[2]! < losses[0]!, 'it learns')
    t.equal(plain.mapped, device === 'cpu' && !lora.alsoTrain, 'in its files')
    for (const memory of SAME) {
      const other = await train(one, memory)
      t.strictSame(other.losses, losses, `losses: ${JSON.stringify(memory)}`)
      t.strictSame(other.after, after, `adapter and base: ${JSON.stringify(memory)}`)
      t.ok(Math.abs(other.norms[2]! / plain.norms[2]! - 1) < 1e-6, 'and the norm, added up in another order')
    }
    for (const memory of CLOSE) {
      const other = await train(one, memory)
      t.ok(
        Math.abs(other.losses[2]! / losses[2]! - 1) < 2e-2,
        `${other.losses[2]} ${losses[2]}: ${JSON.stringify(memory)}`,
      )
    }
  })
}

t.test('gradients of A and B are the projections of the dense ones', async (t) => {
  using model = await load()
  using trainer = new Trainer(model, { learningRate: 5e-2, warmupSteps: 0, lora: everything })
  for (let step = 0; step < 3; step++) await trainer.step(tokens)
  const low = await model.gradients(tokens)
  const at = async (name: string) => (await model.read(name)) as { dims: readonly number[]; data: Float32Array }
  const names = model
    .parameters()
    .map(({ name }) => name)
    .filter((name) => /_proj/.test(name))
  const factors = new Map<string, { a: Float32Array; b: Float32Array }>()
  for (const name of names) {
    const [a, b] = await Promise.all(['A', 'B'].map((side) => at(name.replace('weight', `lora_${side}.weight`))))
    factors.set(name, { a: a!.data, b: b!.data })
  }
  // W' = W + s B A has the gradient G: that of B is s G A^T, that of A s B^T G.
  await model.merge()
  const dense = await model.gradients(tokens)
  const [rank, scale] = [3, 5 / 3]
  for (const name of names) {
    const { dims, data: g } = dense.get(name)!
    const [rows, columns] = dims as [number, number]
    const { a, b } = factors.get(name)!
    const da = new Float64Array(rank * columns)
    const db = new Float64Array(rows * rank)
    for (let o = 0; o < rows; o++) {
      for (let i = 0; i < columns; i++) {
        for (let r = 0; r < rank; r++) {
          da[r * columns + i]! += scale * b[o * rank + r]! * g[o * columns + i]!
          db[o * rank + r]! += scale * g[o * columns + i]! * a[r * columns + i]!
        }
      }
    }
    for (const [side, want] of Object.entries({ A: da, B: db })) {
      const off = relativeError(low.get(name.replace('weight', `lora_${side}.weight`))!.data, want)
      t.ok(off < 1e-5, `${name}, ${side}: off by ${off}`)
    }
  }
})

t.test('what is planned is for the adapter alone', async (t) => {
  t.ok(Device.open('dry').dry)
  using model = await load('gqa-linear4-f32', 'dry')
  const plan = (options: TrainerOptions) => new Trainer(model, { context: 24, ...options }).plan()
  const full = plan({})
  const lora = plan({ lora: { rank: 8 } })
  // r (I + O) of q, k, v and o in each of two layers: every matrix is a multiple of 256 as it is, or padded to one
  const elements = 2 * 8 * (32 + 32 + 32 + 32 + 4 * 32)
  t.equal(lora.gradientBytes, 4 * elements)
  t.ok(lora.optimizerBytes - 8 * elements >= 0 && lora.optimizerBytes - 8 * elements < 64, 'moments, and a few scalars')
  t.equal(lora.weightsBytes, full.weightsBytes + 4 * elements)
  t.equal(lora.checkpointBytes, 4 * elements + lora.optimizerBytes)
  t.ok(lora.flopsPerStep < 0.8 * full.flopsPerStep, 'no gradients of the base')
  const more = plan({ lora: { rank: 8, alsoTrain: ['embed'] } })
  t.equal(more.gradientBytes, lora.gradientBytes + 4 * 400 * 32)
  t.equal(plan({ lora: { rank: 8 }, memory: { gradients: 'fused' } }).gradientBytes, 0)
})

t.test('what is not possible is refused', async (t) => {
  using model = await load()
  const bad: [unknown, string, RegExp][] = [
    [5, 'TypeError', /lora is 5, but must be an object/],
    [[], 'TypeError', /lora is \[\], but must be an object/],
    [{ rnk: 5 }, 'TypeError', /unknown option "lora.rnk"; did you mean "rank"\?/],
    [{ dropout: 0.1 }, 'TypeError', /unknown option "lora.dropout"; known are rank, alpha, targets, alsoTrain/],
    [{ rank: 0 }, 'RangeError', /lora.rank is 0, but must be a whole number >= 1/],
    [{ rank: '8' }, 'TypeError', /lora.rank is "8", but must be a number/],
    [
      { rank: 17 },
      'RangeError',
      /lora.rank is 17, but model.layers.0.self_attn.k_proj.weight is \(16,32\): .* above 16/,
    ],
    [{ alpha: 0 }, 'RangeError', /lora.alpha is 0, but must be a finite number > 0/],
    [{ alpha: -1 }, 'RangeError', /lora.alpha is -1/],
    [{ alpha: Infinity }, 'RangeError', /lora.alpha is Infinity/],
    [{ targets: ['q_prj'] }, 'RangeError', /lora.targets has "q_prj"; did you mean "q_proj"\?/],
    [{ targets: ['lm_head'] }, 'RangeError', /lora.targets has "lm_head", but known are q_proj, k_proj/],
    [{ targets: [] }, 'RangeError', /lora.targets is an empty list/],
    [{ targets: 'q_proj' }, 'TypeError', /lora.targets is "q_proj", but must be a list/],
    [{ alsoTrain: ['norms'] }, 'RangeError', /lora.alsoTrain has "norms"; did you mean "norm"\?/],
  ]
  for (const [lora, name, message] of bad) t.throws(() => new Trainer(model, { lora } as never), { name, message })
  t.ok(new Trainer(model, { lora: { rank: 16, targets: ['k_proj'] } }))
  using tied = await load('sharded-tied-linear8')
  t.throws(() => new Trainer(tied, { lora: { alsoTrain: ['head'] } }), {
    message: /output matrix is its embedding: use 'embed'/,
  })

  using first = new Trainer(model, { lora: { rank: 2 }, learningRate: 1e-3 })
  using second = new Trainer(model, {})
  await first.step(tokens)
  t.throws(() => new Trainer(model, {}), {
    name: 'RangeError',
    message: /has an adapter .*"rank":2.* but the option lora is not/,
  })
  t.throws(() => new Trainer(model, { lora: { rank: 3 } }), {
    message: /but the option lora is .*"rank":3.*lora: model.adapter/,
  })
  await t.rejects(second.step(tokens), { message: /has an adapter/ })
  using third = new Trainer(model, { lora: model.adapter! })
  await third.step(tokens)
  await model.merge()
  await t.rejects(first.step(tokens), { message: /adapter was merged or added since this trainer began/ })
  using fourth = new Trainer(model, {})
  await fourth.step(tokens)
  using fifth = new Trainer(model, { lora: {} })
  await fifth.step(tokens)
  await t.rejects(fourth.step(tokens), { message: /adapter was merged or added/ })
})

t.test('weights that are written while an adapter is trained are those that count', async (t) => {
  const losses: number[] = []
  for (const early of [true, false]) {
    using model = await load()
    using trainer = new Trainer(model, { lora: {}, learningRate: 0 })
    const name = 'model.layers.0.mlp.up_proj.weight'
    const change = async () => {
      const weight = await model.read(name)
      await model.write(name, { ...weight, data: (weight.data as Float32Array).map((x) => 1.5 * x) })
    }
    if (early) await change()
    else await trainer.step(tokens)
    if (!early) await change()
    losses.push((await trainer.step(tokens)).loss)
  }
  t.equal(losses[0], losses[1])
})

t.test('an adapter is resumed on its own base only', async (t) => {
  const data = join(dir, 'data.txt')
  fs.writeFileSync(data, 'the rope was laid along the walk and every strand of it was stretched. '.repeat(20))
  const output = join(dir, 'run')
  const options: TrainerOptions = {
    ...{ data, context: 16, steps: 2, output, cacheDir: join(dir, 'cache'), saveEvery: 1, lora: { rank: 2 } },
  }
  const run = async (model: Llama, more: TrainerOptions) => {
    using trainer = new Trainer(model, { ...options, ...more })
    for await (const _ of trainer.run()) void _
    return trainer.state.step
  }
  {
    using model = await load()
    t.equal(await run(model, {}), 2)
  }
  const checkpoint = join(output, 'checkpoint-000002')
  t.strictSame(fs.readdirSync(checkpoint).sort(), [
    ...['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'checksums.json', 'config.json'],
    ...['trainer.json', 'trainer.safetensors'],
  ])
  // A checkpoint is an adapter.
  using loaded = await Llama.load(join(fixtures, 'gqa-linear4-f32'), { device: 'cpu', adapter: checkpoint })
  t.match(loaded.adapter, { rank: 2 })
  t.equal(await run(loaded, { resume: true, steps: 3 }), 3, 'also with its adapter loaded')
  using other = await load()
  const weight = await other.read('model.layers.1.mlp.up_proj.weight')
  weight.data[7]! += 1
  await other.write('model.layers.1.mlp.up_proj.weight', weight)
  await t.rejects(run(other, { resume: true, steps: 4 }), {
    code: 'ERR_RESUME',
    message: /the model's frozenWeights was/,
  })
  t.equal(other.adapter, undefined)
  using model = await load()
  await t.rejects(run(model, { resume: true, steps: 4, lora: { rank: 3 } }), {
    code: 'ERR_RESUME',
    message: /option lora was/,
  })
  await t.rejects(run(model, { resume: true, steps: 4, lora: undefined } as never), { code: 'ERR_RESUME' })
  t.equal(await run(model, { resume: true, steps: 4 }), 4)
})
