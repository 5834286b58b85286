// `ropewalk extend` with options of memory, adapters, quantised bases and PoSE; and the commands that use what comes out.
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { Llama, type MemoryOptions, plan, Trainer, type TrainerOptions } from '../../lib/index.js'
import { fixtures } from '../golden.js'
import { type Result, ropewalk as command } from './command.js'

const dir = mkdtempSync(join(tmpdir(), 'ropewalk-extend-'))
t.teardown(() => rmSync(dir, { recursive: true, force: true }))
process.env.XDG_CACHE_HOME = join(dir, 'cache')

const [model, narrow] = ['gqa-linear4-f32', 'mha-bf16'].map((name) => join(fixtures, name)) as [string, string]
const data = join(dir, 'text.txt')
writeFileSync(data, readFileSync(join(fixtures, 'README.md'), 'utf8').repeat(2))

const ropewalk = (...args: string[]): Promise<Result> => command(...args, '--device', 'cpu')

const extend = (out: string, ...more: string[]): Promise<Result> =>
  ropewalk('extend', model, '--data', data, '--out', join(dir, out), ...more)

const words = (text: string): string[] => text.split(' ')
const json = (...path: string[]): Record<string, unknown> =>
  JSON.parse(readFileSync(join(dir, ...path), 'utf8')) as Record<string, unknown>
const bytes = (...path: string[]): string => readFileSync(join(dir, ...path)).toString('base64')
const optionsOf = (out: string, step: number): unknown =>
  json(`${out}.checkpoints`, `checkpoint-00000${step}`, 'trainer.json')['options']

/** The same with the library: three steps to a window of 256 tokens. */
async function train(path: string, quantize: 'nf4' | undefined, options: TrainerOptions, out: string): Promise<void> {
  using base = await Llama.load(path, { device: 'dry' })
  const factor = 256 / base.contextWindow
  using own = await Llama.load(path, { device: 'cpu', rope: { type: 'linear', factor }, ...(quantize && { quantize }) })
  using trainer = new Trainer(own, { data, context: 256, steps: 3, learningRate: 1e-3, ...options })
  for await (const { skipped } of trainer.run()) t.notOk(skipped)
  await (own.adapter ? own.saveAdapter(out) : own.save(out))
}

const three = words('--context 256 --steps 3 --lr 1e-3')
const memory =
  '--checkpoint-layers 1 --keep-attention --mlp-rows 64 --gradients bfloat16 --masters remainder --moments 8bit'

t.test('options of memory are the trainer options of the same names', async (t) => {
  const out = join(dir, 'lean')
  const run = await ropewalk('extend', narrow, '--data', data, '--out', out, ...three, ...words(memory))
  t.equal(run.code, 0, run.stderr)
  t.match(optionsOf('lean', 3), {
    ...{
      'memory.mlpRows': 64,
      'memory.gradients': 'bfloat16',
      'memory.masters': 'remainder',
      'memory.moments': '8bit',
    },
  })
  const same: MemoryOptions = {
    ...{ checkpointLayers: 1, keepAttention: true, mlpRows: 64 },
    ...{ gradients: 'bfloat16', masters: 'remainder', moments: '8bit' },
  }
  await train(narrow, undefined, { memory: same }, join(dir, 'lean-api'))
  t.equal(bytes('lean', 'model.safetensors'), bytes('lean-api', 'model.safetensors'), 'the same bits')
  await train(narrow, undefined, {}, join(dir, 'plain-api'))
  t.not(bytes('lean', 'model.safetensors'), bytes('plain-api', 'model.safetensors'), 'which rounding changes')
})

const adapter = words('--lora 4 --lora-alpha 8 --lora-targets q_proj,down_proj --also-train embed,norm --quantize nf4')

