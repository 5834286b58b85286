import t from 'tap'
import { encodePasskey, kmax, passkey, type PasskeyModel, passkeyPrompt, placePasskey } from '../../lib/eval/passkey.js'
import { loadTokenizer } from '../../lib/files/tokenizer.js'
import { Llama } from '../../lib/model/llama.js'
import { fixtures } from '../golden.js'

const tokenizers = Promise.all(
  ['llama2_bytefallback', 'llama3_bytelevel'].map((name) => loadTokenizer(`${fixtures}/tokenizers/${name}.json`)),
)

t.test('the prompt is the paper’s', async (t) => {
  t.equal(
    passkeyPrompt('12345', 2, 1),
    [
      'There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important information there.',
      'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ' +
        'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.',
      'The pass key is 12345. Remember it. 12345 is the pass key.',
      'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.',
      'What is the pass key? The pass key is',
    ].join('\n'),
  )
})

t.test('the pieced encoding is the encoding of the whole prompt', async (t) => {
  for (const tokenizer of await tokenizers) {
    for (const [before, after] of [
      [0, 0],
      [0, 9],
      [9, 0],
      [1, 3],
      [3, 1],
      [2, 2],
      [7, 11],
    ] as const) {
      for (const key of ['10000', '99999', '48213']) {
        const { ids, distance } = encodePasskey(tokenizer, key, before, after)
        const text = passkeyPrompt(key, before, after)
        t.same(ids, tokenizer.encode(text), `${before} ${key} ${after}`)
        const tail = tokenizer.decode(ids.slice(ids.length - distance)).trimStart()
        t.ok(tail.startsWith(key.slice(-3)) || tail.startsWith(key), `the key begins ${distance} tokens from the end`)
        t.ok(text.endsWith(tail) && tail.length > text.length - text.indexOf(key) - 3)
      }
    }
  }
})

t.test('a tokenizer without regular repetitions is asked for the whole prompt', async (t) => {
  // Every third token is merged with what follows, counted from the start: one more repetition shifts all that follow.
  const encode = (text: string): number[] =>
    Array.from({ length: Math.ceil(text.length / 7) }, (_, i) =>
      [...text.slice(i * 7, i * 7 + 7)].reduce((hash, c) => (hash * 31 + c.codePointAt(0)!) >>> 0, i),
    )
  const { ids } = encodePasskey({ encode }, '12345', 5, 6)
  t.same(ids, encode(passkeyPrompt('12345', 5, 6)))
})

t.test('prompts fill the room, and keys are where they should be', async (t) => {
  for (const tokenizer of await tokenizers) {
    const unit =
      tokenizer.encode(passkeyPrompt('12345', 4, 0)).length - tokenizer.encode(passkeyPrompt('12345', 3, 0)).length
    for (const room of [700, 1501, 4096]) {
      let last = 0
      for (const share of [0, 0.25, 0.5, 0.75, 1]) {
        const wanted = Math.round(share * room)
        const { ids, distance } = placePasskey(tokenizer, '31415', wanted, room)
        t.ok(ids.length <= room && ids.length > room - 2 * unit, `${ids.length} tokens of ${room}`)
        const nearest = Math.min(Math.max(wanted, 60), room - 60)
        t.ok(Math.abs(distance - nearest) <= 2 * unit + 60, `distance ${distance}, wanted ${wanted}`)
        t.ok(distance >= last)
        last = distance
      }
    }
    t.throws(() => placePasskey(tokenizer, '31415', 10, 40), /without any filler/)
  }
})

t.test('kmax is the end of the first unbroken stretch', async (t) => {
  const rows = (...accuracies: number[]) => accuracies.map((accuracy, i) => ({ distance: 256 * (i + 1), accuracy }))
  t.equal(kmax(rows(1, 0.5, 0.2, 0.1, 1)), 768)
  t.equal(kmax(rows(0.1, 1, 1)), 0)
  t.equal(kmax(rows(1, 1, 1)), 768)
  t.equal(kmax(rows(1, 0.5, 0.1).reverse()), 512)
})

