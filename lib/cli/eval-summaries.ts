import { Llama, readArticles, summarize, type SummaryResult, writeSummaryExamples } from '../index.js'
import { rougeTypes } from '../eval/rouge.js'
import { baseline, evaluate } from './eval.js'
import { type Command, commonOptions, defined, useOptions } from './options.js'

const whole = { kind: 'number', value: 'n', min: 1, whole: true } as const

const options = {
  data: {
    kind: 'texts',
    value: 'file',
    required: true,
    help: 'articles with summaries: .jsonl, .parquet, or a folder',
  },
  'article-field': { kind: 'text', value: 'name', help: 'field that holds the article', default: 'report' },
  'summary-field': { kind: 'text', value: 'name', help: 'field that holds the summary', default: 'summary' },
  'article-tokens': { ...whole, help: 'tokens after which an article is cut', default: '15000' },
  'summary-tokens': { ...whole, help: 'tokens of a summary at most', default: '1000' },
  limit: { ...whole, help: 'only so many articles, from the first', default: 'all' },
  temperature: { kind: 'number', value: 't', min: 0, help: '0: always the most likely token', default: '0.5' },
  'top-p': {
    kind: 'number',
    value: 'p',
    above: 0,
    max: 1,
    help: 'sample among these parts of the probability',
    default: '0.95',
  },
  seed: { kind: 'number', value: 'n', min: 0, whole: true, help: 'of the sampling', default: '0' },
  'no-stemmer': { kind: 'flag', help: 'compare words, not their stems' },
  examples: { kind: 'text', value: 'file', help: 'write what to fine-tune on to this .jsonl, and evaluate nothing' },
  records: { kind: 'flag', help: 'with --json, also each summary with its figures' },
  baseline,
  ...useOptions,
  ...commonOptions,
} as const

export const evalSummaries: Command<typeof options> = {
  name: 'eval summaries',
  summary: 'Summarises long articles (GovReport) and compares by ROUGE.',
  details:
    'Prompt, lengths and sampling are those of the paper; ROUGE is that of rouge_score with its stemmer. Examples to\n' +
    'fine-tune on come from --examples, and are read by extend with --prompt-field prompt --completion-field completion.',
  examples: [
    'ropewalk eval summaries ./llama-16k --data govreport-test.jsonl',
    'ropewalk eval summaries ./llama-16k --data govreport-train.jsonl --examples train-examples.jsonl',
  ],
  operands: ['model'],
  options,
  async run({ operands: [path], values }, output) {
    const { data, limit, temperature, seed, examples: out } = values
    const fields = defined({ article: values['article-field'], summary: values['summary-field'] })
    const limits = defined({ articleTokens: values['article-tokens'], summaryTokens: values['summary-tokens'] })
    if (out !== undefined) {
      using model = await Llama.load(path!, { device: 'dry' })
      const onProgress = ({ done }: { done: number }): void => {
        if (done % 100 === 0) output.note(`${done} examples`)
      }
      const examples = await writeSummaryExamples(model, data, out, { fields, ...limits, onProgress })
      output.line(`wrote ${examples} examples to ${out}`)
      output.value({ examples, out })
      return
    }
    const articles = (await readArticles(data, { fields })).slice(0, limit)
    const results = await evaluate(path!, values, output, async (model, label) => {
      const progress = output.progress(`${label}, articles`, articles.length)
      let last = ''
      try {
        return await summarize(model, articles, {
          ...limits,
          ...defined({ temperature, seed, topP: values['top-p'] }),
          stemmer: !values['no-stemmer'],
          onProgress({ done, tokens, record }) {
            if (record) last = `, the last had ROUGE-1 ${score(record.rouge.rouge1.fmeasure)}`
            progress.update(done, `${tokens} tokens${last}`)
          },
        })
      } finally {
        progress.end()
      }
    })
    const columns = [results.model, ...(results.baseline ? [results.baseline] : [])]
    const rows = rougeTypes.map((type) => [type, ...columns.flatMap((result) => figure(result, type))])
    output.table(
      ['', ...['model', 'baseline'].slice(0, columns.length).flatMap((name) => [name, '95 % interval'])],
      rows,
    )
    const { articles: count, cut, ended } = results.model
    output.note(`${count} articles, ${cut} of them cut; the model ended ${ended} summaries itself`)
    const value = ({ records, ...rest }: SummaryResult) => (values.records ? { ...rest, records } : rest)
    output.value({ model: path, result: value(results.model), baseline: results.baseline && value(results.baseline) })
  },
}

/** As papers give it: times 100. */
const score = (fmeasure: number): string => (100 * fmeasure).toFixed(1)

function figure(result: SummaryResult, type: (typeof rougeTypes)[number]): string[] {
  const { fmeasure, interval } = result[type]
  return [score(fmeasure), interval ? interval.map(score).join(' - ') : '-']
}
