import { join } from 'node:path'
import t from 'tap'
import { readBatch } from '../../lib/model/batch.js'
import { Llama } from '../../lib/model/llama.js'
import { disposePass, recordPass } from '../../lib/model/passes.js'
import { chooseScored, scatter } from '../../lib/model/scored.js'
import { Device } from '../../lib/runtime/device.js'
import { fixtures } from '../golden.js'

const tokens = (count: number, seed: number, vocabulary = 250): number[] =>
  Array.from({ length: count }, (_, i) => 3 + ((i * i * 7 + seed * 31 + i * seed) % (vocabulary - 3)))

/** Labels of a row: the token where `counts`, else -100. */
const label = (row: readonly number[], counts: (t: number) => boolean): number[] =>
  row.map((id, t) => (counts(t) ? id : -100))

const medium = {
  model_type: 'llama',
  ...{ hidden_size: 320, intermediate_size: 520, num_hidden_layers: 2, num_attention_heads: 5, num_key_value_heads: 5 },
  ...{ head_dim: 64, vocab_size: 9000, max_position_embeddings: 2048, rms_norm_eps: 1e-5, tie_word_embeddings: true },
}

t.test('losses of some positions are the same bits as those of all', async (t) => {
  const load = (name: string) => Llama.load(join(fixtures, name), { device: 'cpu' })
  for (const [name, open, times] of [
    ['gqa-linear4-f32', () => load('gqa-linear4-f32'), [200, 500]],
    ['dynamic4', () => load('dynamic4'), [300]],
    ['mha-bf16', () => load('mha-bf16'), [200]],
    ['medium', () => Llama.create(medium, { device: 'cpu', seed: 3 }), [129, 400, 1030]],
  ] as const) {
    using model = await open()
    for (const time of times) {
      const rows = [tokens(time, 1), tokens(time, 2)]
      for (const [what, counts] of [
        ['the last', (t: number) => t >= time - 60],
        ['the last but one', (t: number) => t >= time - 65 && t < time - 1],
        ['scattered ones', (t: number) => (t * 31) % 97 < 30],
        ['one', (t: number) => t === 7],
        ['none', () => false],
      ] as const) {
        const labels = rows.map((row, b) => label(row, (t) => counts(t + b)))
        const few = await model.tokenLosses(rows, { labels })
        t.same(few.dims, [2, time])
        const all = await model.tokenLosses(rows)
        const expected = all.data.map((nll, n) => {
          const [b, next] = [Math.floor(n / time), (n % time) + 1]
          return next < time && labels[b]![next] !== -100 ? nll : 0
        })
        t.same(few.data, expected, `${name}, ${time}: ${what}`)
        t.ok(what === 'none' || few.data.some((nll) => nll > 0))
      }
    }
  }
})

t.test('packed texts and positions of their own', async (t) => {
  using model = await Llama.load(join(fixtures, 'gqa-linear4-f32'), { device: 'cpu' })
  const row = tokens(400, 5)
  const positions = [row.map((_, t) => (t < 150 ? t : t - 150 + 1000))]
  const first = [row.map((_, t) => (t < 150 ? 0 : 150))]
  const labels = [label(row, (t) => t % 5 === 0)]
  const few = await model.tokenLosses([row], { labels, positions, first })
  const all = await model.tokenLosses([row], { positions, first })
  t.same(
    few.data,
    all.data.map((nll, t) => ((t + 1) % 5 === 0 && t + 1 < 400 ? nll : 0)),
  )
})

t.test('only what is needed is computed', async (t) => {
  const device = Device.open('dry')
  const model = await Llama.create(medium, { device: 'dry' })
  const { config, weights } = model
  const [time, count] = [2048, 256]
  const flops = (scored?: number): number => {
    const pass = recordPass(weights.device, config, weights, 'loss', 1, time, scored === undefined ? {} : { scored })
    const { flops } = pass.plan
    disposePass(pass)
    return flops
  }
  const { hidden_size: c, intermediate_size: f, vocab_size: v, num_attention_heads: heads, head_dim: d } = medium
  // of each position that is not scored: queries, output and MLP of the last block, the final norm and the logits
  const left = (time - count) * (2 * (2 * c * heads * d) + 6 * c * f + 5 * f + 4 * c + 4 * c + 2 * c * v)
  const attention = 2 * heads * d * time * (time + 1)
  const few = 4 * heads * d * count * time + 3 * time * heads * d
  t.equal(flops(), flops(count) + left + attention - few)
  device.dispose()
  model.dispose()
})

t.test('choosing and scattering', async (t) => {
  const { config } = await Llama.load(join(fixtures, 'gqa-linear4-f32'), { device: 'dry' })
  const row = tokens(200, 1)
  const choose = (counts: (t: number, b: number) => boolean) =>
    chooseScored(readBatch([row, row], config, { labels: [0, 1].map((b) => label(row, (t) => counts(t, b))) }))
  t.equal(
    choose(() => true),
    undefined,
  )
  t.equal(choose((t) => t > 70)?.count, undefined, '129 of 200 are too many: 192')
  t.equal(choose((t) => t === 7)?.count, 128, '2 x 64 would be summed in another order')
  const scored = choose((t, b) => t > 100 + b * 50)!
  t.equal(scored.count, 128)
  t.same([scored.rows[0], scored.rows[98], scored.rows[99], scored.rows[128]], [100, 198, 0, 350])
  t.same([scored.labels[98], scored.labels[99], scored.labels[128]], [row[199], -1, row[151]])
  const all = scatter(
    Float32Array.from({ length: 256 }, (_, i) => i + 1),
    scored,
    400,
  )
  t.same([all[99], all[100], all[198], all[199], all[350]], [0, 1, 99, 0, 129])
})
