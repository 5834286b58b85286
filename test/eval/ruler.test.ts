import t from 'tap'
import { wilson } from '../../lib/eval/interval.js'
import type { PasskeyModel } from '../../lib/eval/passkey.js'
import { Fit, matched, ruler, type RulerOptions, seedOf } from '../../lib/eval/ruler.js'
import { builderOf, type Material, type RulerTask, rulerTasks } from '../../lib/eval/ruler-tasks.js'
import { Draw } from '../../lib/eval/ruler-words.js'
import { loadTokenizer } from '../../lib/files/tokenizer.js'
import { Llama } from '../../lib/model/llama.js'
import { fixtures } from '../golden.js'

const tokenizers = Promise.all(
  ['llama2_bytefallback', 'llama3_bytelevel'].map((name) => loadTokenizer(`${fixtures}/tokenizers/${name}.json`)),
)

const material: Material = {
  context: 8192,
  shots: 1,
  text: undefined,
  words: undefined,
  count: (text) => text.length / 4,
}
const build = (task: RulerTask, size: number, seed = 1, more: Partial<Material> = {}) =>
  builderOf(task, { ...material, ...more }).build(new Draw(seed), size)

/** The answer to a prompt, found by reading it. */
function solve(prompt: string): string[] {
  const asked = prompt.slice(prompt.lastIndexOf('\nQuestion: ') + 1)
  const frequent = (words: string[], n: number): string[] => {
    const counts = new Map<string, number>()
    for (const word of words) counts.set(word, (counts.get(word) ?? 0) + 1)
    return [...counts]
      .sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1))
      .slice(0, n)
      .map(([word]) => word)
  }
  if (prompt.includes('special magic')) {
    const keys = /\nWhat .* the special magic \w+ for (.*) mentioned in the provided text\?/
      .exec(prompt)![1]!
      .split(/, (?:and )?/)
    const found = [...prompt.matchAll(/special magic (?:numbers|uuids) for (\S+) is: (\S+)\./g)]
    return keys.flatMap((key) => found.filter(([, name]) => name === key).map(([, , value]) => value!))
  }
  if (prompt.includes('VAR ')) {
    const value = /assigned the value (\d+) in/.exec(asked)![1]!
    const known = new Set<string>()
    for (const [, name, from] of prompt.matchAll(/VAR (\w+) = (?:VAR )?(\w+)/g))
      if (from === value || known.has(from!)) known.add(name!)
    return [...known]
  }
  if (prompt.includes('numbered list')) {
    const list = prompt.slice(prompt.lastIndexOf('Below is a numbered list'), prompt.lastIndexOf('\nQuestion'))
    return frequent(
      [...list.matchAll(/\d+\. (\S+)/g)].map(([, word]) => word!),
      10,
    )
  }
  const coded = prompt.slice(prompt.indexOf('coded words. ') + 13, prompt.lastIndexOf('\nQuestion')).split(' ')
  return frequent(
    coded.filter((word) => word !== '...'),
    3,
  )
}

t.test('the references are what the prompt says', async (t) => {
  for (const task of rulerTasks) {
    for (const [size, seed] of [
      [80, 1],
      [200, 2],
      [333, 3],
    ] as const) {
      for (const more of [
        {},
        { shots: 0 },
        { context: 2000 },
        { text: 'Here is one. And two of them! No?'.split(' ') },
      ] as const) {
        const { text, references } = build(task, size, seed, more)
        t.same([...references].sort(), solve(text).sort(), `${task} of ${size}`)
        t.notMatch(text, /undefined|NaN/)
      }
    }
  }
})

