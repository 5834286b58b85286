// What the planner says is what training allocates; the bars of what fits where, which a plan alone decides.
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { type MemoryPlan, plan, type PlanRequest } from '../../lib/index.js'
import { readBatch } from '../../lib/model/batch.js'
import { Llama } from '../../lib/model/llama.js'
import { loraParts, loraTargets } from '../../lib/model/lora.js'
import { findGpu } from '../../lib/train/gpus.js'
import { cachedBytes } from '../../lib/train/host.js'
import type { MemoryOptions } from '../../lib/train/memory.js'
import { AdamW } from '../../lib/train/optimizer.js'
import { readOptions } from '../../lib/train/options.js'
import { TrainingPasses } from '../../lib/train/passes.js'
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js'
import { fixtures } from '../golden.js'

const GB = 1e9
const KV_HEADS = { '7b': 32, '13b': 40, 'llama3.2-1b': 8 }

/** With checkpoints, tiles, groups of heads and fused updates: what the leanest steps have in common. */
const lean = (model: keyof typeof KV_HEADS, more: MemoryOptions = {}): MemoryOptions => ({
  ...{ checkpointLayers: 1, mlpRows: 4096, attentionGroups: KV_HEADS[model], gradients: 'fused', moments: '8bit' },
  ...{ masters: 'stochastic', ...more },
})

// ---- bars ----

t.test('a 65B model at 32k is planned in seconds and little memory', async (t) => {
  const before = process.cpuUsage()
  const { requiredBytes } = await plan({ model: '65b', context: 32768, memory: { checkpointLayers: 1, mlpRows: 4096 } })
  const { user, system } = process.cpuUsage(before)
  t.ok(user + system < 5e6, `${(user + system) / 1e6} s of processor time`)
  t.ok(process.memoryUsage().rss < 500e6, `${process.memoryUsage().rss} bytes resident, the test's own included`)
  t.ok(requiredBytes > 65e9 * (2 + 4 + 12), 'weights, gradients, masters and moments at least')
})

const bars: [string, PlanRequest, { device: number; host?: number }][] = [
  [
    '7B, all weights, 32k: remainders, 8-bit moments, checkpoints on the device',
    { model: '7b', context: 32768, memory: lean('7b', { attentionGroups: 1, masters: 'remainder' }) },
    { device: 56 * GB },
  ],
  ['7B, all weights, 32k: the leanest', { model: '7b', context: 32768, memory: lean('7b') }, { device: 42 * GB }],
  ['13B, all weights, 32k', { model: '13b', context: 32768, memory: lean('13b') }, { device: 75 * GB }],
  [
    '7B, all weights, 131,072 tokens, checkpoints on the host',
    { model: '7b', context: 131072, memory: lean('7b', { offloadCheckpoints: true }) },
    { device: 46 * GB, host: 34.4 * GB },
  ],
  [
    '7B, LoRA of rank 16, 131,072 tokens',
    { model: '7b', context: 131072, lora: { rank: 16 }, memory: { checkpointLayers: 1, mlpRows: 8192 } },
    { device: 64 * GB },
  ],
  [
    'the same, checkpoints on the host',
    {
      ...{ model: '7b', context: 131072, lora: { rank: 16 } },
      memory: { checkpointLayers: 1, mlpRows: 8192, offloadCheckpoints: true },
    },
    { device: 32 * GB, host: 34.4 * GB },
  ],
  [
    'Llama-3.2-1B, all weights, 1,048,576 tokens, on an H200',
    { model: 'llama3.2-1b', context: 2 ** 20, memory: lean('llama3.2-1b', { checkpointLayers: 4, mlpRows: 16384 }) },
    { device: findGpu('h200-141g').capacityBytes },
  ],
]
for (const [name, request, { device, host = 0 }] of bars) {
  t.test(name, async (t) => {
    const { requiredBytes, hostBytes, bytes } = await plan(request)
    t.ok(requiredBytes <= device, `${requiredBytes / GB} GB of ${device / GB}`)
    t.ok(hostBytes <= host, `${hostBytes / GB} GB of the host`)
    t.equal(
      Object.values(bytes).reduce((sum, one) => sum + one),
      requiredBytes,
      'the categories are all of it',
    )
  })
}

