import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { rouge, rougeTypes } from '../../lib/eval/rouge.js'
import {
  cutText,
  readArticles,
  summarize,
  type SummaryArticle,
  type SummaryModel,
  type SummaryRecord,
  writeSummaryExamples,
} from '../../lib/eval/summaries.js'
import { loadTokenizer } from '../../lib/files/tokenizer.js'
import { Llama } from '../../lib/model/llama.js'
import { DataLoader } from '../../lib/train/data.js'
import { fixtures } from '../golden.js'

const dir = mkdtempSync(join(tmpdir(), 'ropewalk-summaries-'))
t.teardown(() => rmSync(dir, { recursive: true }))

const file = (name: string, rows: unknown[]): string => {
  const path = join(dir, name)
  writeFileSync(path, rows.map((row) => `${JSON.stringify(row)}\n`).join(''))
  return path
}
const rows = [
  { id: 'a', report: 'The rope was laid along the walk. It was long.', summary: 'A long rope was laid.' },
  {
    id: 'b',
    report: 'Tar keeps the water out — as everyone knows. 😀 naïve',
    summary: 'Tar keeps water out.\nAll know it.',
  },
  { id: 'c', report: 'Hemp.', summary: 'Hemp' },
]
const data = file('gov.jsonl', rows)
const article = (index: number): SummaryArticle => ({
  ...{ source: `made up ${index}`, index },
  ...{ article: rows[index]!.report, summary: rows[index]!.summary },
})

t.test('articles are read', async (t) => {
  t.strictSame(
    await readArticles([data]),
    rows.map(({ report, summary }, index) => ({
      ...{ source: `${data}:${index + 1}`, index, article: report, summary },
    })),
  )
  const other = file(
    'other.jsonl',
    rows.map(({ report, summary }) => ({ document: report, abstract: summary })),
  )
  const [first] = await readArticles([other], { fields: { article: 'document', summary: 'abstract' } })
  t.match(first, { article: rows[0]!.report, summary: rows[0]!.summary })
  await t.rejects(readArticles([other]), {
    code: 'ERR_FIELD',
    message: /other\.jsonl:1: no field "report"; there are "document"/,
  })
  await t.rejects(readArticles([file('none.jsonl', [])]), { code: 'ERR_NO_TEXT' })
  await t.rejects(readArticles([file('n.jsonl', [{ report: 1, summary: '' }])]), {
    code: 'ERR_FIELD',
    message: /"report" is 1/,
  })
  writeFileSync(join(dir, 'a.txt'), 'x')
  await t.rejects(readArticles([join(dir, 'a.txt')]), { code: 'ERR_FORMAT' })
})

t.test('texts are cut to as many tokens as are allowed', async (t) => {
  for (const name of ['mha-f32', 'gqa-linear4-f32']) {
    const tokenizer = await loadTokenizer(join(fixtures, name))
    const count = (text: string): number => tokenizer.encode(text, { addSpecialTokens: false }).length
    const text = rows
      .map(({ report }) => report)
      .join(' ')
      .repeat(4)
    for (let limit = 1; limit < count(text); limit += 7) {
      const { text: part, cut } = cutText(tokenizer, text, limit)
      t.ok(cut && text.startsWith(part) && count(part) <= limit, `${name}: ${limit} tokens`)
      const [next] = text.slice(part.length)
      t.ok(
        count(part + String.fromCodePoint(text.codePointAt(part.length)!)) > limit || count(part) === limit,
        `no more fits before ${next}`,
      )
      t.notMatch(part, /[\ud800-\udbff]$/)
    }
    t.strictSame(cutText(tokenizer, text, count(text)), { text, cut: false })
  }
})

