// Every choice of what a step keeps computes the same step. Where nothing is rounded in another order, to the bit.
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { Corpus, Dice } from '../../lib/demo/data.js'
import { BASE } from '../../lib/demo/demo.js'
import { mean } from '../../lib/demo/measure.js'
import { loadTokenizer } from '../../lib/files/tokenizer.js'
import { readBatch } from '../../lib/model/batch.js'
import { Llama } from '../../lib/model/llama.js'
import { Device } from '../../lib/runtime/device.js'
import type { MemoryOptions } from '../../lib/train/memory.js'
import { AdamW } from '../../lib/train/optimizer.js'
import { readOptions } from '../../lib/train/options.js'
import { TrainingPasses } from '../../lib/train/passes.js'
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js'

const onSimt = process.env['ROPEWALK_SIMT_LIBRARY'] !== undefined

/** Grouped heads, three layers, sizes that are no multiples of anything. */
const CONFIG = {
  model_type: 'llama',
  hidden_size: 48,
  intermediate_size: 88,
  num_hidden_layers: 3,
  num_attention_heads: 6,
  num_key_value_heads: 3,
  vocab_size: 211,
  max_position_embeddings: 64,
  tie_word_embeddings: false,
}

interface Case {
  device: string
  dtype: 'float32' | 'bfloat16'
  tied: boolean
}

const batches = Array.from({ length: 3 }, (_, step) =>
  Array.from({ length: 2 }, (_, b) => Array.from({ length: 40 }, (_, i) => (i * (7 + step) + b * 31 + 5) % 211)),
)

interface Outcome {
  losses: number[]
  norms: number[]
  weights: Map<string, Float64Array>
  bits: string
}

async function train(
  { device, dtype, tied }: Case,
  memory: MemoryOptions,
  more: TrainerOptions = {},
): Promise<Outcome> {
  const config = { ...CONFIG, tie_word_embeddings: tied }
  using model = await Llama.create(config, { device, dtype, seed: 3 })
  using trainer = new Trainer(model, { learningRate: 3e-3, warmupSteps: 0, context: 40, batchSize: 2, memory, ...more })
  const losses: number[] = []
  const norms: number[] = []
  for (const batch of batches) {
    const { loss, gradNorm, skipped } = await trainer.step(batch)
    if (skipped) throw new Error('a step was skipped')
    losses.push(loss)
    norms.push(gradNorm)
  }
  const { totalBytes, hostBytes } = trainer.plan()
  t.equal(model.device.allocatedBytes, totalBytes, `planned is allocated: ${device} ${dtype} ${JSON.stringify(memory)}`)
  t.equal(model.device.hostBytes, hostBytes, 'on the host too')
  const weights = new Map<string, Float64Array>()
  const hash: string[] = []
  for (const { name } of model.parameters()) {
    const { data } = await model.read(name)
    hash.push(Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString('base64'))
    weights.set(
      name,
      Float64Array.from(data, (x) => (dtype === 'float32' ? x : bf16(x))),
    )
  }
  return { losses, norms, weights, bits: hash.join() }
}

const bf16 = (bits: number): number => new Float32Array(Uint32Array.of(bits << 16).buffer)[0]!

/** Largest difference of weights over the largest change of a weight in these steps. */
function difference(a: Outcome, b: Outcome): number {
  let worst = 0
  for (const [name, values] of a.weights) {
    const other = b.weights.get(name)!
    values.forEach((x, i) => (worst = Math.max(worst, Math.abs(x - other[i]!))))
  }
  return worst / (3 * 3e-3)
}

const SAME: MemoryOptions[] = [
  { checkpointLayers: 1 },
  { checkpointLayers: 2 },
  { checkpointLayers: 3 },
  { checkpointLayers: 1, keepAttention: true },
  { checkpointLayers: 2, keepAttention: true },
  { checkpointLayers: 1, offloadCheckpoints: true },
  { checkpointLayers: 2, offloadCheckpoints: true, keepAttention: true },
  { attentionGroups: 3 },
  { offloadOptimizer: true },
  { masters: 'remainder' },
  { gradients: 'fused' },
  { gradients: 'fused', checkpointLayers: 1, offloadCheckpoints: true },
]
// Sums over rows are added up in other parts: gradients differ by some units in the last place, and Adam's first updates,
// of one size whatever the gradient, make of that what they will: the bound is for the mean effect of such noise.
const CLOSE: MemoryOptions[] = [
  { mlpRows: 32 },
  { mlpRows: 7, checkpointLayers: 1 },
  { logitsRows: 9 },
  { checkpointLayers: 1, mlpRows: 16, logitsRows: 16, gradients: 'fused', offloadCheckpoints: true },
]

