// Every choice of what a step keeps computes the same step. Where nothing is rounded in another order, to the bit.
import t from 'tap'
import { Llama } from '../../lib/model/llama.js'
import { Device } from '../../lib/runtime/device.js'
import type { MemoryOptions } from '../../lib/train/memory.js'
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
  t.test(`the same bits: ${label}`, async (t) => {
    const plain = await train(one, {})
    for (const memory of SAME) {
      const outcome = await train(one, memory)
      t.strictSame(outcome.losses, plain.losses, `losses: ${JSON.stringify(memory)}`)
      t.ok(outcome.bits === plain.bits, `weights: ${JSON.stringify(memory)}`)
      t.ok(Math.abs(outcome.norms[2]! / plain.norms[2]! - 1) < 1e-6, 'and the norm, added up in another order')
    }
    const accumulated = await train(one, {}, { accumulate: 1, batchSize: 2 })
    t.ok(accumulated.bits === plain.bits, 'the comparison itself')
  })
  t.test(`another order of sums: ${label}`, async (t) => {
    const plain = await train(one, {})
    for (const memory of CLOSE) {
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