// ---- plan() and the trainer's own ----

const config = {
  ...{ model_type: 'llama', hidden_size: 48, intermediate_size: 88, num_hidden_layers: 3, num_attention_heads: 6 },
  ...{ num_key_value_heads: 3, vocab_size: 211, max_position_embeddings: 64, tie_word_embeddings: false },
}

t.test('the same as Trainer.plan says for a model on such a device', async (t) => {
  const options = [
    {},
    { batchSize: 2, accumulate: 3, validation: ['a file'], memory: { checkpointLayers: 2, offloadCheckpoints: true } },
    { lora: { rank: 4, targets: ['q_proj', 'down_proj'], alsoTrain: ['norm'] }, memory: { moments: '8bit' } },
    { pose: { length: 64 } },
  ] as const satisfies Partial<PlanRequest>[]
  for (const dtype of ['float32', 'bfloat16'] as const) {
    for (const [device, planned] of [
      ['dry', 'cpu'],
      ['dry:cuda', undefined],
    ] as const) {
      using model = await Llama.create(config, { device, dtype })
      for (const more of options) {
        const own = new Trainer(model, { context: 32, ...more }).plan()
        const { bytes, ...other } = await plan({ model: config, context: 32, dtype, device: planned, ...more })
        const same: Partial<Record<keyof typeof own, unknown>> = {
          weightsBytes: bytes.weights + bytes.adapter,
          gradientBytes: bytes.gradients - other.peak.gradients,
          optimizerBytes: bytes.optimizer,
          activationBytes: bytes.checkpoints + bytes.activations + bytes.logits + bytes.gaps + other.peak.gradients,
          batchBytes: bytes.batch,
          hostBytes: other.hostBytes,
          totalBytes: other.requiredBytes - bytes.driver,
          flopsPerStep: other.flopsPerStep,
          trafficPerStep: other.trafficPerStep,
          checkpointBytes: other.checkpointBytes,
        }
        t.match(own, same, `${device} ${dtype} ${JSON.stringify(more)}`)
      }
    }
  }
})

t.test('adapters, windows that skip and validation are told', async (t) => {
  const lora = { rank: 4, alsoTrain: ['embed'] as const }
  const request = { model: config, context: 32, device: 'a100-80g', steps: 10 }
  const found: MemoryPlan = await plan({ ...request, lora, pose: { length: 4096 }, validation: ['a file'] })
  t.match(found, { lora: { rank: 4, alpha: 16 }, pose: { length: 4096, chunks: 2 }, validates: true })
  // r (I + O) of q, k, v and o, and the embedding
  const trained = 3 * 4 * (2 * (48 + 48) + 2 * (48 + 24)) + 211 * 48
  t.equal(found.model.trainedCount, trained)
  t.match(found.estimate!.mfuFormula, /4 N \+ 2 n/)
  const all = await plan(request)
  t.equal(all.model.trainedCount, all.model.parameterCount)
  t.equal(all.bytes.adapter, 0)
  t.equal(all.pose, undefined)
  const { seconds, tokensPerSecond, mfu, run } = all.estimate!
  t.equal(tokensPerSecond, 32 / seconds)
  t.ok(Math.abs(mfu - (tokensPerSecond * (6 * all.model.parameterCount + 6 * 3 * 48 * 32)) / 312e12) < 1e-12)
  t.strictSame(run, { steps: 10, seconds: 10 * seconds, joules: 10 * seconds * 400 })
})

