import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { type MemoryOptions, plan } from '../../lib/index.js'
import { memoryWords } from '../../lib/cli/training-options.js'
import { type Result, ropewalk as command } from './command.js'

const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-cli-plan-'))
t.teardown(() => fs.rmSync(dir, { recursive: true, force: true }))
const config = join(dir, 'config.json')
fs.writeFileSync(
  config,
  JSON.stringify({
    ...{ model_type: 'llama', hidden_size: 64, intermediate_size: 176, num_hidden_layers: 4, num_attention_heads: 4 },
    ...{ num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 64 },
  }),
)

const ropewalk = (...args: string[]): Promise<Result> => command('plan', ...args)

const tiny = ['--model', config, '--context', '128']
const all =
  '--checkpoint-layers 2 --mlp-rows 32 --attention-groups 2 --logits-rows 64 --gradients bfloat16 --masters remainder --moments 8bit --keep-attention --offload checkpoints,optimizer'

t.test('a plan for people', async (t) => {
  const { code, stdout, stderr } = await ropewalk(...tiny, '--device', 'a100-80g')
  t.same([code, stderr], [0, ''])
  for (const part of [
    /^model +.*config\.json: \d+ weights, 4 layers, bfloat16\nstep +1 x 128 tokens\ndevice +a100-80g, NVIDIA A100/,
    /\nweights +0\.450 MB\n/,
    /\nin all +[\d.]+ GB  of 84\.98 GB: fits, [\d.]+ GB are left\n/,
    /\npeak +\w+ of \S.*, (forward|backward)\n/,
    /\noperations +[\d.e-]+ TFLOP, 0 % of them computed again\nbytes moved +[\d.]+ MB\ncheckpoint +[\d.]+ MB on the disk\n/,
    /\nEstimated, not measured, from published rates of a100-80g:\na step +[\d.e-]+ s \(.*\)\nspeed .* MFU \d+ % = \(6 N \+ 6 L H D T\)/,
    /\nthe run +1000 steps: \d+ s, [\d.e-]+ kWh at the power limit\n$/,
  ])
    t.match(stdout, part)
  const bare = await ropewalk(...tiny)
  t.match(bare.stdout, /in all .* fits a100-40g, a100-80g, .*rtx-4090/)
  t.notMatch(bare.stdout, /Estimated/)
  const adapter = await ropewalk(...tiny, '--lora', '4', '--also-train', 'embed,norm', '--pose', '4096')
  t.match(adapter.stdout, /\ntrained +\d+ weights: rank 4 of q_proj, k_proj, v_proj, o_proj, and embed, norm\n/)
  t.match(adapter.stdout, /\nstep +1 x 128 tokens, with the positions of 4096 \(PoSE\)\n/)
})