const cases: Case[] = [
  { device: 'cpu', dtype: 'float32', tied: false },
  { device: 'cpu', dtype: 'float32', tied: true },
  { device: 'cpu', dtype: 'bfloat16', tied: false },
]
if (onSimt)
  cases.push({ device: 'simt', dtype: 'bfloat16', tied: true }, { device: 'simt', dtype: 'float32', tied: false })

for (const one of cases) {
  const label = `${one.device} ${one.dtype}${one.tied ? ', tied' : ''}`
  // The emulator takes a second for each: there the last ones, which do most at a time.
  const some = (all: MemoryOptions[], count: number) => (one.device === 'simt' ? all.slice(-count) : all)
  t.test(`the same bits: ${label}`, async (t) => {
    const plain = await train(one, {})
    const possible = SAME.filter(({ masters }) => one.dtype === 'bfloat16' || masters === undefined)
    for (const memory of some(possible, 4)) {
      const outcome = await train(one, memory)
      t.strictSame(outcome.losses, plain.losses, `losses: ${JSON.stringify(memory)}`)
      t.ok(outcome.bits === plain.bits, `weights: ${JSON.stringify(memory)}`)
      t.ok(Math.abs(outcome.norms[2]! / plain.norms[2]! - 1) < 1e-6, 'and the norm, added up in another order')
    }
    t.ok((await train(one, {}, { learningRate: 3.001e-3 })).bits !== plain.bits, 'the comparison sees a difference')
  })
  t.test(`another order of sums: ${label}`, async (t) => {
    const plain = await train(one, {})
    for (const memory of some(CLOSE, 1)) {
      const outcome = await train(one, memory)
      outcome.losses.forEach((loss, i) => {
        t.ok(
          Math.abs(loss / plain.losses[i]! - 1) < (one.dtype === 'float32' ? 1e-5 : 2e-3),
          `loss ${i}: ${loss} ${plain.losses[i]}`,
        )
      })
      t.ok(difference(outcome, plain) < 1, `weights are off by ${difference(outcome, plain)} of an update`)
    }
  })
}

// ---- several micro-batches in a step ----

/** Weights after two steps of three micro-batches. */
async function accumulated({ device, dtype, tied }: Case, memory: MemoryOptions): Promise<string> {
  using model = await Llama.create({ ...CONFIG, tie_word_embeddings: tied }, { device, dtype, seed: 3 })
  const settings = readOptions({ accumulate: 3, memory })
  const optimizer = new AdamW(model.weights.segments(), settings)
  await optimizer.reset()
  const passes = new TrainingPasses(model.config, model.weights, optimizer, 2, 40, 3, false, settings.memory)
  const micro = batches.map((batch) => readBatch(batch, model.config))
  for (const rate of [3e-3, 2e-3]) if (!(await passes.step(micro, rate)).applied) throw new Error('it was skipped')
  const parts: string[] = []
  for (const { name } of model.parameters())
    parts.push(Buffer.from((await model.read(name)).data.buffer).toString('hex'))
  passes.dispose()
  optimizer.dispose()
  return parts.join()
}

for (const one of cases) {
  t.test(`the same bits with accumulation: ${one.device} ${one.dtype}${one.tied ? ', tied' : ''}`, async (t) => {
    const plain = await accumulated(one, {})
    const held = SAME.filter(({ gradients }) => gradients !== 'fused')
    for (const memory of one.device === 'simt' ? held.slice(5, 7) : held) {
      t.ok((await accumulated(one, memory)) === plain, JSON.stringify(memory))
    }
    t.ok((await accumulated(one, { moments: '8bit' })) !== plain, 'the comparison sees a difference')
  })
}

// ---- states that are rounded ----

