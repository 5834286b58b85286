import { execFileSync, spawn } from 'node:child_process'
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { Llama } from '../../lib/model/llama.js'
import type { LoadOptions } from '../../lib/model/load.js'
import { checkpointName, findCheckpoint, verifyCheckpoint } from '../../lib/train/checkpoint.js'
import type { MemoryOptions } from '../../lib/train/memory.js'
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js'
import { fixtures } from '../golden.js'

const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-checkpoint-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

const load = (name = 'gqa-linear4-f32', options: LoadOptions = {}) =>
  Llama.load(name.includes('/') ? name : join(fixtures, name), { device: 'cpu', ...options })

const data = join(dir, 'data.jsonl')
const texts = [
  'a short one',
  'the rope was laid along the walk',
  'and every strand of it was stretched until it held',
  'end',
]
fs.writeFileSync(data, texts.map((text) => `${JSON.stringify({ text })}\n`).join(''))
/** The data have 5 windows: 6 steps cross the end of an epoch. */
const base: TrainerOptions = { data, context: 16, steps: 6, learningRate: 1e-3, cacheDir: join(dir, 'cache') }

let serial = 0
const folder = (): string => join(dir, `output-${serial++}`)

/** Sizes and hashes of a checkpoint: weights, moments, masters, counters, place in the data, config, tokenizer. */
const sums = (output: string, step: number): string =>
  fs.readFileSync(join(output, checkpointName(step), 'checksums.json'), 'utf8')

async function train(
  output: string,
  options: TrainerOptions,
  name?: string,
  load_: LoadOptions = {},
): Promise<Trainer> {
  using model = await load(name, load_)
  using trainer = new Trainer(model, { ...base, output, ...options })
  for await (const { skipped } of trainer.run()) if (skipped) throw new Error('a step was skipped')
  return trainer
}

