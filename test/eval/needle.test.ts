import t from 'tap'
import { wilson } from '../../lib/eval/interval.js'
import { needle } from '../../lib/eval/needle.js'
import type { PasskeyModel } from '../../lib/eval/passkey.js'
import { loadTokenizer } from '../../lib/files/tokenizer.js'
import { Llama } from '../../lib/model/llama.js'
import { PromptCache } from '../../lib/model/prompt-cache.js'
import { fixtures } from '../golden.js'

const tokenizer = loadTokenizer(`${fixtures}/tokenizers/llama2_bytefallback.json`)

/** A model that answers as `reply` says of the key and of where it stands, 0 .. 1. */
function fake(reply: (key: string, depth: number) => string): PasskeyModel & { prompts: string[] } {
  const prompts: string[] = []
  return {
    prompts,
    config: {} as PasskeyModel['config'],
    tokenizer: () => tokenizer,
    async *generate({ prompt }) {
      const text = (await tokenizer).decode(prompt as number[])
      prompts.push(text)
      const key = /The pass key is (\d{5})/.exec(text)![1]!
      for (const c of reply(key, text.indexOf(key) / text.length)) yield { id: 0, text: c }
    },
  }
}

t.test('every cell has its context, its depth and its trials', async (t) => {
  const model = fake((key, depth) => (depth < 0.6 ? ` ${key}.` : '00000'))
  const progress: number[] = []
  const options = { contexts: [1500, 3000], depths: [0, 0.5, 1], trials: 2, seed: 3 }
  const result = await needle(model, { ...options, onProgress: ({ done, total }) => progress.push(done / total) })
  t.match(result, { contexts: [1500, 3000], depths: [0, 0.5, 1], seed: 3, accuracy: 8 / 12 })
  t.same(
    result.cells.map(({ context, depth, accuracy }) => [context, depth, accuracy]),
    [1500, 3000].flatMap((context) => [
      [context, 0, 1],
      [context, 0.5, 1],
      [context, 1, 0],
    ]),
  )
  t.same(result.cells[0]!.interval, wilson(1, 2))
  for (const { context, depth, promptTokens, distance } of result.cells) {
    t.ok(promptTokens <= context - 8 && promptTokens > context - 200, `${promptTokens} of ${context} tokens`)
    t.ok(Math.abs(1 - distance / promptTokens - depth) < 0.1, `depth ${depth}: ${distance} tokens from the end`)
  }
  t.same([progress.length, progress.at(-1)], [12, 1])
  const keys = model.prompts.map((text) => /\d{5}/.exec(text)![0])
  t.equal(new Set(keys).size, 12, 'a new key each time')
  const same = fake((key) => key)
  await needle(same, options)
  t.same(same.prompts, model.prompts, 'the same seed gives the same prompts')
  t.equal((await needle(same, { ...options, contexts: [1500], trials: 1 })).cells.length, 3)
  t.equal((await needle(same, { contexts: [1500], trials: 1 })).cells.length, 11)
})

t.test('prompts share what they have in common, and no answer changes', async (t) => {
  using model = await Llama.load(`${fixtures}/gqa-linear4-f32`)
  const run = async (cached: boolean) => {
    const said: string[][] = []
    const spied: PasskeyModel = {
      config: model.config,
      tokenizer: () => model.tokenizer(),
      async *generate(options) {
        t.ok(options.cache instanceof PromptCache)
        const { cache, ...rest } = options
        const ids: string[] = []
        said.push(ids)
        for await (const token of model.generate({ ...rest, stopIds: [], ...(cached && cache ? { cache } : {}) })) {
          ids.push(`${token.id} ${token.text}`)
          yield token
        }
      },
    }
    const result = await needle(spied, { contexts: [700, 900], depths: [0, 0.5, 1], trials: 2 })
    return { said, result }
  }
  t.same(await run(true), await run(false))
})

t.test('mistakes are named', async (t) => {
  const model = fake((key) => key)
  await t.rejects(needle(model, { contexts: [] }), /contexts must be a list/)
  await t.rejects(needle(model, { contexts: [1500], depths: [] }), /depths must be a list/)
  await t.rejects(needle(model, { contexts: [10.5] }), /contexts: 10.5 must be a whole number/)
  await t.rejects(needle(model, { contexts: [1500], depths: [50] }), /depths: 50 must lie from 0 to 1/)
  await t.rejects(needle(model, { contexts: [1500], trials: 0 }), /trials is 0/)
  await t.rejects(needle(model, { contexts: [1500], seed: 0.5 }), /seed is 0.5/)
  await t.rejects(needle(model, { contexts: [50] }), /context is 50 tokens.*larger context/)
  await t.rejects(needle(model, { contexts: [1500], signal: AbortSignal.abort(new Error('enough')) }), /enough/)
})