t.test('devices and limits', async (t) => {
  const request = { model: config, context: 32 }
  const without = await plan(request)
  t.match(
    [without.fits, without.limitBytes, without.device, without.estimate],
    [undefined, undefined, undefined, undefined],
  )
  t.ok(without.fitsOn.includes('rtx-4090'))
  const need = without.requiredBytes
  for (const [limit, fits] of [
    [need, true],
    [need - 1, false],
    ['24g', true],
    [`${Math.ceil(need / 1e6)}MB`, true],
    [`${Math.floor(need / 1e6)}MB`, false],
  ] as const) {
    t.equal((await plan({ ...request, limit })).fits, fits, `${limit}`)
  }
  const memory = { offloadOptimizer: true }
  const { hostBytes } = await plan({ ...request, memory })
  t.ok(hostBytes > 0)
  t.equal((await plan({ ...request, memory, limit: '1g', hostLimit: hostBytes })).fits, true)
  t.equal((await plan({ ...request, memory, limit: '1g', hostLimit: hostBytes - 1 })).fits, false)
  t.equal((await plan({ ...request, memory, limit: '1g', hostLimit: 0 })).fits, false)
  const cpu = await plan({ ...request, device: 'cpu' })
  t.ok(cpu.fits && cpu.limitBytes! > 0, 'what is free here')
  t.equal(cpu.bytes.driver + cpu.bytes.workspace, 0)
  process.env['ROPEWALK_MEMORY'] = '1m'
  t.teardown(() => delete process.env['ROPEWALK_MEMORY'])
  t.match(await plan({ ...request, device: 'cpu' }), { fits: false, limitBytes: 1 << 20 })
  // all memory is one: what goes to the host is still there
  const fitting = cpu.requiredBytes + 100
  process.env['ROPEWALK_MEMORY'] = String(fitting)
  t.equal((await plan({ ...request, device: 'cpu' })).fits, true)
  t.equal(
    (await plan({ ...request, device: 'cpu', memory: { checkpointLayers: 1, offloadOptimizer: true } })).fits,
    true,
  )
  process.env['ROPEWALK_MEMORY'] = 'much'
  await t.rejects(plan({ ...request, device: 'cpu' }), { message: /^ROPEWALK_MEMORY is "much", but must be a size/ })
})

t.test('files in the page cache of a container count as free', async (t) => {
  const files = new Map([
    ['/proc/self/cgroup', '4:memory:/box/7\n0::/\n'],
    ['/sys/fs/cgroup/memory/memory.stat', 'cache 9\ntotal_inactive_file 30\ninactive_file 3\ntotal_active_file 12\n'],
  ])
  const read = (path: string): string => {
    const text = files.get(path)
    if (text === undefined) throw new Error('ENOENT')
    return text
  }
  t.equal(cachedBytes(read), 42, 'version 1, of whose group only the root is seen')
  files.set('/sys/fs/cgroup/memory/box/7/memory.stat', 'total_inactive_file 1\ntotal_active_file 2\n')
  t.equal(cachedBytes(read), 3)
  files.clear()
  t.equal(cachedBytes(read), 0)
  files.set('/proc/self/cgroup', '0::/app\n')
  files.set('/sys/fs/cgroup/app/memory.stat', 'anon 5\nfile 6\nactive_file 7\ninactive_file 0\n')
  t.equal(cachedBytes(read), 7, 'version 2')
})

t.test('models: names, folders, files and contents', async (t) => {
  const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-plan-'))
  t.teardown(() => fs.rmSync(dir, { recursive: true }))
  const path = join(dir, 'some.json')
  fs.writeFileSync(path, JSON.stringify(config))
  const named = await plan({ model: path, context: 32 })
  const given = await plan({ model: config, context: 32 })
  t.strictSame({ ...named, model: 0 }, { ...given, model: 0 })
  t.equal(named.model.name, path)
  const folder = join(fixtures, 'mha-bf16')
  t.equal((await plan({ model: folder, context: 32 })).model.name, folder)
  t.equal(
    (await plan({ model: 'llama3.2-1b', context: 32 })).model.parameterCount,
    1235814400,
    "the model's own figure",
  )
  t.equal((await plan({ model: '65b', context: 32 })).model.parameterCount, 65285660672)
})