t.test('a plan for programs: the same as plan() gives', async (t) => {
  const lora = ['--lora', '4', '--lora-targets', 'all', '--validation', '--dtype', 'bfloat16']
  const more = ['--batch', '2', '--accumulate', '3', '--clip', '1', '--steps', '7', '--memory', '1g', '--host', '2g']
  const { code, stdout, stderr } = await ropewalk(...tiny, ...all.split(' '), ...lora, ...more, '--json')
  t.same([code, stderr], [0, ''])
  const memory = {
    ...{ checkpointLayers: 2, mlpRows: 32, attentionGroups: 2, logitsRows: 64, gradients: 'bfloat16' },
    ...{ masters: 'remainder', moments: '8bit', keepAttention: true, offloadCheckpoints: true, offloadOptimizer: true },
  } as const satisfies MemoryOptions
  const wanted = await plan({
    ...{ model: config, context: 128, batchSize: 2, accumulate: 3, maxGradNorm: 1, memory, steps: 7 },
    ...{ dtype: 'bfloat16', limit: '1g', hostLimit: '2g', validation: 'a file' },
    lora: { rank: 4, targets: ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'] },
  })
  t.same(JSON.parse(stdout), JSON.parse(JSON.stringify(wanted, (_, value) => (value === undefined ? null : value))))
  t.equal(memoryWords(memory), all, 'and options are printed as they are read')
})

t.test('what does not fit ends with code 1', async (t) => {
  const small = await ropewalk(...tiny, '--memory', '1m')
  t.equal(small.code, 1)
  t.match(small.stdout, /of 1\.05 MB: does NOT fit, [\d.]+ GB are missing \(--fit looks for what does\)/)
  const host = await ropewalk(...tiny, '--memory', '1g', '--host', '0', '--offload', 'optimizer')
  t.equal(host.code, 1)
  t.match(host.stdout, /does NOT fit, the host has 0\.00 GB of [\d.]+ MB/)
  for (const device of [[], ['--device', 'cpu']]) {
    const run = [...tiny, ...device, '--offload', 'optimizer', '--host']
    const { code, stdout } = await ropewalk(...run, '0')
    t.equal(code, 1, device.join(' '))
    t.match(stdout, /does NOT fit, the host has 0\.00 GB of [\d.]+ MB/)
    const found = JSON.parse((await ropewalk(...run, '0', '--json')).stdout) as { fits: unknown; fitsOn: unknown }
    t.match(found, { fits: false, fitsOn: [] })
    t.equal((await ropewalk(...run, '1g')).code, 0)
  }
})

t.test('--fit', async (t) => {
  const long = ['--model', config, '--context', '8192', '--fit']
  const { code, stdout, stderr } = await ropewalk(...long, '--memory', '660m')
  t.equal(code, 0)
  t.match(
    stdout,
    /^\S*config\.json, 1 x 8192 tokens, on a GPU: 0\.69 GB\n\ndevice +host +time +s\/step .*results +options\n/,
  )
  t.match(stdout, /\n[\d.]+ GB +[\d.]+ [GM]B +[\d.]+ +- +- +exact.* +--checkpoint-layers/)
  t.match(stdout, /\nMemory is exact; times are estimates/)
  t.match(stderr, /^ways to keep activations \d+\/\d+/, 'progress')
  const found = JSON.parse((await ropewalk(...long, '--memory', '660m', '--json')).stdout)
  t.equal(found.problem, null)
  t.ok(found.sets.length > 1)
  // What is printed can be given back.
  for (const { memory, plan } of found.sets) {
    const words = memoryWords(memory).split(' ')
    const again = await ropewalk('--model', config, '--context', '8192', '--memory', '660m', ...words, '--json')
    t.equal(again.code, 0, again.stderr)
    t.type(plan.requiredBytes, 'number')
    t.equal(JSON.parse(again.stdout).requiredBytes, plan.requiredBytes)
  }
  const none = await ropewalk(...long, '--memory', '640m', '--host', '0')
  t.equal(none.code, 1)
  t.match(none.stdout, /Nothing fits: a GPU has 0\.7 GB: 1 x 8192 tokens leave too little room/)
  t.match(none.stdout, /\nThe leanest set is [\d.]+ MB too large:\ndevice/)
  t.match(
    none.stdout,
    /\nThe nearest that fits: --context \d+ --batch 1 \(with --pose 8192 it trains those positions\)\n/,
  )
  t.match(none.stdout, /\nWith more of --host, more might fit\.\n/)
  const hopeless = await ropewalk('--model', '65b', '--context', '64', '--device', 'rtx-4090', '--fit')
  t.equal(hopeless.code, 1)
  t.match(
    hopeless.stdout,
    /whatever the context is\.\n.*\nMore than one device would be needed, which is not supported/s,
  )
})

t.test('--svg', async (t) => {
  const path = join(dir, 'step.svg')
  const options = ['--checkpoint-layers', '1', '--gradients', 'fused']
  t.equal((await ropewalk(...tiny, '--device', 'rtx-4090', ...options, '--svg', path)).code, 0)
  const svg = fs.readFileSync(path, 'utf8')
  t.match(svg, /^<svg xmlns="http:\/\/www\.w3\.org\/2000\/svg" width="920"/)
  for (const part of ['weights', 'optimizer', 'checkpoints', 'gradients of a layer', 'activations', 'logits']) {
    t.match(svg, new RegExp(`>${part} [\\d.]+ (G|M)B<`), part)
  }
  t.match(svg, />Planned memory of a training step: /)
  t.match(svg, />rtx-4090: 25\.4 GB</)
  t.match(svg, /prefers-color-scheme: dark/)
  t.notMatch(svg, /NaN|undefined|Infinity/)
  const open = [...svg.matchAll(/<(\/?)(\w+)[^>]*?(\/?)>/g)].filter(([, , , empty]) => empty === '')
  t.equal(open.filter(([, end]) => end === '/').length * 2, open.length, 'every element is closed')
  t.equal((await ropewalk(...tiny, '--memory', '1g', '--fit', '--svg', path)).code, 0)
  t.match(fs.readFileSync(path, 'utf8'), />a GPU: 1\.07 GB</)
  const lost = await ropewalk(...tiny, '--svg', join(dir, 'none', 'step.svg'))
  t.equal(lost.code, 1)
  t.match(lost.stderr, /^ropewalk: .*none.*step\.svg/)
})

t.test('--paper', async (t) => {
  const { code, stdout, stderr } = await ropewalk('--paper')
  t.equal(code, 0)
  const lines = stdout.split('\n')
  t.match(
    lines[0],
    /^model +context +the paper +exact, device only +leanest, device only +leanest, with host +one 80 GB card$/,
  )
  t.match(lines[3], /^7b +32768 +128 A100 +[\d.]+ GB +[\d.]+ GB +[\d.]+ GB \+ [\d.]+ GB host +with rounding$/)
  t.match(lines[1], / 8192 +32 A100 /)
  t.match(lines[12], /^65b +32768 +not trained .* no: more cards$/)
  t.match(stderr, /model 12\/12 65b, 32768 tokens/)
})

t.test('what cannot be understood ends with code 2, what cannot be with code 1, both with the reason', async (t) => {
  for (const [args, code, message] of [
    [[], 2, /--model is missing: 7b, 13b, .* or the path of a model folder/],
    [['--model', '7b'], 2, /--context is missing/],
    [[...tiny, '--fit'], 2, /--fit needs --device or --memory/],
    [[...tiny, '--offload', 'weights'], 2, /--offload is "weights", but must be checkpoints, optimizer/],
    [[...tiny, '--gradients', 'fuse'], 2, /--gradients is "fuse"; did you mean "fused"\?/],
    [[...tiny, '--moments', '4bit'], 2, /--moments is "4bit"/],
    [[...tiny, '--lora', '0'], 2, /--lora is "0", but must be a whole number of at least 1/],
    [[...tiny, '--lora-targets', 'q_proj'], 2, /--lora-targets needs --lora/],
    [[...tiny, '--lora-alpha', '8'], 2, /--lora-alpha needs --lora/],
    [[...tiny, '--lora', '4', '--lora-alpha', '0'], 2, /--lora-alpha is "0", but must be a number above 0 \(/],
    [[...tiny, '--also-train', 'norm'], 2, /--also-train needs --lora/],
    [['--paper', '--context', '5'], 2, /--paper is a table of its own and takes no --context/],
    [['--model', '8b', '--context', '64'], 1, /there is no model "8b"; did you mean "7b"\?/],
    [['--model', '7b', '--context', '64', '--device', 'h200'], 1, /there is no device "h200"/],
    [[...tiny, '--memory', '24q'], 1, /--memory is "24q", but must be a size such as 24g/],
    [[...tiny, '--lora', '500'], 1, /lora\.rank is 500, but .* is \(64,64\)|\(32,64\): .* above 32/],
    [[...tiny, '--lora', '4', '--lora-targets', 'q'], 1, /lora\.targets has "q"/],
    [
      [...tiny, '--lora', '4', '--lora-targets', 'all,q_proj'],
      2,
      /--lora-targets is "all,q_proj", but all stands alone/,
    ],
    [[...tiny, '--pose', '64'], 1, /pose\.length is 64, but context is 128/],
    [[...tiny, '--checkpoint-layers', '9'], 1, /checkpointLayers is 9, but the model has 4 layers/],
    [[...tiny, '--attention-groups', '3'], 1, /attentionGroups is 3, but must divide/],
    [
      [...tiny, '--dtype', 'float32', '--masters', 'remainder'],
      1,
      /masters is "remainder", but the weights are float32: there is nothing below float32 to keep.* dtype bfloat16/,
    ],
    [[...tiny, '--keep-attention'], 1, /keepAttention is set, but memory\.checkpointLayers is 0/],
    [[...tiny, '--gradients', 'fused', '--accumulate', '2'], 1, /"fused", but accumulate is 2/],
  ] as const) {
    const result = await ropewalk(...args)
    t.same([result.code, result.stdout], [code, ''], args.join(' '))
    t.match(result.stderr, /^ropewalk: [^\n]+\n$/, 'one line')
    t.match(result.stderr, message)
  }
})
