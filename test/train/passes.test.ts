// The gradients themselves, as they lie before the update: what each memory option may change in them, and by how much.
import t from 'tap'
import { readBatch } from '../../lib/model/batch.js'
import { Llama } from '../../lib/model/llama.js'
import { type LoraOptions, readLora } from '../../lib/model/lora.js'
import { fromBfloat16 } from '../../lib/runtime/bfloat16.js'
import type { MemoryOptions } from '../../lib/train/memory.js'
import { AdamW } from '../../lib/train/optimizer.js'
import { readOptions } from '../../lib/train/options.js'
import { TrainingPasses } from '../../lib/train/passes.js'
import { roundBf16 } from '../ops/values.js'

const CONFIG = {
  ...{ model_type: 'llama', hidden_size: 48, intermediate_size: 88, num_hidden_layers: 3, num_attention_heads: 6 },
  ...{ num_key_value_heads: 3, vocab_size: 211, max_position_embeddings: 64, tie_word_embeddings: false },
}
const row = (b: number, length: number): number[] => Array.from({ length }, (_, i) => (i * 37 + b * 31 + 5) % 211)
const rows = (count: number, length: number, from = 0): number[][] =>
  Array.from({ length: count }, (_, b) => row(from + b, length))

interface Case {
  device: string
  dtype: 'float32' | 'bfloat16'
  lora?: LoraOptions
}

type Gradients = Map<string, Float64Array>

/** Gradients of one step over micro-batches of one shape, by name. */
async function gradientsOf(
  { device, dtype, lora }: Case,
  micro: number[][][],
  memory: MemoryOptions,
  only?: number,
): Promise<Gradients> {
  using model = await Llama.create(CONFIG, { device, dtype, seed: 3, threads: 1 })
  if (lora) await model.addAdapter(readLora(lora), 1)
  // B is zero at first, and with it the gradient of A.
  for (const { name, value } of model.lora?.parameters ?? []) {
    const data = Float32Array.from({ length: value.size }, (_, i) => Math.sin(1 + i * 0.7) / 8)
    if (name.includes('lora_B')) await model.write(name, { type: 'float32', dims: [...value.dims], data })
  }
  const settings = readOptions({ accumulate: micro.length, memory })
  const segments = (model.lora ?? model.weights).segments()
  const optimizer = new AdamW(segments, settings)
  await optimizer.reset()
  const shape = [micro[0]!.length, micro[0]![0]!.length, micro.length] as const
  const passes = new TrainingPasses(model.config, model.weights, optimizer, ...shape, false, settings.memory)
  const batches = micro.map((tokens) => {
    // `only`: the one row that is learned
    const labels = tokens.map((ids, b) => ids.map((id) => (only === undefined || b === only ? id : -100)))
    return readBatch(tokens, model.config, { labels })
  })
  if (!(await passes.step(batches, 0)).applied) throw new Error('the step was skipped')
  const found: Gradients = new Map()
  for (const parameter of segments.flatMap(({ parameters }) => parameters)) {
    const gradient = optimizer.gradients.of(parameter)!
    const bytes = (await model.device.download(gradient)).slice()
    const narrow = gradient.dtype === 'bf16'
    found.set(
      parameter.name,
      narrow
        ? Float64Array.from(new Uint16Array(bytes.buffer), fromBfloat16)
        : Float64Array.from(new Float32Array(bytes.buffer)),
    )
  }
  passes.dispose()
  optimizer.dispose()
  return found
}

/** Names of gradients that are not the same to the bit. */
const different = (a: Gradients, b: Gradients): string[] =>
  [...a].filter(([name, values]) => values.some((x, i) => !Object.is(x, b.get(name)![i]))).map(([name]) => name)

const adapter: LoraOptions = { rank: 3, targets: ['q_proj', 'up_proj'], alsoTrain: ['embed', 'norm'] }
const cases: Case[] = [
  { device: 'cpu', dtype: 'float32' },
  { device: 'cpu', dtype: 'bfloat16' },
  { device: 'cpu', dtype: 'float32', lora: adapter },
]
if (process.env['ROPEWALK_SIMT_LIBRARY'] !== undefined) {
  cases.push({ device: 'simt', dtype: 'bfloat16' }, { device: 'simt', dtype: 'float32', lora: adapter })
}

const SAME: MemoryOptions[] = [
  { checkpointLayers: 1 },
  { checkpointLayers: 2 },
  { checkpointLayers: 3, keepAttention: true },
  { checkpointLayers: 1, offloadCheckpoints: true },
  { attentionGroups: 3 },
  { offloadOptimizer: true },
  { masters: 'remainder', moments: '8bit' },
]

