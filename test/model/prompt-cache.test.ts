import { join } from 'node:path'
import t from 'tap'
import { Continuation } from '../../lib/model/generate.js'
import { Llama } from '../../lib/model/llama.js'
import { PromptCache } from '../../lib/model/prompt-cache.js'
import { fixtures } from '../golden.js'

const tokens = (count: number, seed: number): number[] =>
  Array.from({ length: count }, (_, i) => 3 + ((i * i * 7 + seed * 31 + i * seed) % 250))

/** Counts the tokens that are fed. */
function counted(text: Continuation): { count: number } {
  const fed = { count: 0 }
  const feed = text.feed.bind(text)
  text.feed = (ids, signal) => {
    fed.count += ids.length
    return feed(ids, signal)
  }
  return fed
}

t.test('a prompt that begins as the one before gives the same bits for less', async (t) => {
  using model = await Llama.load(join(fixtures, 'gqa-linear4-f32'), { device: 'cpu' })
  const { device, config, weights } = model
  const text = new Continuation(device, config, weights, 1200)
  const fed = counted(text)
  const common = tokens(700, 1)
  for (const [prompt, expected] of [
    [common, 700],
    [[...common.slice(0, 600), ...tokens(300, 2)], 900 - 512],
    [common.slice(0, 530), 530 - 512],
    [common.slice(0, 512), 512 - 256],
    [common.slice(0, 512), 512 - 256],
    [common.slice(0, 100), 100],
    [[...common, ...tokens(333, 3)], 1033],
    [[...tokens(1, 9), ...common], 701],
  ] as const) {
    fed.count = 0
    const logits = await text.start(prompt)
    t.equal(fed.count, expected, `${prompt.length} tokens, ${expected} of them computed`)
    const fresh = new Continuation(device, config, weights, prompt.length + 1)
    t.same(logits, await fresh.feed(prompt), 'the same logits')
    t.same(await text.feed([5]), await fresh.feed([5]), 'and those of the next token')
    fresh.dispose()
  }
  // an evaluation that ends in the middle leaves only what is whole
  await text.start(common)
  const stop = new AbortController()
  stop.abort(new Error('enough'))
  await t.rejects(text.start([...common.slice(0, 300), ...tokens(300, 4)], stop.signal), /enough/)
  fed.count = 0
  await text.start(common)
  t.equal(fed.count, 700 - 256)
  text.dispose()
})

t.test('frequencies that follow the length of the text are computed anew', async (t) => {
  using model = await Llama.load(join(fixtures, 'dynamic4'), { device: 'cpu', dtype: 'float32' })
  const text = new Continuation(model.device, model.config, model.weights, 800)
  const fed = counted(text)
  const common = tokens(512, 1)
  await text.start([...common, ...tokens(100, 2)])
  for (const [more, expected] of [
    [100, 100],
    [101, 613],
  ] as const) {
    fed.count = 0
    const prompt = [...common, ...tokens(more, 3)]
    const logits = await text.start(prompt)
    t.equal(fed.count, expected)
    const fresh = new Continuation(model.device, model.config, model.weights, 800)
    t.same(logits, await fresh.feed(prompt))
    fresh.dispose()
  }
  text.dispose()
})

t.test('generate takes a cache', async (t) => {
  using model = await Llama.load(join(fixtures, 'gqa-linear4-f32'), { device: 'cpu' })
  const say = async (length: number, cache?: PromptCache): Promise<number[]> => {
    const ids: number[] = []
    const prompt = tokens(length, 1)
    for await (const { id } of model.generate({ prompt, maxTokens: 8, stopIds: [], ...(cache && { cache }) }))
      ids.push(id)
    return ids
  }
  using cache = new PromptCache(400)
  const before = model.device.allocatedBytes
  for (const length of [300, 350, 900, 300]) t.same(await say(length, cache), await say(length), `${length} tokens`)
  const first = model.generate({ prompt: [1, 2], cache })
  await first.next()
  await t.rejects(say(3, cache), /in use by another call/)
  t.throws(() => cache.dispose(), /in use/)
  await first.return(undefined)
  t.same(await say(3, cache), await say(3), 'free again')
  cache.dispose()
  t.equal(model.device.allocatedBytes, before, 'its memory is freed')

  using other = await Llama.load(join(fixtures, 'mha-f32'), { device: 'cpu' })
  await say(300, cache)
  const anew = other.generate({ prompt: tokens(300, 1), cache, stopIds: [] })
  const { value } = await anew.next()
  await anew.return(undefined)
  t.match(value, { id: Number }, 'a token')
  const alone = other.generate({ prompt: tokens(300, 1), stopIds: [] })
  t.same(value, (await alone.next()).value, 'another model begins anew')
  await alone.return(undefined)
})
