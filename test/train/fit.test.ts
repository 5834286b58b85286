// The search for what fits: its estimates are exact, what it finds fits, and where nothing does it says what would.
import t from 'tap'
import { fit, type FitSet, plan, type PlanRequest } from '../../lib/index.js'
import { Finder } from '../../lib/train/finder.js'
import { leanestSets } from '../../lib/train/fit.js'
import type { MemoryOptions } from '../../lib/train/memory.js'
import { readRequest } from '../../lib/train/request.js'

/** Windows are long enough to be computed in tiles. */
const config = {
  ...{ model_type: 'llama', hidden_size: 64, intermediate_size: 176, num_hidden_layers: 6, num_attention_heads: 4 },
  ...{ num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 64 },
}
const request: PlanRequest = { model: config, context: 4096, device: 'a100-80g' }

/** Bytes with everything kept, and with as little as can be. */
const needs = async (more: Partial<PlanRequest> = {}) => {
  const { requiredBytes: all } = await plan({ ...request, ...more })
  const { exact, leanest, offloaded } = await leanestSets({ ...request, ...more })
  const bytes = ({ plan }: FitSet): number => plan.requiredBytes
  return { all, exact: bytes(exact), leanest: bytes(leanest), offloaded: bytes(offloaded) }
}

t.test('estimates from a few layers are those of the whole', async (t) => {
  const deep = { ...config, num_hidden_layers: 19 }
  for (const more of [{}, { dtype: 'float32', lora: { rank: 4 } }] as Partial<PlanRequest>[]) {
    const finder = new Finder(await readRequest({ ...request, model: deep, ...more }), {})
    const seen = new Set<string>()
    for (const { memory, requiredBytes, hostBytes, seconds } of finder.candidates()) {
      const { checkpointLayers, keepAttention, offloadCheckpoints, mlpRows, attentionGroups, gradients } = memory
      const key = [checkpointLayers, keepAttention, offloadCheckpoints, mlpRows, attentionGroups, gradients === 'fused']
      if (seen.has(key.join())) continue
      seen.add(key.join())
      const { plan, slowdown } = finder.exactly(memory)
      t.equal(hostBytes, plan.hostBytes)
      // But for room between tensors that live at other times, which is not the same in each layer.
      const off = requiredBytes / plan.requiredBytes - 1
      t.ok(off < 1e-12 && off > (memory.offloadCheckpoints ? -0.005 : -1e-12), `${off}: ${JSON.stringify(memory)}`)
      const whole = slowdown * finder.plainSeconds
      t.ok(Math.abs(seconds / whole - 1) < 1e-9, `${seconds} s, ${whole}`)
    }
    t.ok(seen.size > 50, `${seen.size} ways`)
  }
})

t.test('what is found fits, and none of it is beaten by another one', async (t) => {
  const { all, exact, leanest, offloaded } = await needs()
  t.ok(offloaded < leanest && leanest < exact && exact < all, `${offloaded} ${leanest} ${exact} ${all}`)
  for (const [limit, kinds] of [
    [all, [true]],
    [all - 1, [true, false]],
    [exact, [true, false]],
    [exact - 1, [true, false]],
    [leanest, [true, false]],
    [leanest - 1, [true, false]],
    [offloaded, [true, false]],
  ] as const) {
    const told: number[] = []
    const { sets, problem } = await fit({ ...request, limit }, { onProgress: (done, total) => told.push(done / total) })
    t.equal(problem, undefined)
    t.ok(told.length > 10 && told.every((part, i) => part < 1 && part >= (told[i - 1] ?? 0)), 'progress is told')
    for (const { memory, plan: found, exact, costs } of sets) {
      t.ok(found.fits && found.requiredBytes <= limit)
      t.ok((kinds as readonly boolean[]).includes(exact))
      t.equal(exact, !costs.some((cost) => cost.includes('rounded')), costs.join())
      const again = await plan({ ...request, limit, memory })
      t.strictSame(again, found, 'plan() of the same options says the same')
    }
    // Remainders are the same masters in less memory.
    if (limit === all) t.strictSame(sets[0]!.memory, { masters: 'remainder' }, 'everything, if it fits')
    for (const group of [sets.filter(({ exact }) => exact), sets.filter(({ exact }) => !exact)]) {
      group.forEach((set, i) => {
        t.ok(set.slowdown >= (group[i - 1]?.slowdown ?? 0.99), 'in the order of time')
        for (const other of group.slice(0, i)) {
          const [own, others] = [set, other].map(({ costs }) => costs.filter((cost) => cost.includes('rounded')).length)
          const held = (one: FitSet): boolean => one.plan.memory.gradients !== 'fused'
          const better = own! < others! || (held(set) && !held(other)) || set.plan.hostBytes < other.plan.hostBytes
          t.ok(better || set.slowdown < 1.02 * other.slowdown, 'slower, but for a reason')
        }
      })
    }
  }
})