for (const one of cases) {
  const label = `${one.dtype} on ${one.device}${one.lora ? ', an adapter' : ''}`
  t.test(`what only keeps less, or elsewhere, changes no bit: ${label}`, async (t) => {
    for (const micro of [[rows(2, 24)], [rows(2, 24), rows(2, 24, 2), rows(2, 24, 4)]]) {
      const plain = await gradientsOf(one, micro, {})
      t.ok(
        [...plain.values()].every((values) => values.some((x) => x !== 0)),
        'gradients of everything',
      )
      for (const memory of one.device === 'simt' ? SAME.slice(2, 4) : SAME) {
        const what = `${micro.length} passes, ${JSON.stringify(memory)}`
        t.strictSame(different(await gradientsOf(one, micro, memory), plain), [], what)
      }
      const other = await gradientsOf(one, [rows(2, 24, 9), ...micro.slice(1)], {})
      t.equal(different(other, plain).length, plain.size, 'the comparison sees a difference')
    }
  })
}

const U = 2 ** -24
/** Its norm is in the tiles too. */
const MLP = /mlp|post_attention_layernorm/

// A row of two tokens has one prediction, that of its first token; nothing depends on its second. So a row adds one product
// to each element of a weight's gradient. A step in which it alone is learned shows that product without any sum, exactly
// as many times as large as there are rows, a power of two. Two orders of adding n products s differ by at most
// 2 gamma(n) sum |s|, gamma(n) = n u / (1 - n u), for n - 1 additions and a rounding of the product (Higham, Accuracy and
// Stability of Numerical Algorithms, 3.1). The CPU multiplies up to 16 rows in another way, which adds up along K in another
// order: tiles are larger there.
for (const one of cases.filter(({ lora }) => !lora)) {
  t.test(`tiles of rows change the order of sums alone: ${one.dtype} on ${one.device}`, async (t) => {
    // The emulator takes seconds where the CPU takes milliseconds.
    const [count, first, half, second, most] = one.device === 'simt' ? [4, 3, 4, 3, 5] : [32, 23, 32, 22, 40]
    const batch = rows(count, 2)
    const plain = await gradientsOf(one, [batch], {})
    const sums: Gradients = new Map([...plain].map(([name, { length }]) => [name, new Float64Array(length)]))
    for (const b of batch.keys()) {
      for (const [name, values] of await gradientsOf(one, [batch], {}, b)) {
        const sum = sums.get(name)!
        values.forEach((x, i) => (sum[i]! += Math.abs(x) / count))
      }
    }
    const n = count + 1
    const gamma = (n * U) / (1 - n * U)
    for (const [memory, tiled] of [
      [{ mlpRows: first }, MLP],
      [{ mlpRows: half, checkpointLayers: 1 }, MLP],
      [{ logitsRows: second }, /lm_head/],
      [{ mlpRows: most, logitsRows: half }, /mlp|post_attention|lm_head/],
    ] as const) {
      const found = await gradientsOf(one, [batch], memory)
      const changed = different(found, plain)
      const what = JSON.stringify(memory)
      t.strictSame(
        changed.filter((name) => !tiled.test(name)),
        [],
        `${what} changes nothing else`,
      )
      // The sums of a few rows on the emulator may come out the same.
      t.ok(changed.length > 0 || one.device === 'simt', `${what} changes ${changed.length}`)
      let worst = 0
      for (const name of changed) {
        found.get(name)!.forEach((x, i) => {
          const bound = 2 * gamma * sums.get(name)![i]!
          const off = Math.abs(x - plain.get(name)![i]!)
          worst = Math.max(worst, off === 0 ? 0 : off / bound)
        })
      }
      t.ok(worst <= 1, `${what}: ${worst} of the bound`)
    }
  })

  t.test(`gradients in bfloat16 are those of float32, rounded once: ${one.dtype} on ${one.device}`, async (t) => {
    const plain = await gradientsOf(one, [rows(2, 24)], {})
    const found = await gradientsOf(one, [rows(2, 24)], { gradients: 'bfloat16' })
    const changed = different(found, plain)
    t.ok(changed.length > 0 && changed.every((name) => /layers\.\d\..*_proj/.test(name)), 'those of matrices of layers')
    for (const name of changed) t.strictSame(found.get(name), plain.get(name)!.map(roundBf16), name)
  })
}