t.test('an adapter over a quantised base: saved for PEFT, used and merged as the output says', async (t) => {
  const { code, stdout, stderr } = await extend('adapter', ...three, ...adapter)
  t.equal(code, 0, stderr)
  t.match(json('adapter', 'adapter_config.json'), {
    ...{ peft_type: 'LORA', r: 4, lora_alpha: 8, target_modules: ['q_proj', 'down_proj'] },
    modules_to_save: ['embed_tokens', 'input_layernorm', 'post_attention_layernorm', 'norm'],
  })
  t.notOk(existsSync(join(dir, 'adapter', 'model.safetensors')), 'no weights of the base')
  const lora = { rank: 4, alpha: 8, targets: ['q_proj', 'down_proj'], alsoTrain: ['embed', 'norm'] } as const
  await train(model, 'nf4', { lora }, join(dir, 'adapter-api'))
  const file = 'adapter_model.safetensors'
  t.equal(bytes('adapter', file), bytes('adapter-api', file), 'the same bits as with the library')

  const [, next] = /^saved .*: an adapter of rank 4, .* window 256\. Next: ropewalk (.*) <file>$/m.exec(stdout)!
  const { results } = JSON.parse((await ropewalk(...words(next!), data, '--json', '--truncate', '600')).stdout)
  t.match(results, [{ window: 256, nll: Number }])
  const [, merge] = /^To merge it: (.*)$/m.exec(stdout)!
  const AsyncFunction = Object.getPrototypeOf(async () => undefined).constructor as typeof Function
  const merged = join(dir, 'merged')
  await (new AsyncFunction('Llama', merge!.replace('<folder>', merged))(Llama) as unknown as Promise<void>)
  const perplexity = ['eval', 'perplexity', merged, '--data', data, '--truncate', '600', '--json']
  const whole = JSON.parse((await ropewalk(...perplexity)).stdout).results as { window: number; nll: number }[]
  t.match(whole, [{ window: 256 }])
  t.ok(Math.abs(whole[0]!.nll / (results as typeof whole)[0]!.nll - 1) < 1e-5, 'merged is the same model')

  const event = JSON.parse((await extend('again', ...three, ...adapter, '--json')).stdout.trimEnd().split('\n').at(-1)!)
  t.match(event, { event: 'saved', adapter: lora, contextWindow: 256 })
})

t.test('resuming an adapter changes no bit, and keeps to its options', async (t) => {
  const start = words('--context 256 --lr 1e-3 --moments 8bit')
  t.equal((await extend('whole', ...start, ...adapter, '--steps', '4')).code, 0)
  t.equal((await extend('parts', ...start, ...adapter, '--steps', '2')).code, 0)
  const more = [...start, '--steps', '4', '--resume', '--overwrite']
  for (const [other, message] of [
    [[...adapter.slice(0, -1), 'int8'], /quantization was "nf4" when this checkpoint was written, but is "int8" now/],
    [['--lora', '2', ...adapter.slice(2)], /lora was .*"rank":4.* but is .*"rank":2/],
    [words('--lora 4 --pose 512'), /checkpoint-000002: /],
  ] as const) {
    const { code, stderr } = await extend('parts', ...more, ...other)
    t.equal(code, 1)
    t.match(stderr, message)
  }
  const rest = await extend('parts', ...more, ...adapter)
  t.equal(rest.code, 0, rest.stderr)
  t.match(rest.stderr, /going on from .*checkpoint-000002\nstep 3\/4/)
  t.equal(bytes('parts', 'adapter_model.safetensors'), bytes('whole', 'adapter_model.safetensors'))
})

t.test('PoSE: short windows train the positions of a long one', async (t) => {
  const { code, stderr } = await extend('pose', ...words('--context 64 --pose 512 --steps 2'))
  t.equal(code, 0, stderr)
  t.match(stderr, /linear by 4 to 512 tokens/)
  t.match(optionsOf('pose', 2), { context: 64, pose: { length: 512, chunks: 2 } })
  t.match(json('pose', 'config.json'), { max_position_embeddings: 512 })
})

/** What this process may have, until the test ends. */
function allow(t: { teardown(done: () => void): void }, size: number): void {
  t.teardown(() => delete process.env['ROPEWALK_MEMORY'])
  process.env['ROPEWALK_MEMORY'] = String(size)
}