const metricsOf = (output: string): number[] =>
  fs
    .readFileSync(join(output, 'metrics.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .map((line) => (JSON.parse(line) as { step: number }).step)

t.test('resuming changes no bit', async (t) => {
  const lean: MemoryOptions = {
    ...{ checkpointLayers: 1, offloadCheckpoints: true, offloadOptimizer: true, mlpRows: 5, gradients: 'bfloat16' },
    ...{ masters: 'remainder', moments: '8bit' },
  }
  const variants: [string, TrainerOptions, string?, LoadOptions?][] = [
    ['float32', {}],
    ['bfloat16', {}, 'mha-bf16'],
    ['accumulated', { accumulate: 2, batchSize: 3 }],
    ['accumulated, bfloat16', { accumulate: 2, maxGradNorm: 0.5 }, 'mha-bf16'],
    ['documents', { packing: 'documents', weightDecay: 0.1, validation: 1, seed: 5 }],
    ['falling', { schedule: 'cosine', warmupSteps: 2, betas: [0.8, 0.99] }],
    ['an adapter', { lora: { rank: 2 }, seed: 3 }],
    ['an adapter, embedding and norms', { lora: { rank: 3, alsoTrain: ['embed', 'norm'] }, accumulate: 2 }, 'mha-bf16'],
    ['an adapter, tied', { lora: { alsoTrain: ['embed'] } }, 'sharded-tied-linear8'],
    ['rounded and offloaded', { memory: lean, accumulate: 2 }, 'mha-bf16'],
    ['an adapter with rounded moments', { lora: { rank: 2 }, memory: { ...lean, masters: 'float32' } }],
    ['PoSE', { pose: { length: 100, chunks: 3 }, seed: 2, batchSize: 2 }],
    ['stretched, tied, sharded', {}, 'sharded-tied-linear8', { rope: { type: 'linear', factor: 2 } }],
  ]
  if (process.env['ROPEWALK_SIMT_LIBRARY'] !== undefined) {
    const device = 'simt'
    variants.push(['all weights on the emulator', { memory: lean, steps: 2 }, 'mha-bf16', { device }])
    variants.push(['an adapter on the emulator', { lora: { rank: 2 }, accumulate: 2, steps: 2 }, 'mha-f32', { device }])
  }
  for (const [what, options, name, how] of variants) {
    const { steps = 6 } = options
    const straight = folder()
    await train(straight, options, name, how)
    for (const at of steps === 6 ? [1, 3, 5] : [1]) {
      const output = folder()
      // what a run that ends at `at` leaves is what a longer one leaves there
      if (options.schedule) await stopAt(output, at, options, name, how)
      else await train(output, { ...options, steps: at }, name, how)
      const resumed = await train(output, { ...options, resume: true }, name, how)
      t.equal(sums(output, steps), sums(straight, steps), `${what}, stopped after ${at}`)
      t.equal(resumed.state.tokens, steps * 16 * (options.batchSize ?? 1) * (options.accumulate ?? 1))
      t.strictSame(metricsOf(output), [1, 2, 3, 4, 5, 6].slice(0, steps))
    }
  }
})

/** Stops by a signal in the middle of a longer run. */
async function stopAt(output: string, at: number, options: TrainerOptions, name?: string, how: LoadOptions = {}) {
  using model = await load(name, how)
  using trainer = new Trainer(model, { ...base, output, ...options })
  const abort = new AbortController()
  for await (const { step } of trainer.run({ signal: abort.signal })) if (step === at) abort.abort()
}

t.test('resuming after a skipped update changes no bit', async (t) => {
  const name = 'model.layers.0.mlp.up_proj.weight'
  /** Step 3 sees a NaN; `stop` ends the run behind it. */
  async function disturbed(output: string, stop: boolean): Promise<void> {
    using model = await load()
    using trainer = new Trainer(model, { ...base, output })
    const good = await model.read(name)
    const bad = { ...good, data: new Float32Array(good.data as Float32Array).fill(NaN) }
    let held = good
    for await (const { step, skipped } of trainer.run()) {
      t.equal(skipped, step === 3)
      if (step === 2) {
        held = await model.read(name)
        await model.write(name, bad)
      }
      if (step === 3) await model.write(name, held)
      if (step === 3 && stop) break
    }
    if (stop) await trainer.save()
  }
  const straight = folder()
  await disturbed(straight, false)
  const output = folder()
  await disturbed(output, true)
  const { state } = await train(output, { resume: true })
  t.match(state, { step: 6, applied: 5, skipped: 1, skippedInARow: 0 })
  t.equal(sums(output, 6), sums(straight, 6))
})

t.test('a checkpoint is a model', async (t) => {
  for (const name of ['gqa-linear16-old', 'yarn8', 'llama3-8', 'dynamic4', 'ntk-theta', 'mha-bf16']) {
    const output = folder()
    using model = await load(name, name === 'gqa-linear16-old' ? { rope: { type: 'linear', factor: 2 } } : {})
    using trainer = new Trainer(model, { output, learningRate: 1e-3 })
    const tokens = [Array.from({ length: 20 }, (_, i) => (i * 31) % 250)]
    await trainer.step(tokens)
    const path = await trainer.save()
    t.equal(path, join(output, 'checkpoint-000001'))
    t.equal(await trainer.save(), path, 'saved once')
    const { loss } = await trainer.step(tokens)
    using loaded = await load(path)
    t.equal(loaded.contextWindow, model.contextWindow)
    t.ok(Math.abs((await loaded.loss(tokens)) - loss) < 1e-6, name)
    t.equal((await loaded.tokenizer()).hash, (await model.tokenizer()).hash)
    using resumed = new Trainer(loaded, { learningRate: 1e-3, resume: path })
    t.equal((await resumed.step(tokens)).loss, loss, 'its config says the same as the one it came from')
    t.equal(resumed.state.step, 2)
  }
})

t.test('a model that was made, not loaded', async (t) => {
  const config = JSON.parse(fs.readFileSync(join(fixtures, 'mha-f32', 'config.json'), 'utf8'))
  const tokens = [Array.from({ length: 20 }, (_, i) => (i * 31) % 250)]
  for (const tokenizer of [undefined, join(fixtures, 'mha-f32')]) {
    const output = folder()
    using model = await Llama.create(config, { device: 'cpu', ...(tokenizer && { tokenizer }) })
    using trainer = new Trainer(model, { output })
    await trainer.step(tokens)
    const path = await trainer.save()
    t.equal(fs.existsSync(join(path, 'tokenizer.json')), tokenizer !== undefined)
    const { loss } = await trainer.step(tokens)
    using loaded = await load(path)
    using resumed = new Trainer(loaded, { resume: path })
    t.equal((await resumed.step(tokens)).loss, loss)
  }
})

t.test('what does not fit is refused', async (t) => {
  const output = folder()
  await train(output, { steps: 2 })
  const refuse = (options: TrainerOptions, message: RegExp, name?: string, how?: LoadOptions) =>
    t.rejects(train(output, { resume: true, ...options }, name, how), { message })
  await t.rejects(train(output, {}), { code: 'ERR_EXISTS', message: /checkpoint-000002.* set resume: true/ })
  await t.rejects(train(output, { resume: join(dir, 'elsewhere') }), { code: 'ERR_EXISTS' })
  const at = /checkpoint-000002: option /.source
  await refuse({ batchSize: 2 }, new RegExp(`${at}batchSize was 1 when this checkpoint was written, but is 2 now`))
  await refuse({ accumulate: 2 }, new RegExp(`${at}accumulate was 1`))
  await refuse({ context: 15 }, new RegExp(`${at}context was 16 .* is 15 now`))
  await refuse({ seed: 1 }, new RegExp(`${at}seed was 0`))
  await refuse({ learningRate: 1 }, new RegExp(`${at}learningRate was 0.001 .* is 1 now`))
  await refuse({ betas: [0.9, 0.9] }, new RegExp(`${at}betas was \\[0.9,0.95\\]`))
  await refuse({ schedule: 'linear' }, new RegExp(`${at}schedule was "constant"`))
  await refuse({ packing: 'documents' }, new RegExp(`${at}packing was "concat"`))
  await refuse({ maxGradNorm: 1 }, new RegExp(`${at}maxGradNorm was 0`))
  await refuse({ appendEos: false }, /the data are not those of the run/)
  await refuse({ validation: 1 }, /the data are not those of the run/)
  await refuse({}, /the model's dtype was "float32" .* is "bfloat16" now/, undefined, { dtype: 'bfloat16' })
  await refuse({}, /the model's maxPositionEmbeddings was 128 .* is 256/, undefined, {
    rope: { type: 'linear', factor: 2 },
  })
  const other = join(dir, 'other.jsonl')
  fs.copyFileSync(data, other)
  await train(output, { steps: 3, resume: true, data: other })
  t.pass('the same content by another name')
  fs.appendFileSync(other, `${JSON.stringify({ text: 'more' })}\n`)
  await refuse({ data: other }, /the data are not those of the run/)
  await t.rejects(train(folder(), { resume: join(dir, 'nowhere') }), { code: 'ERR_NOT_FOUND' })
  const { state } = await train(folder(), { resume: true, steps: 1 })
  t.equal(state.step, 1, 'resume: true with nothing there starts from the beginning')
})

t.test('damage is found, and the checkpoint before it is used', async (t) => {
  const output = folder()
  await train(output, { steps: 4, saveEvery: 2 })
  const newest = join(output, checkpointName(4))
  const names = fs.readdirSync(newest)
  t.strictSame(names.sort(), [
    'checksums.json',
    'config.json',
    'model.safetensors',
    'tokenizer.json',
    'trainer.json',
    'trainer.safetensors',
  ])
  t.equal((await findCheckpoint(output, t.fail))!.path, newest)
  let seed = 1
  const random = (n: number): number => (seed = (seed * 48271) % 2147483647) % n
  let found = 0
  let tried = 0
  const spoil = async (name: string, bytes: Buffer | undefined) => {
    const path = join(newest, name)
    const good = fs.readFileSync(path)
    if (bytes) fs.writeFileSync(path, bytes)
    else fs.rmSync(path)
    const warnings: string[] = []
    const chosen = await findCheckpoint(output, (message) => warnings.push(message))
    tried++
    // what is wrong is named, but for a sum that was changed itself: then the file it belongs to is
    const says =
      warnings.length === 1 && warnings[0]!.startsWith(newest) && warnings[0]!.includes('is damaged; going on from')
    const file = name === 'checksums.json' || warnings[0]!.startsWith(join(newest, name))
    if (chosen!.path === join(output, checkpointName(2)) && says && file) found++
    else t.fail(`${name}: ${chosen!.path} ${warnings.join()}`)
    fs.writeFileSync(path, good)
  }
  for (const name of names) {
    const good = fs.readFileSync(join(newest, name))
    for (let i = 0; i < 40; i++) {
      const flipped = Buffer.from(good)
      flipped[random(good.length)]! ^= 1 << random(8)
      await spoil(name, flipped)
    }
    for (const length of [0, 1, random(good.length), good.length - 1]) await spoil(name, good.subarray(0, length))
    await spoil(name, Buffer.concat([good, Buffer.from([10])]))
    await spoil(name, undefined)
  }
  t.equal(found, tried, `${found} of ${tried} found`)
  t.equal((await findCheckpoint(output, t.fail))!.path, newest, 'whole again')

  fs.truncateSync(join(newest, 'trainer.safetensors'), 1000)
  const trainer = await train(output, { resume: true })
  t.match(trainer.warnings, [
    /checkpoint-000004.trainer.safetensors: has 1000 bytes.*going on from .*checkpoint-000002/,
  ])
  const straight = folder()
  await train(straight, {})
  t.equal(sums(output, 6), sums(straight, 6), 'and ends where it should')
  await t.rejects(findCheckpoint(newest, t.fail), { code: /ERR_/ }, 'one that was asked for by name is not replaced')
  for (const { name } of fs.readdirSync(output, { withFileTypes: true }).filter((entry) => entry.isDirectory())) {
    fs.rmSync(join(output, name, 'config.json'))
  }
  await t.rejects(train(output, { resume: true }), { code: 'ERR_CHECKPOINT', message: /no healthy checkpoint is left/ })
})

t.test('two healthy checkpoints stay', async (t) => {
  const output = folder()
  const healthy = async (): Promise<number[]> => {
    const steps: number[] = []
    for (const name of fs.readdirSync(output).filter((name) => name.startsWith('checkpoint-'))) {
      await verifyCheckpoint(join(output, name)).then(
        ({ step }) => steps.push(step),
        () => undefined,
      )
    }
    return steps.sort((a, b) => b - a)
  }
  await train(output, { steps: 3, saveEvery: 1 })
  t.strictSame(await healthy(), [3, 2])
  fs.truncateSync(join(output, checkpointName(3), 'model.safetensors'), 77)
  for (const junk of [
    'checkpoint-000003.tmp-77-aabbccdd',
    'checkpoint-000003.tmp-77-aabbccdd.tmp-77-00000000',
    'checkpoint-000001.old-1-a',
  ]) {
    fs.mkdirSync(join(output, junk))
    fs.writeFileSync(join(output, junk, 'file'), 'left by a run that was killed')
  }
  await train(output, { steps: 3, resume: true, saveEvery: 1 })
  t.strictSame(await healthy(), [3, 2], 'the damaged one was written again')
  fs.truncateSync(join(output, checkpointName(3), 'model.safetensors'), 77)
  await t.rejects(train(output, { resume: join(output, checkpointName(2)) }), {
    code: 'ERR_EXISTS',
    message: /there are later checkpoints .*checkpoint-000003/,
  })
  await train(output, { steps: 4, resume: true, saveEvery: 2 })
  t.strictSame(await healthy(), [4, 2], 'a damaged one does not count')
  t.strictSame(
    fs.readdirSync(output).sort(),
    [2, 3, 4].map(checkpointName).concat('metrics.jsonl'),
    'nothing is left over',
  )
  await train(output, { steps: 5, resume: true, keep: 2 })
  t.strictSame(fs.readdirSync(output).sort(), [4, 5].map(checkpointName).concat('metrics.jsonl'))
  await train(output, { steps: 7, resume: true, keep: Infinity, saveEvery: 1 })
  t.strictSame(await healthy(), [7, 6, 5, 4])
})

const kills = Number(process.env.ROPEWALK_KILLS ?? 3)
t.test(`${kills} kills change no bit`, async (t) => {
  const straight = folder()
  const steps = 60
  await train(straight, { steps, saveEvery: 1 })
  const output = folder()
  const options = { ...base, steps, saveEvery: 1, output, resume: true }
  const at = (path: string): string => JSON.stringify(new URL(path, import.meta.url).href)
  const code = `
    import { Llama } from ${at('../../lib/model/llama.ts')}
    import { Trainer } from ${at('../../lib/train/trainer.ts')}
    const model = await Llama.load(${JSON.stringify(join(fixtures, 'gqa-linear4-f32'))}, { device: 'cpu' })
    const trainer = new Trainer(model, ${JSON.stringify(options)})
    for await (const { step } of trainer.run()) console.log(step)`
  const loader = process.execArgv.filter((arg) => arg.includes('typescript'))
  /** Runs until the end, or until `delay` ms after the first step. */
  const child = (delay: number | undefined): Promise<NodeJS.Signals | null> =>
    new Promise((resolve, reject) => {
      const run = spawn(process.execPath, [...loader, '--input-type=module', '-e', code], {
        stdio: ['ignore', 'pipe', 'pipe'],
      })
      let errors = ''
      run.stderr.on('data', (chunk) => (errors += chunk))
      run.stdout.once('data', () => delay !== undefined && setTimeout(() => run.kill('SIGKILL'), delay))
      run.on('exit', (code, signal) => (code ? reject(new Error(errors)) : resolve(signal)))
    })
  let killed = 0
  for (let i = 0; i < kills; i++) {
    if ((await child(5 + Math.random() * 150)) === 'SIGKILL') killed++
    const newest = await findCheckpoint(output, () => undefined)
    t.ok(newest!.record.step >= 1, `killed, stands at ${newest!.record.step}`)
  }
  t.equal(await child(undefined), null)
  t.ok(killed >= 1, `${killed} were killed before they were done`)
  t.equal(sums(output, steps), sums(straight, steps), 'as if nothing had happened')
  t.strictSame(
    metricsOf(output),
    Array.from({ length: steps }, (_, i) => i + 1),
    'each step stands once in the metrics',
  )
  t.strictSame(fs.readdirSync(output).sort(), [steps - 1, steps].map(checkpointName).concat('metrics.jsonl'))
})

t.test('a full disk', async (t) => {
  const disk = join(dir, 'disk')
  fs.mkdirSync(disk)
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', disk], { stdio: 'ignore' })
  } catch {
    t.pass('a full disk', { skip: 'mounting a small tmpfs takes root' })
    return
  }
  t.teardown(() => execFileSync('umount', [disk]))
  const free = (): number => {
    const { bavail, bsize } = fs.statfsSync(disk)
    return bavail * bsize
  }
  const ballast = join(disk, 'ballast')
  const leave = (bytes: number): void => {
    fs.rmSync(ballast, { force: true })
    fs.writeFileSync(ballast, Buffer.alloc(free() - bytes))
  }
  const output = join(disk, 'output')
  leave(1_000_000)
  await t.rejects(train(output, { saveEvery: 1 }), {
    code: 'ERR_NO_SPACE',
    message: /output: the disk is full: \d+ bytes .* needed, \d+ bytes/,
  })
  t.notOk(fs.existsSync(join(output, 'metrics.jsonl')), 'refused before the first step')

  leave(1_900_000)
  using model = await load()
  using trainer = new Trainer(model, { ...base, output, saveEvery: 2 })
  const { checkpointBytes } = trainer.plan()
  const spaces = [checkpointBytes - 4096, checkpointBytes + 4096]
  const run = async () => {
    for await (const { step } of trainer.run()) if (step === 3) leave(spaces.shift()!)
  }
  const full = { code: 'ERR_NO_SPACE', message: new RegExp(`${checkpointName(4)}|output: the disk is full`) }
  await t.rejects(run(), full, 'noticed before a byte is written')
  t.strictSame(fs.readdirSync(output).sort(), [checkpointName(2), 'metrics.jsonl'])
  leave(spaces.shift()!)
  await t.rejects(
    trainer.save(),
    { code: 'ERR_NO_SPACE', message: /checkpoint-000004.*: the disk is full: \d+ bytes/ },
    'noticed while writing',
  )
  t.strictSame(fs.readdirSync(output).sort(), [checkpointName(2), 'metrics.jsonl'], 'nothing half-written stays')
  t.equal((await verifyCheckpoint(join(output, checkpointName(2)))).step, 2, 'the old one is whole')
  t.match(trainer.state, { step: 4, applied: 4 })
  fs.rmSync(ballast)
  t.equal(await trainer.save(), join(output, checkpointName(4)), 'and with space again it goes on')
  for await (const _ of trainer.run());
  const straight = folder()
  await train(straight, {})
  t.equal(sums(output, 6), sums(straight, 6))
})
