// Training asks the planner first: what cannot fit is refused before anything is allocated, with what would.
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { Llama } from '../../lib/model/llama.js'
import { native } from '../../lib/runtime/native.js'
import { formatMemory } from '../../lib/train/admit.js'
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js'

const config = {
  ...{ model_type: 'llama', hidden_size: 48, intermediate_size: 88, num_hidden_layers: 4, num_attention_heads: 6 },
  ...{ num_key_value_heads: 3, vocab_size: 211, max_position_embeddings: 512, tie_word_embeddings: false },
}
const tokens = Array.from({ length: 2 }, (_, b) => Array.from({ length: 256 }, (_, i) => (i * 7 + b * 31) % 211))
const options: TrainerOptions = { context: 256, batchSize: 2, learningRate: 1e-3, warmupSteps: 0 }
const create = (device = 'cpu') => Llama.create(config, { device, seed: 3 })

/** What the process may have, until the test ends. */
function allow(t: { teardown(done: () => void): void }, bytes: number | undefined): void {
  t.teardown(() => void delete process.env['ROPEWALK_MEMORY'])
  if (bytes === undefined) delete process.env['ROPEWALK_MEMORY']
  else process.env['ROPEWALK_MEMORY'] = String(bytes)
}

async function bits(model: Llama): Promise<string> {
  const parts: string[] = []
  for (const { name } of model.parameters())
    parts.push(Buffer.from((await model.read(name)).data.buffer).toString('hex'))
  return parts.join()
}