t.test('prompt, sampling, figures', async (t) => {
  const prompts: any[] = []
  const said = ['A rope  was laid long.', 'Tar!', ' Hemp ']
  const model = {
    contextWindow: 400,
    tokenizer: async () => ({
      encode: (text: string) => Array.from(text, (letter) => letter.codePointAt(0)!),
      decode: (ids: number[]) => String.fromCodePoint(...ids),
    }),
    async *generate(options: any) {
      prompts.push({ ...options, prompt: String.fromCodePoint(...options.prompt) })
      for (const letter of said[options.seed - 5]!) yield { id: 1, text: letter }
    },
  } as unknown as SummaryModel
  const seen: any[] = []
  const articles = [article(0), article(1), article(2)]
  const options = { articleTokens: 30, summaryTokens: 22, seed: 5, onProgress: (done: any) => seen.push(done) }
  const result = await summarize(model, articles, options)
  t.strictSame(
    prompts.map(({ prompt }) => prompt),
    rows.map(
      ({ report }) =>
        `Read the following article and then summarize it.\n# ${report.slice(0, 30)}\nNow summarize the above article.\nSummary:`,
    ),
  )
  t.match(prompts[1], { temperature: 0.5, topP: 0.95, topK: 0, seed: 6, maxTokens: 22 })
  t.match(result, { articles: 3, cut: 2, ended: 2 })
  t.match(result.records, [
    { source: 'made up 0', summary: 'A rope  was laid long.', tokens: 22, cut: true, ended: false },
    { summary: 'Tar!', tokens: 4, promptTokens: prompts[1].prompt.length, cut: true, ended: true },
    { summary: 'Hemp', cut: false },
  ])
  for (const type of rougeTypes) {
    const scores = rows.map(({ summary }, i) => rouge(summary, said[i]!)[type].fmeasure)
    t.strictSame(
      result.records.map((record: SummaryRecord) => record.rouge[type].fmeasure),
      scores,
    )
    const mean = (scores[0]! + scores[1]! + scores[2]!) / 3
    const error = Math.sqrt(scores.reduce((sum, score) => sum + (score - mean) ** 2, 0) / 6)
    const { fmeasure, standardError, interval } = result[type]
    t.ok(Math.abs(fmeasure - mean) < 1e-12 && Math.abs(standardError! - error) < 1e-12, type)
    t.ok(Math.abs(interval![1] - fmeasure - 1.96 * error) < 1e-12)
  }
  t.equal(seen.length, 22 + 4 + 6 + 3)
  t.match(seen.at(-1), { done: 3, total: 3, record: { summary: 'Hemp' } })
  const alone = await summarize(model, [article(1)], options)
  t.strictSame(alone.records[0], result.records[1], 'an article does not depend on those beside it')
  t.equal(alone.rouge1.standardError, undefined)
  const plain = await summarize(model, articles, { ...options, stemmer: false })
  t.strictSame(plain.records[0]!.rouge, rouge(rows[0]!.summary, said[0]!, { stemmer: false }))

  await t.rejects(summarize(model, articles), {
    name: 'RangeError',
    message:
      /articleTokens 15000, the prompt's 94 and summaryTokens 1000 make 16094, but the model's context window is 400/,
  })
  await t.rejects(summarize(model, articles, { articleTokens: 0 }), {
    name: 'RangeError',
    message: /articleTokens is 0/,
  })
  await t.rejects(summarize(model, articles, { ...options, seed: -1 }), { message: /seed is -1/ })
  await t.rejects(summarize(model, []), { name: 'TypeError' })
  const controller = new AbortController()
  controller.abort(new Error('enough'))
  await t.rejects(summarize(model, articles, { ...options, signal: controller.signal }), { message: 'enough' })
})

t.test('a real model: the same seed, the same summaries', async (t) => {
  using model = await Llama.load(join(fixtures, 'llama3-8'))
  const options = { articleTokens: 200, summaryTokens: 12, seed: 3 }
  const articles = await readArticles([data])
  const first = await summarize(model, articles, options)
  t.strictSame(await summarize(model, articles, options), first)
  const others = await summarize(model, articles, { ...options, seed: 9 })
  t.notSame(
    others.records.map(({ summary }) => summary),
    first.records.map(({ summary }) => summary),
  )
  t.ok(first.records.every(({ tokens }) => tokens > 0 && tokens <= 12))
})

t.test('examples to fine-tune on', async (t) => {
  using model = await Llama.load(join(fixtures, 'llama3-8'))
  const tokenizer = await model.tokenizer()
  const out = join(dir, 'examples.jsonl')
  writeFileSync(out, 'old')
  const limits = { articleTokens: 20, summaryTokens: 5 }
  t.equal(await writeSummaryExamples(model, [data], out, limits), 3)
  const examples = readFileSync(out, 'utf8')
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line))
  t.equal(examples.length, 3)
  for (const [i, { prompt, completion }] of examples.entries()) {
    const cut = cutText(tokenizer, rows[i]!.report, 20).text
    t.equal(
      prompt,
      `Read the following article and then summarize it.\n# ${cut}\nNow summarize the above article.\nSummary:`,
    )
    t.equal(completion, ` ${cutText(tokenizer, rows[i]!.summary, 5).text}`)
  }
  // what the model is trained on begins as it is asked
  const fields = { prompt: 'prompt', completion: 'completion' }
  const settings = { data: [out], context: 256, packing: 'documents', seed: 0, field: 'text', fields } as const
  const loader = await DataLoader.open(
    { ...settings, validation: undefined, eosId: tokenizer.eosId, cacheDir: join(dir, 'c') },
    tokenizer,
  )
  const { sample } = await loader.next({ epoch: 0, index: 0 }, 1)
  const labels = [...(sample.options.labels as { data: Int32Array }).data]
  const asked = tokenizer.encode(examples[0].prompt)
  t.strictSame([...(sample.tokens as { data: Int32Array }).data.subarray(0, asked.length)], asked)
  t.equal(
    labels.findIndex((label) => label !== -100),
    asked.length,
    'only the summary is learned',
  )

  await t.rejects(writeSummaryExamples(model, [file('bad.jsonl', [{ report: 'x' }])], out), { code: 'ERR_FIELD' })
  t.equal(readFileSync(out, 'utf8').trim().split('\n').length, 3, 'the old file stays')
  t.notOk(
    readdirSync(dir).some((name) => name.includes('.tmp')),
    'nothing temporary',
  )
  await t.rejects(writeSummaryExamples(model, [data], join(dir, 'no/where.jsonl')), { code: 'ERR_WRITE' })
})
