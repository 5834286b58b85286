import t from 'tap'
import { plan } from '../../lib/index.js'
import { MEMORY_DEFAULTS } from '../../lib/train/memory.js'
import { record } from '../../lib/train/planner.js'
import { readRequest } from '../../lib/train/request.js'
import { memoryTimeline } from '../../lib/train/timeline.js'

const config = {
  ...{ model_type: 'llama', hidden_size: 64, intermediate_size: 176, num_hidden_layers: 4, num_attention_heads: 4 },
  ...{ num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 64 },
}
const sum = (bytes: Record<string, number>): number => Object.values(bytes).reduce((all, one) => all + one, 0)

t.test('memory over a step: its highest moment is the peak of the plan', async (t) => {
  for (const memory of [
    {},
    { checkpointLayers: 1 },
    { checkpointLayers: 2, gradients: 'fused' },
    { checkpointLayers: 1, offloadCheckpoints: true },
  ] as const) {
    const request = { model: config, context: 256, device: 'a100-80g', memory }
    const { peak, bytes } = await plan(request)
    const step = record(await readRequest(request), { ...MEMORY_DEFAULTS, ...memory })
    const moments = memoryTimeline(step, 1e9)
    const [highest] = [...moments].sort((a, b) => sum(b.bytes) - sum(a.bytes))
    t.strictSame(
      highest!.bytes,
      { checkpoint: peak.checkpoints, gradient: peak.gradients, logits: peak.logits, activation: peak.activations },
      JSON.stringify(memory),
    )
    t.strictSame([highest!.part, highest!.phase], [peak.part, peak.phase])
    t.strictSame(
      moments.map(({ operation }) => operation),
      moments.map((_, i) => i),
      'every operation, in order',
    )
    t.ok(moments.every((moment) => sum(moment.bytes) + bytes.gaps <= sum(highest!.bytes) + bytes.gaps))

    // In few columns each shows the most of its stretch.
    const few = memoryTimeline(step, 10)
    const stretch = Math.ceil(moments.length / 10)
    t.equal(few.length, Math.ceil(moments.length / stretch))
    few.forEach((moment, i) => {
      const own = moments.slice(i * stretch, (i + 1) * stretch)
      t.equal(sum(moment.bytes), Math.max(...own.map(({ bytes }) => sum(bytes))))
      t.ok(own.some(({ operation }) => operation === moment.operation))
    })
  }
})

t.test('checkpoints pile up on the way there and go on the way back', async (t) => {
  const step = record(await readRequest({ model: config, context: 256 }), { ...MEMORY_DEFAULTS, checkpointLayers: 1 })
  const moments = memoryTimeline(step, 1e9)
  const turn = moments.findIndex(({ phase }) => phase === 'backward')
  t.ok(turn > 0)
  const kept = moments.map(({ bytes }) => bytes.checkpoint)
  kept.slice(1, turn).forEach((bytes, i) => t.ok(bytes >= kept[i]!, 'rising'))
  kept.slice(turn + 1).forEach((bytes, i) => t.ok(bytes <= kept[turn + i]!, 'falling'))
  // the input of each layer, in bfloat16
  t.equal(Math.max(...kept), 4 * 256 * 64 * 2)
})