t.test('the wording is RULER’s', async (t) => {
  const single = build('niah_single_1', 3)
  const [key, value] = /for (\S+) is: (\S+)\./.exec(single.text)!.slice(1)
  const noise = 'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.'
  const needle = `One of the special magic numbers for ${key} is: ${value}.`
  t.equal(
    single.text.replace(`${needle}\n`, ''),
    'A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the ' +
      `number afterwards.\n${[noise, noise, noise].join('\n')}\nWhat is the special magic number for ${key} mentioned in ` +
      `the provided text? The special magic number for ${key} mentioned in the provided text is`,
  )
  t.match(value, /^\d{7}$/)
  const uuid = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/
  const other = build('niah_multikey_3', 50)
  t.match(other.references[0], uuid)
  t.match(other.text, /^A special magic uuid is hidden.*\nOne of the special magic uuids for [0-9a-f-]{36} is: /)
  t.equal([...other.text.matchAll(/ is: /g)].length, 51, 'needles among needles')
  const many = build('niah_multiquery', 20)
  t.match(many.text, /^Some special magic numbers are hidden within .* quiz you about the numbers afterwards\.\n/)
  t.match(
    many.text,
    /\nWhat are all the special magic numbers for (\S+, ){3}and \S+ mentioned in the provided text\? The special magic numbers for (\S+, ){3}and \S+ mentioned in the provided text are$/,
  )
  t.equal(many.references.length, 4)
  t.match(
    build('vt', 8).text,
    /\nQuestion: Find all variables that are assigned the value (\d+) in the text above\. Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assigned the value \1, they are: $/,
  )
  t.match(
    build('vt', 8, 1, { shots: 0 }).text,
    /^Memorize and track the chain\(s\) of variable assignment hidden in the following text\.\n\n/,
  )
  const example = build('vt', 8).text.split('\n\n')
  t.equal(example.length, 4, 'one example, one question')
  t.match(example[1], /they are: {2}[A-Z]{3}( [A-Z]{3}){4}$/)
})

t.test('words stand in the lists as often as they should', async (t) => {
  const times = (text: string, word: string): number => text.split(/\s+/).filter((one) => one === word).length
  const long = build('cwe', 60, 1, { shots: 0 })
  t.same(
    long.references.map((word) => times(long.text, word)),
    Array(10).fill(30),
  )
  t.equal([...long.text.matchAll(/\d+\. /g)].length, 10 * 30 + 50 * 3)
  const short = build('cwe', 60, 1, { shots: 0, context: 4095 })
  t.equal([...short.text.matchAll(/\d+\. /g)].length, 10 * 6 + 50)
  const own = ['one', 'two', ...Array.from({ length: 40 }, (_, i) => `word${i}`)]
  t.ok(build('cwe', 42, 1, { words: own }).references.every((word) => own.includes(word)))
  const coded = build('fwe', 1000)
  // 1000 k^-2 / zeta(2), k = 1 .. 4, rounded down
  t.equal(times(coded.text, '...'), 607)
  t.same(
    coded.references.map((word) => times(coded.text, word)),
    [151, 67, 37],
  )
})

t.test('prompts are as long as the context allows', async (t) => {
  for (const tokenizer of await tokenizers) {
    for (const [context, slack] of [
      [2048, 130],
      [8192, 160],
    ] as const) {
      const count = (text: string): number => tokenizer.encode(text).length
      for (const task of rulerTasks) {
        const fit = new Fit(builderOf(task, { ...material, context, count }), tokenizer, context, task)
        for (const seed of [1, 2, 3]) {
          const { ids, answerTokens, references } = fit.prompt(seed)
          const spare = context - answerTokens - ids.length
          t.ok(spare >= 0 && spare < slack, `${task}, ${context}: ${spare} tokens are left`)
          t.ok(count(` ${references.join(', ')}`) <= answerTokens, 'the answer fits')
          t.ok(matched(tokenizer.decode(ids), references) === 1)
        }
      }
    }
  }
})

/** A model that answers what `reply` says of the prompt, piece by piece. */
async function fake(reply: (prompt: string) => string): Promise<PasskeyModel & { prompts: string[] }> {
  const [tokenizer] = await tokenizers
  const prompts: string[] = []
  return {
    prompts,
    config: {} as PasskeyModel['config'],
    tokenizer: async () => tokenizer!,
    async *generate({ prompt }) {
      prompts.push(tokenizer!.decode(prompt as number[]))
      for (const text of reply(prompts.at(-1)!).match(/\S+\s*/g) ?? []) yield { id: 0, text }
    },
  }
}