t.test('what cannot be is refused with the reason and what works', async (t) => {
  const request = { model: '7b', context: 64 }
  for (const [more, name, message] of [
    [{ model: '8b' }, 'RangeError', /^there is no model "8b"; did you mean "7b"\? Known are 7b, 13b/],
    [{ model: 'llama9' }, 'RangeError', /^there is no model "llama9".*known are 7b.*or the path/i],
    [{ model: 7 }, 'TypeError', /^model is 7, but must be a folder/],
    [{ model: { model_type: 'gpt2' } }, 'RopewalkError', /config: model_type/],
    [{ context: undefined }, 'TypeError', /^context is missing/],
    [{ context: 1.5 }, 'RangeError', /^context is 1.5, but must be a whole number/],
    [{ contxt: 5 }, 'TypeError', /^unknown option "contxt"; did you mean "context"\?/],
    [{ device: 'a100' }, 'RangeError', /^there is no device "a100"; known are a100-40g/],
    [{ device: 'abacus' }, 'RangeError', /^there is no device "abacus"; known are a100-40g, .*, cpu$/],
    [{ device: 5 }, 'TypeError', /^device must be a name/],
    [{ limit: '24q' }, 'RangeError', /^limit is "24q", but must be a size such as 24g/],
    [{ limit: 0 }, 'RangeError', /^limit is 0/],
    [{ dtype: 'float16' }, 'RangeError', /^dtype is "float16"/],
    [{ memory: 'auto' }, 'TypeError', /^memory is 'auto', which a trainer takes.*fit\(\) finds them/],
    [{ memory: { checkpointLayers: 33 } }, 'RangeError', /checkpointLayers is 33, but the model has 32 layers.*1 to 4/],
    [{ memory: { attentionGroups: 5 } }, 'RangeError', /attentionGroups is 5, but must divide the model's 32/],
    [{ lora: { rank: 5000 } }, 'RangeError', /^lora.rank is 5000, but .*\(4096,4096\).* above 4096/],
    [{ lora: { targets: ['q'] } }, 'RangeError', /^lora.targets has "q"/],
    [{ pose: { length: 8 } }, 'RangeError', /^pose.length is 8, but context is 64/],
    [{ memory: { gradients: 'fused' }, accumulate: 2 }, 'RangeError', /"fused", but accumulate is 2/],
  ] as const) {
    await t.rejects(plan({ ...request, ...more } as never), { name, message }, JSON.stringify(more))
  }
  await t.rejects(plan(undefined as never), { name: 'TypeError', message: /^the request is undefined/ })
})

// ---- 200 random steps: what is planned is what is allocated ----

/** xorshift32: a seeded stream of numbers below n. */
function dice(seed: number): (n: number) => number {
  let state = seed
  return (n) => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) % n
  }
}

interface Drawn {
  config: Record<string, unknown>
  dtype: 'float32' | 'bfloat16'
  options: TrainerOptions
}

function draw(below: (n: number) => number): Drawn {
  const pick = <T>(...values: readonly T[]): T => values[below(values.length)]!
  const [layers, kvHeads, headDim] = [1 + below(3), 1 + below(2), pick(8, 16)]
  const heads = kvHeads * (1 + below(2))
  const tied = below(2) === 0
  const config = {
    ...{ model_type: 'llama', hidden_size: heads * headDim, intermediate_size: 8 * (1 + below(5)) },
    ...{ num_hidden_layers: layers, num_attention_heads: heads, num_key_value_heads: kvHeads },
    ...{ vocab_size: 30 + below(60), max_position_embeddings: 64, tie_word_embeddings: tied },
  }
  const [batchSize, context, accumulate] = [1 + below(2), 2 + below(20), pick(1, 1, 2)]
  const checkpointLayers = below(layers + 1)
  const dtype = pick('float32', 'bfloat16')
  const memory: MemoryOptions = {
    ...{ checkpointLayers, mlpRows: below(batchSize * context), attentionGroups: pick(1, kvHeads) },
    logitsRows: below(batchSize * context),
    ...(checkpointLayers > 0 && { keepAttention: below(2) === 0, offloadCheckpoints: below(2) === 0 }),
    gradients: accumulate > 1 ? pick('float32', 'bfloat16') : pick('float32', 'bfloat16', 'fused'),
    masters: dtype === 'float32' ? 'float32' : pick('float32', 'remainder', 'stochastic'),
    moments: pick('float32', 'bfloat16', '8bit'),
    offloadOptimizer: below(3) === 0,
  }
  const targets = loraTargets.filter(() => below(2) === 0)
  const lora = below(3) === 0 && {
    ...{ rank: 1 + below(6), targets: targets.length > 0 ? targets : loraTargets },
    alsoTrain: loraParts.filter((part) => below(2) === 0 && !(tied && part === 'head')),
  }
  const options: TrainerOptions = {
    ...{ context, batchSize, accumulate, memory, maxGradNorm: below(2) },
    ...(lora && { lora }),
    ...(below(4) === 0 && { validation: 'a file' }),
  }
  return { config, dtype, options }
}