t.test('what cannot fit is refused with the plan and with the options that fit', async (t) => {
  const { requiredBytes: needs } = await plan({ model, context: 512, dtype: 'float32', device: 'cpu' })
  const long = words('--context 512 --steps 1')
  allow(t, Math.floor(0.8 * needs))
  const refused = await extend('large', ...long)
  t.equal(refused.code, 1)
  t.equal(refused.stdout, '')
  for (const part of [
    /\nstep +1 x 512 tokens\n/,
    /\nactivations +[\d.]+ MB\n/,
    /\nin all +[\d.]+ MB +of [\d.]+ MB: does NOT fit, [\d.]+ MB are missing/,
    /\npeak +\w+ of /,
    /\ndevice +host +time .* options *\n[\d.]+ MB +0\.00 GB +[\d.]+ .* exact +--checkpoint-layers 1/,
    /\nropewalk: training does not fit; with the smallest change it fits: --checkpoint-layers 1[^\n]*\n$/,
  ])
    t.match(refused.stderr, part)
  t.notOk(existsSync(join(dir, 'large')) || existsSync(join(dir, 'large.checkpoints')), 'nothing is written')

  const change = refused.stderr.trimEnd().split('it fits: ')[1]!
  const changed = await extend('large', ...long, ...words(change))
  t.equal(changed.code, 0, 'with what was printed it runs')
  const found = await extend('found', ...long, '--fit')
  t.equal(found.code, 0, 'and --fit finds that itself')
  t.equal(bytes('found', 'model.safetensors'), bytes('large', 'model.safetensors'))

  allow(t, Math.floor(0.25 * needs))
  const none = await extend('none', ...long)
  t.equal(none.code, 1)
  t.match(
    none.stderr,
    /\nThe nearest that fits: --context \d+ --batch 1 \(with --pose 512 it trains those positions\)\n/,
  )
  t.match(none.stderr, /\nropewalk: training does not fit; what comes nearest is above\n$/)
  allow(t, 1000)
  const hopeless = await extend('none', ...long, '--fit')
  t.equal(hopeless.code, 1)
  t.match(hopeless.stderr, /\nropewalk: training does not fit; only training on one device is supported\n$/)
  t.notOk(existsSync(join(dir, 'none')) || existsSync(join(dir, 'none.checkpoints')))
})