t.test('what cannot fit is refused with the table and the smallest change', async (t) => {
  using model = await create()
  using trainer = new Trainer(model, options)
  const { totalBytes, weightsBytes } = trainer.plan()
  // The model's own memory is there already.
  allow(t, totalBytes - weightsBytes - 1)
  const refused = await trainer.step(tokens).then(
    () => undefined,
    (error: Error & { code: string }) => error,
  )
  t.equal(refused?.code, 'ERR_OUT_OF_MEMORY')
  t.match(
    refused?.message,
    /^training on 2 x 256 tokens needs [\d.]+ MB \(weights .* MB, gradients .* MB, optimizer .* MB, activations .*batch .*\), but cpu has [\d.]+ MB for it\. What fits: memory: \{ .*exact.*ropewalk plan --fit/,
  )
  t.equal(model.device.allocatedBytes, weightsBytes, 'nothing was allocated')
  t.equal(model.device.peakAllocatedBytes, weightsBytes)
  allow(t, totalBytes - weightsBytes)
  t.ok((await trainer.step(tokens)).loss > 0, 'and the same trainer goes on where there is room')
})

t.test('shapes that come later are asked about too', async (t) => {
  using model = await create()
  using trainer = new Trainer(model, options)
  await trainer.step(tokens.map((row) => row.slice(0, 16)))
  const before = await bits(model)
  allow(t, 1000)
  await t.rejects(trainer.step(tokens), { code: 'ERR_OUT_OF_MEMORY' })
  t.equal(await bits(model), before, 'no step was taken')
  t.equal(trainer.state.step, 1)
  allow(t, undefined)
  t.equal((await trainer.step(tokens)).step, 2)
})

t.test('where nothing fits, the nearest that does, and nothing is written', async (t) => {
  const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-admit-'))
  t.teardown(() => fs.rmSync(dir, { recursive: true }))
  using model = await create()
  const output = join(dir, 'run')
  using trainer = new Trainer(model, { ...options, output })
  const { bytes } = { bytes: trainer.plan() }
  allow(t, bytes.optimizerBytes + bytes.gradientBytes + 300_000)
  await t.rejects(trainer.step(tokens), {
    code: 'ERR_OUT_OF_MEMORY',
    message:
      /(What fits|The leanest set, memory: .* is still .* too large\. The nearest that fits: context \d+, batchSize 1)/,
  })
  allow(t, 1000)
  await t.rejects(trainer.step(tokens), { message: /too large, whatever the context is: only training on one device/ })
  t.notOk(fs.existsSync(output))
})

t.test("memory: 'auto' is the first exact set that fits, with the same results", async (t) => {
  using plain = await create()
  using all = new Trainer(plain, options)
  const { loss } = await all.step(tokens)
  using model = await create()
  using trainer = new Trainer(model, { ...options, memory: 'auto' })
  const { totalBytes, weightsBytes } = all.plan()
  allow(t, Math.floor(0.75 * (totalBytes - weightsBytes)))
  const chosen = trainer.plan()
  t.ok(chosen.totalBytes < 0.85 * totalBytes, `${chosen.totalBytes} of ${totalBytes}`)
  t.equal((await trainer.step(tokens)).loss, loss)
  t.equal(model.device.allocatedBytes, chosen.totalBytes)
  t.equal(await bits(model), await bits(plain))
  using other = await create()
  using none = new Trainer(other, { ...options, memory: 'auto' })
  allow(t, 1000)
  await t.rejects(none.step(tokens), { code: 'ERR_OUT_OF_MEMORY' })
})

t.test('a run that found its memory itself goes on with the same', async (t) => {
  const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-admit-'))
  t.teardown(() => fs.rmSync(dir, { recursive: true }))
  const auto: TrainerOptions = { ...options, output: join(dir, 'run'), memory: 'auto' }
  const run = async (stops: boolean): Promise<string> => {
    let model = await create()
    let trainer = new Trainer(model, stops ? auto : { ...options })
    const { totalBytes, weightsBytes } = new Trainer(model, options).plan()
    allow(t, Math.floor(0.75 * (totalBytes - weightsBytes)))
    if (!stops) allow(t, undefined)
    await trainer.step(tokens)
    if (stops) {
      const path = await trainer.save()
      trainer.dispose()
      model.dispose()
      // There is room for all now; what the run began with stays.
      allow(t, undefined)
      model = await Llama.load(path, { device: 'cpu' })
      trainer = new Trainer(model, { ...auto, resume: true })
    }
    await trainer.step(tokens)
    const result = await bits(model)
    trainer.dispose()
    model.dispose()
    return result
  }
  t.equal(await run(true), await run(false))
})

// ---- pinned memory ----

const simt = process.env['ROPEWALK_SIMT_LIBRARY'] !== undefined
for (const device of simt ? ['cpu', 'simt'] : ['cpu']) {
  t.test(`host memory that cannot be pinned is a warning, and the run goes on: ${device}`, async (t) => {
    const memory = { checkpointLayers: 1, offloadCheckpoints: true, offloadOptimizer: true } as const
    const short = tokens.map((row) => row.slice(0, 16))
    const run = async (): Promise<{ result: string; warnings: string[]; host: number; bytes: number }> => {
      using model = await create(device)
      using trainer = new Trainer(model, { ...options, memory })
      await trainer.step(short)
      const { hostBytes: host, allocatedBytes: bytes } = model.device
      return { result: await bits(model), warnings: trainer.warnings, host, bytes }
    }
    const pinned = await run()
    t.strictSame(pinned.warnings, [])
    const addon = native()
    const { alloc } = addon
    t.teardown(() => (addon.alloc = alloc))
    addon.alloc = (id, bytes, host) => {
      if (host) throw new Error(`out of host memory: ${bytes} were to be pinned`)
      return alloc(id, bytes, host)
    }
    const refused = await run()
    t.match(refused.warnings, [
      /^optimizer states: out of host memory: \d+ were to be pinned: they stay on the device, which needs .* more$/,
      /^activations of 2 x 16 tokens, checkpoints: out of host memory: .* they stay on the device/,
    ])
    t.equal(refused.result, pinned.result, 'with the same results')
    t.strictSame([refused.host, refused.bytes], [0, pinned.bytes + pinned.host])
  })
}

t.test('options as they are written in a program', async (t) => {
  t.equal(formatMemory({ checkpointLayers: 1, moments: '8bit' }), "{ checkpointLayers: 1, moments: '8bit' }")
  t.equal(formatMemory({}), '{}')
})