/** A step as the trainer takes it; what is wrong with its memory, if anything. */
async function unplanned(device: string, { config, dtype, options }: Drawn): Promise<string | undefined> {
  const planned = await plan({ model: config, dtype, ...options, ...(device === 'cpu' && { device }) } as PlanRequest)
  using model = await Llama.create(config, { device, dtype, seed: 1, threads: 1 })
  const settings = readOptions(options)
  const { batchSize, accumulate, memory, validation, lora } = settings
  if (lora) await model.addAdapter(lora, 1)
  const optimizer = new AdamW((model.lora ?? model.weights).segments(), settings)
  await optimizer.reset()
  const shape = [batchSize, settings.context!, accumulate] as const
  const passes = new TrainingPasses(model.config, model.weights, optimizer, ...shape, validation !== undefined, memory)
  const batches = Array.from({ length: accumulate }, (_, n) => {
    const row = (b: number) => Array.from({ length: settings.context! }, (_, i) => (7 * i + 3 * b + n) % 30)
    return readBatch(
      Array.from({ length: batchSize }, (_, b) => row(b)),
      model.config,
    )
  })
  const { applied, loss } = await passes.step(batches, 1e-3)
  if (validation !== undefined) await passes.losses(batches[0]!)
  const { allocatedBytes, peakAllocatedBytes, hostBytes } = model.device
  const wanted = planned.requiredBytes - planned.bytes.driver
  // The emulator counts by itself what it was asked for; nobody else uses it.
  const { totalBytes = wanted, freeBytes = 0 } = model.device.memory() ?? {}
  const counted = totalBytes - freeBytes
  passes.dispose()
  optimizer.dispose()
  const onDevice = [allocatedBytes, peakAllocatedBytes, counted].every((bytes) => bytes === wanted)
  if (applied && Number.isFinite(loss) && onDevice && hostBytes === planned.hostBytes) return undefined
  return `${allocatedBytes}, at most ${peakAllocatedBytes}, counted ${counted}, of ${wanted}; host ${hostBytes} of ${planned.hostBytes}; ${loss}`
}

const CONFIGURATIONS = 200
// All of them are executed on both, each for one step: some ten milliseconds on the CPU, 0.2 s on the emulator.
for (const [device, skip] of [
  ['cpu', false],
  ['simt', process.env['ROPEWALK_SIMT_LIBRARY'] === undefined && 'skipped: ROPEWALK_SIMT_LIBRARY names no library'],
] as const) {
  t.test(`planned is allocated, to the byte: ${CONFIGURATIONS} random steps on ${device}`, { skip }, async (t) => {
    const below = dice(2306)
    const wrong: string[] = []
    const seen = new Set<string>()
    for (let i = 0; i < CONFIGURATIONS; i++) {
      const drawn = draw(below)
      const { memory, lora, accumulate, validation } = drawn.options
      for (const [name, value] of Object.entries(memory as object))
        seen.add(`${name} ${Number(value) > 1 ? 'n' : value}`)
      seen
        .add(`lora ${lora !== undefined}`)
        .add(`accumulate ${accumulate}`)
        .add(`validation ${validation !== undefined}`)
      const problem = await unplanned(device, drawn)
      if (problem !== undefined) wrong.push(`${i}: ${JSON.stringify(drawn)}: ${problem}`)
    }
    t.strictSame(wrong, [])
    t.ok(seen.size > 25, `of all kinds: ${[...seen].sort().join(', ')}`)
  })
}