t.test('options that are given stay as they are', async (t) => {
  const { leanest, exact } = await needs()
  for (const memory of [
    { moments: '8bit' },
    { offloadCheckpoints: true },
    { keepAttention: true, masters: 'remainder' },
    { checkpointLayers: 3, mlpRows: 512, gradients: 'bfloat16', attentionGroups: 2 },
    { gradients: 'fused', moments: undefined },
  ] as MemoryOptions[]) {
    const { sets } = await fit({ ...request, limit: exact + (exact - leanest), memory })
    t.ok(sets.length > 0, JSON.stringify(memory))
    for (const { plan } of sets) {
      for (const [name, value] of Object.entries(memory)) {
        if (value !== undefined) t.equal(plan.memory[name as keyof MemoryOptions], value, name)
      }
    }
  }
  const wide = await fit({ ...request, dtype: 'float32', limit: 4 * exact })
  t.ok(wide.sets.length > 0 && wide.sets.every(({ memory }) => memory.masters === undefined), 'float32 has no masters')
  await t.rejects(fit({ ...request, dtype: 'float32', limit: exact, memory: { masters: 'remainder' } }), /float32/)
  const accumulated = await fit({ ...request, limit: exact, accumulate: 2 })
  t.ok(accumulated.sets.length > 0 && accumulated.sets.every(({ memory }) => memory.gradients !== 'fused'))
  const noHost = await fit({ ...request, limit: leanest, hostLimit: 0 })
  t.ok(noHost.sets.length > 0 && noHost.sets.every(({ plan }) => plan.hostBytes === 0))
  const here = await fit({ ...request, device: 'cpu', limit: exact })
  t.ok(here.sets.length > 0 && here.sets.every(({ plan }) => plan.hostBytes === 0), 'a CPU has but one memory')
  const adapter = await fit({ ...request, limit: exact, lora: { rank: 4 } })
  t.ok(adapter.sets.length > 0 && adapter.sets.every(({ memory }) => memory.masters === undefined), 'in float32')
})

t.test('where nothing fits: why, and the nearest that does', async (t) => {
  const { offloaded } = await needs()
  const limit = offloaded - 1
  const { sets, problem } = await fit({ ...request, limit })
  t.strictSame(sets, [])
  t.match(problem!.reason, /^a100-80g has 0\.7 GB: 1 x 4096 tokens leave too little room for activations$/)
  t.equal(problem!.missingBytes, 1)
  t.equal(problem!.leanest.plan.requiredBytes, offloaded)
  const { context, batchSize, set } = problem!.nearest!
  t.ok(context > 2048 && context < 4096 && batchSize === 1, `${context}`)
  t.equal((await plan({ ...request, limit, context, memory: set.memory })).fits, true)
  t.ok((await needs({ context: context + 128 })).offloaded > limit, 'and hardly more does')
  t.equal(problem!.adapter?.plan.fits, true)
  t.equal(problem!.adapter!.plan.lora!.rank, 8)

  const { offloaded: held } = await needs({ accumulate: 3 })
  t.ok(held > offloaded, 'gradients of several passes are held')
  const wide = await fit({ ...request, batchSize: 3, limit: held })
  t.match(wide.problem!.nearest, { context: 4096, batchSize: 1, accumulate: 3 })
  const { offloaded: two } = await needs({ batchSize: 2, accumulate: 2 })
  const pairs = await fit({ ...request, batchSize: 4, limit: two })
  t.match(pairs.problem!.nearest, { context: 4096, batchSize: 2, accumulate: 2 }, 'as many in a pass as fit')
  const fused = await fit({ ...request, batchSize: 3, limit: offloaded, memory: { gradients: 'fused' } })
  t.match(fused.problem!.nearest, { context: 4096, batchSize: 1, accumulate: 1 })

  // 600 MiB of it are the driver's
  const hopeless = await fit({ ...request, limit: (632 << 20) + 100_000 })
  t.match(hopeless.problem!.reason, /are 0\.7 GB whatever the context is$/)
  t.equal(hopeless.problem!.nearest, undefined)
  t.equal(hopeless.problem!.adapter, undefined)

  const host = await fit({ ...request, limit: '80g', hostLimit: 0, memory: { offloadOptimizer: true } })
  t.equal(host.problem!.missingBytes, 0, 'it is the host that has too little')
  await t.rejects(fit({ ...request, device: undefined } as never), { message: /^neither device nor limit is given/ })
  await t.rejects(fit({ ...request, memory: { moments: '4bit' as never } }), { message: /^memory.moments is "4bit"/ })
  await t.rejects(fit({ ...request, memory: 'small' as never }), { message: /^memory is "small"/ })
})

t.test('13B at 32k, all weights, on one 80 GB card without the host', async (t) => {
  const { sets } = await fit({ model: '13b', context: 32768, device: 'a100-80g', hostLimit: 0 })
  t.ok(sets.length > 0)
  for (const { plan } of sets) t.ok(plan.fits && plan.hostBytes === 0 && plan.requiredBytes < plan.limitBytes!)
})