const ROUNDED: MemoryOptions[] = [
  { moments: 'bfloat16' },
  { moments: '8bit' },
  { masters: 'stochastic' },
  { masters: 'stochastic', moments: '8bit', gradients: 'fused' },
  { masters: 'remainder', moments: '8bit', gradients: 'bfloat16' },
]

for (const one of cases.filter(({ dtype }) => dtype === 'bfloat16')) {
  t.test(`rounded states stay near, and the same from run to run: ${one.device}`, async (t) => {
    const plain = await train(one, {})
    for (const memory of one.device === 'simt' ? ROUNDED.slice(-2) : ROUNDED) {
      const outcome = await train(one, memory)
      // a bfloat16 weight of this model has a unit of up to 2^-9, of the same size as an update: the losses tell more
      outcome.losses.forEach((loss, i) => {
        t.ok(
          Math.abs(loss / plain.losses[i]! - 1) < 3e-3,
          `${JSON.stringify(memory)}: loss ${i}: ${loss}, ${plain.losses[i]}`,
        )
      })
      t.ok(outcome.bits !== plain.bits, 'rounding makes a difference')
      t.ok((await train(one, memory)).bits === outcome.bits, 'the same twice')
    }
  })
}

// Over 1,000 steps it was measured by hand (bench/LOG.md).
t.test("8-bit moments: the demo model's loss stays within 1 % of that with float32 ones", async (t) => {
  const config = JSON.parse(fs.readFileSync(join(BASE, 'config.json'), 'utf8')) as Record<string, unknown>
  const corpus = new Corpus(await loadTokenizer(BASE))
  const texts = { people: [1, 2], passkeys: 0, refrains: 0.5 } as const
  const steps = 200
  const run = async (memory: MemoryOptions): Promise<{ last: number; unseen: number; first: number }> => {
    using model = await Llama.create(config, { device: 'cpu', seed: 1 })
    using trainer = new Trainer(model, { learningRate: 1e-3, warmupSteps: 20, steps, schedule: 'cosine', memory })
    const dice = new Dice(101)
    const batch = () => Array.from({ length: 8 }, () => corpus.window(dice, 32, texts))
    const losses: number[] = []
    while (losses.length < steps) losses.push((await trainer.step(batch())).loss)
    return { first: losses[0]!, last: mean(losses.slice(-20)), unseen: await model.loss(batch()) }
  }
  const [exact, narrow] = [await run({}), await run({ moments: '8bit' })]
  t.ok(exact.last < 0.75 * exact.first, `it learns: ${exact.first} to ${exact.last}`)
  for (const name of ['last', 'unseen'] as const) {
    const off = narrow[name] / exact[name] - 1
    t.ok(Math.abs(off) < 0.01 && off !== 0, `${name}: ${narrow[name]}, ${exact[name]}: ${(100 * off).toFixed(2)} %`)
  }
})

t.test('a resumed run ends with the same bits, whatever is kept and how', async (t) => {
  const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-memory-'))
  t.teardown(() => fs.rmSync(dir, { recursive: true }))
  const settings: [Case['dtype'], MemoryOptions][] = [
    ['float32', { moments: '8bit' }],
    ['float32', { gradients: 'fused', checkpointLayers: 2 }],
    ['bfloat16', { masters: 'remainder', moments: '8bit' }],
    ['bfloat16', { masters: 'stochastic', moments: 'bfloat16', gradients: 'fused', offloadOptimizer: true }],
  ]
  for (const [i, [dtype, memory]] of settings.entries()) {
    const run = async (stops: boolean): Promise<string> => {
      const output = join(dir, `${i}${stops}`)
      const options: TrainerOptions = { output, learningRate: 3e-3, warmupSteps: 0, context: 40, batchSize: 2, memory }
      let model = await Llama.create(CONFIG, { device: 'cpu', dtype, seed: 3 })
      let trainer = new Trainer(model, options)
      for (const [step, batch] of batches.entries()) {
        if (stops && step === 2) {
          const path = await trainer.save()
          trainer.dispose()
          model.dispose()
          model = await Llama.load(path, { device: 'cpu', dtype })
          trainer = new Trainer(model, { ...options, resume: true })
        }
        await trainer.step(batch)
      }
      const parts = []
      for (const { name } of model.parameters())
        parts.push(Buffer.from((await model.read(name)).data.buffer).toString('hex'))
      trainer.dispose()
      model.dispose()
      return parts.join()
    }
    t.ok((await run(true)) === (await run(false)), `${dtype} ${JSON.stringify(memory)}`)
  }
  using model = await Llama.load(join(dir, '0true', 'checkpoint-000002'), { device: 'cpu' })
  using other = new Trainer(model, {
    output: join(dir, '0true'),
    resume: true,
    learningRate: 3e-3,
    warmupSteps: 0,
    context: 40,
    batchSize: 2,
  })
  await t.rejects(other.step(batches[0]!), { code: 'ERR_RESUME', message: /memory\.moments was "8bit"/ })
})