/** A model that answers as `reply` says of the key and its distance from the end of the prompt, in characters. */
async function fake(reply: (key: string, distance: number) => string): Promise<PasskeyModel & { prompts: string[] }> {
  const [tokenizer] = await tokenizers
  const prompts: string[] = []
  return {
    prompts,
    config: {} as PasskeyModel['config'],
    tokenizer: async () => tokenizer!,
    async *generate({ prompt }) {
      const text = tokenizer!.decode(prompt as number[])
      prompts.push(text)
      const key = /The pass key is (\d{5})/.exec(text)![1]!
      for (const c of reply(key, text.length - text.indexOf(key))) yield { id: 0, text: c }
    },
  }
}

t.test('retrieval is scored by distance, from a seed', async (t) => {
  const perfect = await fake((key) => ` ${key}. Remember`)
  const options = { context: 2000, distances: 4, trials: 3, seed: 7 }
  const progress: number[] = []
  const result = await passkey(perfect, { ...options, onProgress: ({ done, total }) => progress.push(done / total) })
  t.match(result, { kmax: 2000, accuracy: 1, context: 2000 })
  t.same(
    result.distances.map(({ distance }) => distance),
    [500, 1000, 1500, 2000],
  )
  t.equal(progress.length, 12)
  t.ok(result.promptTokens <= 1992 && result.promptTokens > 1800)
  const keys = perfect.prompts.map((text) => /\d+/.exec(text)![0])
  t.ok(keys.every((key) => key.length === 5) && new Set(keys).size > 10, 'five digits, a new key each time')

  const same = await fake((key) => key)
  t.same(await passkey(same, options), result, 'the same seed gives the same prompts')
  t.same(same.prompts, perfect.prompts)
  const other = await fake((key) => key)
  await passkey(other, { ...options, seed: 8 })
  t.not(other.prompts[0], perfect.prompts[0])

  const near = await fake((key, distance) => (distance < 1500 ? key : '00000'))
  const limited = await passkey(near, options)
  t.ok(limited.kmax > 0 && limited.kmax < 2000 && limited.accuracy < 1)
  const wrong = await fake((key) => `x${key}`)
  t.equal((await passkey(wrong, options)).accuracy, 0, 'the answer must begin with the key')
})

t.test('distances with the same prompt are asked for once, at the largest of them', async (t) => {
  const model = await fake((key) => key)
  const totals = new Set<number>()
  const options = {
    context: 256,
    distances: 600,
    trials: 1,
    onProgress: ({ total }: { total: number }) => totals.add(total),
  }
  const { distances, kmax, accuracy } = await passkey(model, options)
  const layouts = new Set(model.prompts.map((text) => text.replaceAll(/\d{5}/g, '')))
  t.equal(layouts.size, distances.length)
  t.equal(model.prompts.length, distances.length, 'each prompt once')
  t.same([...totals], [distances.length])
  const nominal = distances.map(({ distance }) => distance)
  t.strictSame(
    nominal,
    [...new Set(nominal)].sort((a, b) => a - b),
  )
  t.equal(nominal.at(-1), 256)
  t.match({ kmax, accuracy }, { kmax: 256, accuracy: 1 })
})

t.test('mistakes are named', async (t) => {
  const model = await fake((key) => key)
  await t.rejects(passkey(model, { context: 2000, trials: 0 }), /trials is 0/)
  await t.rejects(passkey(model, { context: 2000, seed: -1 }), /seed is -1/)
  await t.rejects(passkey(model, { context: 50 }), /context is 50 tokens.*larger context/)
  await t.rejects(passkey(model, { context: 2000, signal: AbortSignal.abort(new Error('enough')) }), /enough/)
})

t.test('a real model is asked', async (t) => {
  using model = await Llama.load(`${fixtures}/gqa-linear4-f32`, { rope: { type: 'linear', factor: 4 } })
  const result = await passkey(model, { context: 512, distances: 2, trials: 1 })
  t.match(result, { kmax: 0, accuracy: 0 })
})