t.test('what cannot be is refused before anything is read or written', async (t) => {
  for (const [args, code, message] of [
    ['--steps 0 --lora 4', 2, /--lora trains an adapter, but --steps is 0/],
    ['--lora-alpha 8', 2, /--lora-alpha needs --lora: the adapter's rank/],
    ['--also-train norm', 2, /--also-train needs --lora/],
    ['--quantize nf4', 2, /--quantize needs --lora: quantised weights are too coarse/],
    ['--lora 4 --quantize nf5', 2, /--quantize is "nf5"; did you mean "nf4"\?/],
    ['--offload weights', 2, /--offload is "weights", but must be checkpoints, optimizer/],
    ['--moments 4bit', 2, /--moments is "4bit"/],
    ['--fit --moments 8bit', 2, /--fit chooses the options of memory: leave --moments out/],
    ['--pose 128', 2, /--pose is 128, but the window of .* has 128 tokens already/],
    ['--pose 1024 --factor 2', 2, /--factor 2 makes the window 256, but --pose is 1024: it must be at least 8/],
    ['--lora 17', 1, /lora\.rank is 17, but .* is \(16,32\): a product of rank above 16 is no smaller/],
    ['--lora 4 --lora-alpha 0', 2, /--lora-alpha is "0", but must be a number above 0 /],
    ['--lora 4 --lora-targets q', 1, /lora\.targets has "q"/],
    ['--lora 4 --also-train heads', 1, /lora\.alsoTrain has "heads"; did you mean "head"\?/],
    ['--checkpoint-layers 3', 1, /memory\.checkpointLayers is 3, but the model has 2 layers/],
    ['--keep-attention', 1, /memory\.keepAttention is set, but memory\.checkpointLayers is 0/],
    ['--attention-groups 3', 1, /memory\.attentionGroups is 3, but must divide/],
    ['--masters stochastic', 1, /memory\.masters is "stochastic", but the weights are float32: .* leave masters away/],
    ['--gradients fused --accumulate 2', 1, /memory\.gradients is "fused", but accumulate is 2/],
    ['--pose 300', 1, /pose\.length is 300, but context is 512: positions are to be spread, not pressed/],
    ['--pose 1024 --packing documents', 1, /packing is 'documents', whose positions restart/],
    ['--pose 1024 --validation 0.1', 1, /validation is 0\.1, but with pose/],
  ] as const) {
    const result = await extend('never', '--context', '512', ...words(args))
    t.same([result.code, result.stdout], [code, ''], args)
    t.match(result.stderr, /^ropewalk: [^\n]+\n$/, 'one line')
    t.match(result.stderr, message)
  }
  t.notOk(existsSync(join(dir, 'never')) || existsSync(join(dir, 'never.checkpoints')))
})

t.test('a run that fails before its first step leaves no folder of checkpoints', async (t) => {
  const empty = join(dir, 'empty.txt')
  writeFileSync(empty, '')
  const failing = ['extend', model, '--context', '256', '--steps', '1']
  for (const more of [
    ['--data', join(dir, 'nowhere.txt')],
    ['--data', empty],
    ['--data', data, '--validation', join(dir, 'nowhere.txt')],
  ]) {
    const { code, stderr } = await ropewalk(...failing, '--out', join(dir, 'failed', 'run'), ...more)
    t.not(code, 0, stderr)
    t.notOk(existsSync(join(dir, 'failed', 'run.checkpoints')), more.join(' '))
  }
  const own = join(dir, 'own.checkpoints')
  mkdirSync(own)
  await ropewalk(...failing, '--out', join(dir, 'own'), '--data', empty)
  t.ok(existsSync(own), 'a folder that was there stays')
})

t.test('adapters and quantised models are evaluated, and write', async (t) => {
  const path = join(dir, 'adapter')
  const prompt = 'the rope was laid along the walk'
  const ids = async (...more: string[]): Promise<unknown> => {
    const { code, stdout, stderr } = await ropewalk('generate', model, '--prompt', prompt, '--json', ...more)
    t.equal(code, 0, stderr)
    return (JSON.parse(stdout) as { ids: unknown }).ids
  }
  const nll = async (...more: string[]): Promise<number> => {
    const windows = ['--data', data, '--windows', '128', '--truncate', '300']
    const { code, stdout, stderr } = await ropewalk('eval', 'perplexity', model, ...windows, '--json', ...more)
    t.equal(code, 0, stderr)
    return (JSON.parse(stdout) as { results: [{ nll: number }] }).results[0].nll
  }
  const losses = new Set<number>()
  for (const [more, options] of [
    [[], {}],
    [['--quantize', 'nf4'], { quantize: 'nf4' }],
    [['--quantize', 'int8'], { quantize: 'int8' }],
    [['--adapter', path], { adapter: path }],
    [['--adapter', path, '--quantize', 'nf4'], { adapter: path, quantize: 'nf4' }],
  ] as const) {
    using own = await Llama.load(model, { device: 'cpu', ...options })
    const wanted: number[] = []
    for await (const { id } of own.generate({ prompt })) wanted.push(id)
    t.strictSame(await ids(...more), wanted, `generate ${more.join(' ')}`)
    losses.add(await nll(...more))
  }
  t.equal(losses.size, 5, 'each is another model')
  const table = await ropewalk('eval', 'attention', model, '--data', data, '--adapter', path, '--quantize', 'int8')
  t.equal(table.code, 0, table.stderr)

  const missing = join(dir, 'missing')
  for (const [more, code, message] of [
    [['--quantize', 'int4'], 2, /--quantize is "int4"; did you mean "int8"\?; it must be nf4 or int8/],
    [['--adapter', missing], 1, /missing: no such folder/],
    [['--adapter', model], 1, /no adapter_config\.json: a folder with an adapter .* is expected/],
  ] as const) {
    for (const command of [
      ['generate', model, '--prompt', prompt],
      ['eval', 'passkey', model],
      ['eval', 'needle', model],
    ]) {
      const result = await ropewalk(...command, ...more)
      t.same([result.code, result.stdout], [code, ''], command.slice(0, 2).join(' '))
      t.match(result.stderr, message)
    }
  }
  const foreign = await ropewalk('generate', narrow, '--prompt', prompt, '--adapter', path)
  t.equal(foreign.code, 1)
  t.match(foreign.stderr, /^ropewalk: .*config\.json: intermediate_size is .* trained on another base/)
})
