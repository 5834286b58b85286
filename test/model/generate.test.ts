import t from 'tap'
import { sampler, uniform } from '../../lib/model/generate.js'

const logits = Float32Array.from({ length: 40 }, (_, i) => ((i * 7919) % 101) / 12)

t.test('what may be sampled is what transformers leaves, as often as it is likely', async (t) => {
  // Tokens that TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper of transformers 5.18 keep of these logits.
  const kept: [temperature: number, topK: number, topP: number, ids: number[]][] = [
    [0.5, 0, 0.95, [2, 7, 12, 17, 22, 27, 32, 39]],
    [1, 0, 0.95, [2, 4, 7, 9, 12, 14, 17, 19, 22, 24, 27, 29, 32, 34, 39]],
    [1, 0, 0.5, [17, 22, 27, 32]],
    [2, 0, 0.3, [17, 22, 27, 32]],
    [1, 5, 0.8, [17, 22, 27, 32]],
    [0.5, 0, 0.01, [32]],
  ]
  const draws = 20_000
  for (const [temperature, topK, topP, ids] of kept) {
    const choose = sampler({ temperature, topK, topP, seed: 4 })
    const counts = new Map<number, number>()
    for (let n = 0; n < draws; n++) {
      const id = choose(logits)
      counts.set(id, (counts.get(id) ?? 0) + 1)
    }
    const what = `temperature ${temperature}, topK ${topK}, topP ${topP}`
    t.strictSame(
      [...counts.keys()].sort((a, b) => a - b),
      ids,
      what,
    )
    const weights = ids.map((id) => Math.exp(logits[id]! / temperature))
    const total = weights.reduce((sum, weight) => sum + weight, 0)
    const chi = ids.reduce((sum, id, i) => {
      const expected = (draws * weights[i]!) / total
      return sum + (counts.get(id)! - expected) ** 2 / expected
    }, 0)
    // far above the 99.9 % quantile of each
    t.ok(chi < 3 * ids.length + 15, `${what}: chi-square ${chi.toFixed(1)} of ${ids.length} tokens`)
  }
})

t.test('the same seed draws the same tokens', async (t) => {
  const draw = (seed: number): number[] => {
    const choose = sampler({ temperature: 0.5, topP: 0.95, seed })
    return Array.from({ length: 50 }, () => choose(logits))
  }
  t.strictSame(draw(7), draw(7))
  t.notSame(draw(7), draw(8))
  t.equal(sampler({})(logits), 32, 'without a temperature the most likely')
  const numbers = Array.from({ length: 1000 }, uniform(1))
  t.ok(numbers.every((value) => value >= 0 && value < 1))
  t.ok(Math.abs(numbers.reduce((sum, value) => sum + value, 0) / 1000 - 0.5) < 0.03)
})