t.test('answers are scored as RULER does', async (t) => {
  t.equal(matched('the words are Alpha, beta', ['alpha', 'BETA', 'gamma', 'delta']), 0.5)
  const options: RulerOptions = { context: 3000, trials: 2, seed: 5 }
  const good = await fake((prompt) => `${solve(prompt).join(', ').toUpperCase()} and much more`)
  const progress: number[] = []
  const result = await ruler(good, { ...options, onProgress: ({ done, total }) => progress.push(done / total) })
  t.match(result, { context: 3000, seed: 5, haystack: 'noise', shots: 1, accuracy: 1 })
  t.same(
    result.tasks.map(({ task }) => task),
    rulerTasks,
  )
  t.ok(result.tasks.every(({ accuracy, records }) => accuracy === 1 && records.length === 2))
  t.same(result.tasks[0]!.interval, wilson(1, 2))
  t.notMatch(result.tasks[0]!.records[0]!.answer, /more/, 'what comes after the last reference changes nothing')
  t.same([progress.length, progress.at(-1)], [22, 1])

  const half = await fake((prompt) => solve(prompt).slice(1).join(' '))
  const some = await ruler(half, { ...options, tasks: ['fwe', 'vt', 'niah_single_2'] })
  const scores = some.tasks.map(({ accuracy }) => accuracy)
  t.same(scores, [2 / 3, 4 / 5, 0])
  t.equal(some.accuracy, (2 / 3 + 4 / 5) / 3)
  t.same(half.prompts.slice(0, 2), good.prompts.slice(20), 'a task’s prompts do not depend on the others')
  const more = await fake(() => '')
  await ruler(more, { ...options, tasks: ['fwe'], trials: 3 })
  t.same(more.prompts.slice(0, 2), half.prompts.slice(0, 2), 'nor on their number')
  const next = await fake(() => '')
  await ruler(next, { ...options, tasks: ['fwe'], seed: 6 })
  t.not(next.prompts[0], more.prompts[0])
  t.not(seedOf(1, 'vt', 1), seedOf(1, 'vt', 2))
})

t.test('needles are hidden in a text of the user’s', async (t) => {
  const haystack = 'It was a dark night. Nobody came! "Who?" said he. '.repeat(3)
  const model = await fake((prompt) => solve(prompt).join(' '))
  const tasks = ['niah_single_1', 'niah_multivalue'] as const
  const result = await ruler(model, { context: 4096, tasks, trials: 2, haystack })
  t.match(result, { haystack: 'text', accuracy: 1 })
  t.match(model.prompts[0], /The grass is green/, 'noise where RULER has noise')
  t.match(
    model.prompts[2],
    /(night\.|came!|"Who\?"|he\.|\d\.) One of the special magic numbers for \S+ is: \d{7}\. (It|Nobody|"Who|said|One)/,
  )
  t.notMatch(model.prompts[2], /grass/)
})

t.test('mistakes are named', async (t) => {
  const model = await fake(() => '')
  const run = (options: object) => ruler(model, { context: 4096, trials: 1, ...options })
  await t.rejects(run({ context: 100 }), {
    name: 'RangeError',
    message: /context is 100 tokens, but the smallest prompt of niah_single_1 has \d+ and its answer takes 128/,
  })
  await t.rejects(run({ context: 0.5 }), /context is 0.5/)
  await t.rejects(run({ trials: 0 }), /trials is 0/)
  await t.rejects(run({ seed: -1 }), /seed is -1/)
  await t.rejects(run({ shots: 2 }), /shots is 2, must be 0 or 1/)
  await t.rejects(run({ tasks: [] }), /tasks must be a list/)
  await t.rejects(run({ tasks: ['niah_single'] }), /there is no task "niah_single".*niah_single_1/)
  await t.rejects(run({ haystack: ' ' }), /haystack must be a text/)
  await t.rejects(run({ words: ['a', 'a', 'b'] }), /words has 2 different words, but cwe needs 40/)
  t.equal((await run({ words: ['a'], tasks: ['vt'] })).tasks.length, 1, 'words are of no concern to other tasks')
  await t.rejects(run({ signal: AbortSignal.abort(new Error('enough')) }), /enough/)
})

t.test('the interval is Wilson’s', async (t) => {
  // Brown, Cai, DasGupta 2001: 0 of n reaches up to z^2 / (n + z^2)
  const z = 1.959963984540054 ** 2
  const [low, high] = wilson(0, 10)
  t.equal(low, 0)
  t.ok(Math.abs(high - z / (10 + z)) < 1e-12)
  const [from, to] = wilson(0.5, 100)
  t.ok(Math.abs(from - 0.4038315) < 1e-6 && Math.abs(to - 0.5961685) < 1e-6, `${from} ${to}`)
})

t.test('a real model is asked', async (t) => {
  using model = await Llama.load(`${fixtures}/gqa-linear4-f32`)
  const result = await ruler(model, { context: 1200, trials: 1, shots: 0, tasks: ['niah_single_1', 'vt'] })
  t.equal(result.accuracy, 0)
  t.ok(result.tasks.every(({ records }) => records[0]!.promptTokens > 1000 && records[0]!.answer.length > 0))
})