t.test('options that cannot be', async (t) => {
  using model = await Llama.create(CONFIG, { device: 'cpu', seed: 3 })
  for (const [options, message] of [
    [{ memory: { moments: '4bit' } }, /^memory\.moments is "4bit", but must be one of float32, bfloat16, 8bit/],
    [{ memory: { checkpointLayer: 1 } }, /^unknown option "memory\.checkpointLayer"; did you mean/],
    [{ memory: 'small' }, /^memory is "small"/],
    [{ memory: { gradients: 'fused' }, accumulate: 2 }, /"fused", but accumulate is 2: .*'bfloat16'/],
    [{ memory: { offloadCheckpoints: true } }, /checkpointLayers is 0: there are no checkpoints/],
    [{ memory: { checkpointLayers: -1 } }, /^memory\.checkpointLayers is -1/],
    [{ memory: { checkpointLayers: 4 } }, /^memory\.checkpointLayers is 4, but the model has 3 layers: .* 1 to 4 need/],
    [
      { memory: { attentionGroups: 2 } },
      /^memory\.attentionGroups is 2, but must divide the model's 3 key\/value heads/,
    ],
  ] as const) {
    t.throws(() => new Trainer(model, options as unknown as TrainerOptions), { message })
  }
})

t.test('less memory is less memory', async (t) => {
  const dry = Device.open('dry')
  t.ok(dry.dry)
  using model = await Llama.create(CONFIG, { device: 'cpu', seed: 3 })
  const plan = (memory: MemoryOptions) => {
    using trainer = new Trainer(model, { context: 64, batchSize: 4, memory })
    return trainer.plan()
  }
  const all = plan({})
  const one = plan({ checkpointLayers: 1 })
  t.ok(one.activationBytes < 0.6 * all.activationBytes, `${one.activationBytes} of ${all.activationBytes}`)
  t.ok(one.flopsPerStep > 1.15 * all.flopsPerStep && one.flopsPerStep < 1.34 * all.flopsPerStep, 'a third of work more')
  const kept = plan({ checkpointLayers: 1, keepAttention: true })
  t.ok(kept.flopsPerStep < one.flopsPerStep && kept.activationBytes > one.activationBytes)
  const tiled = plan({ checkpointLayers: 1, mlpRows: 32 })
  t.ok(tiled.activationBytes < one.activationBytes)
  t.equal(tiled.flopsPerStep, one.flopsPerStep, 'tiles inside of checkpoints cost nothing more')
  // q and k of the last layer to be kept: at the peak the copies of two groups of three are not there
  const whole = plan({ checkpointLayers: 1, mlpRows: 8, logitsRows: 8 })
  const grouped = plan({ checkpointLayers: 1, mlpRows: 8, logitsRows: 8, attentionGroups: 3 })
  t.equal(whole.activationBytes - grouped.activationBytes, (2 / 3) * 4 * 64 * (48 + 24) * 4)
  t.equal(grouped.flopsPerStep, whole.flopsPerStep)
  t.throws(
    () => plan({ attentionGroups: 2 }),
    new RangeError("memory.attentionGroups is 2, but must divide the model's 3 key/value heads"),
  )
  const offloaded = plan({ checkpointLayers: 1, offloadCheckpoints: true })
  t.equal(offloaded.hostBytes, 2 * 4 * 64 * 48 * 4, 'all inputs but the last one')
  t.ok(offloaded.totalBytes < one.totalBytes)
  const fused = plan({ gradients: 'fused' })
  t.ok(fused.gradientBytes < 0.05 * all.gradientBytes)
})
