import { existsSync } from 'node:fs'
import t, { type Test } from 'tap'
import { Llama } from '../../lib/model/llama.js'
import { plan } from '../../lib/train/planner.js'
import { readRequest } from '../../lib/train/request.js'
import { savings } from '../../lib/train/savings.js'
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js'

const library = process.env['ROPEWALK_SIMT_LIBRARY'] ?? ''
const noSimt = { skip: !existsSync(library) && 'skipped: ROPEWALK_SIMT_LIBRARY names no library' }

const CONFIG = {
  model_type: 'llama',
  hidden_size: 64,
  intermediate_size: 176,
  num_hidden_layers: 4,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  vocab_size: 300,
  max_position_embeddings: 4096,
}

t.test('what an option frees is the difference of two plans', async (t) => {
  for (const [request, offered] of [
    [{ memory: {} }, 'checkpointLayers gradients masters mlpRows moments offloadOptimizer'],
    [
      { memory: { checkpointLayers: 1, moments: '8bit' }, accumulate: 2 },
      'gradients masters mlpRows offloadCheckpoints offloadOptimizer',
    ],
    [{ memory: { moments: 'bfloat16' }, dtype: 'float32' }, 'checkpointLayers gradients mlpRows offloadOptimizer'],
  ] as const) {
    const given = { model: CONFIG, context: 2048, limit: '1g', ...request }
    const planning = await readRequest(given)
    const found = savings(planning, planning.settings.memory)
    const now = (await plan(given)).requiredBytes
    for (const { memory, bytes } of found) {
      const leaner = await plan({ ...given, memory: { ...given.memory, ...memory } })
      t.equal(bytes, now - leaner.requiredBytes, JSON.stringify(memory))
      t.ok(bytes > 0)
    }
    t.equal(
      found
        .map(({ memory }) => Object.keys(memory).join())
        .sort()
        .join(' '),
      offered,
    )
    const sizes = found.map(({ bytes }) => bytes)
    t.strictSame(
      sizes,
      [...sizes].sort((a, b) => b - a),
      'most first',
    )
  }
})

/** The error of a step of 1 x 2048 tokens on an emulated GPU with so much memory. */
async function failure(t: Test, bytes: number, lie: boolean, options: TrainerOptions = {}): Promise<Error> {
  const before = process.env['ROPEWALK_SIMT_MACHINE']
  process.env['ROPEWALK_SIMT_MACHINE'] = `memory=${bytes}`
  t.teardown(() => {
    if (before === undefined) delete process.env['ROPEWALK_SIMT_MACHINE']
    else process.env['ROPEWALK_SIMT_MACHINE'] = before
  })
  using model = await Llama.create(CONFIG, { device: 'simt', dtype: 'bfloat16', seed: 1 })
  // others take the memory after the step was admitted
  if (lie) model.device.memory = () => ({ freeBytes: 1e12, totalBytes: 1e12 })
  using trainer = new Trainer(model, options)
  const tokens = [Array.from({ length: 2048 }, (_, i) => i % 300)]
  try {
    await trainer.step(tokens)
  } catch (error) {
    return error as Error
  }
  throw new Error('it fitted')
}

const LIST =
  /\. Of memory's options, each alone: checkpointLayers: 1 frees [\d.]+ MB, .*moments: '8bit' frees [\d.]+ MB/

t.test('out of memory: asked for, free, and what each option frees', noSimt, async (t) => {
  const refused = await failure(t, 45_000_000, false)
  t.match(refused, { code: 'ERR_OUT_OF_MEMORY', message: /^training on 1 x 2048 tokens needs .* but simt has / })
  t.match(refused.message, LIST)
  const late = await failure(t, 45_000_000, true)
  t.match(late, {
    code: 'ERR_OUT_OF_MEMORY',
    message:
      /^activations of 1 x 2048 tokens: simt could not allocate \d+ bytes .*out of memory: [\d.]+ MiB were asked for, [\d.]+ MiB of 42\.9 MiB are free\. Use a shorter context/,
  })
  t.match(late.message, LIST)
  const states = await failure(t, 36_500_000, true)
  t.match(states.message, /^(optimizer states|gradients|weights).*could not allocate/)
  t.match(states.message, LIST)
})
