import { attentionResolution, readTokenDocuments, type ResolutionResult } from '../index.js'
import { baseline, evaluate } from './eval.js'
import { type Command, commonOptions, defined, useOptions } from './options.js'
import { formatNumber, type Output } from './output.js'

const options = {
  data: { kind: 'texts', value: 'file', required: true, help: 'texts: .txt, .jsonl, .parquet, or a folder of them' },
  context: {
    kind: 'number',
    value: 'n',
    min: 10,
    whole: true,
    help: 'tokens of each text that are read',
    default: "the model's window",
  },
  documents: {
    kind: 'number',
    value: 'n',
    min: 1,
    whole: true,
    help: 'texts that are long enough, at most',
    default: '4',
  },
  layers: { kind: 'numbers', value: 'n,n,...', min: 0, help: 'layers, the first is 0', default: 'all' },
  queries: { kind: 'number', value: 'n', min: 1, whole: true, help: 'query positions in a text', default: '64' },
  trials: { kind: 'number', value: 'n', min: 0, whole: true, help: 'copies tried at each distance', default: '16' },
  seed: { kind: 'number', value: 'n', min: 0, whole: true, help: 'of query positions and copies', default: '0' },
  field: { kind: 'text', value: 'name', help: 'field of .jsonl and .parquet that holds the text', default: 'text' },
  baseline,
  ...useOptions,
  ...commonOptions,
} as const

const DOCUMENTS = 4

export const evalAttention: Command<typeof options> = {
  name: 'eval attention',
  summary: 'Measures attention by distance: to near tokens, the largest scores up to the window, and copies.',
  details:
    'Scores are q . k / sqrt(D) before the softmax, of a sample of queries in all heads, without the first token of the\n' +
    'text. `limit` is the most that the same queries and keys could score at any distance. --baseline extrapolates: the\n' +
    'same weights and the same context, with the positions unscaled.',
  examples: [
    'ropewalk eval attention ./llama-8k --data books.txt --baseline',
    'ropewalk eval attention ./llama --data books.txt --layers 0,15,31 --json',
  ],
  operands: ['model'],
  options,
  async run({ operands: [path], values }, output) {
    const { data, documents: most = DOCUMENTS, layers, queries, trials, seed, field } = values
    let { context } = values
    const results = await evaluate(path!, values, output, async (model, label) => {
      context ??= model.contextWindow
      const room = model.config.bosId === undefined ? 0 : 1
      const texts = await readTokenDocuments(model, data, defined({ field }))
      const long = texts.filter(({ ids }) => ids.length + room >= context!).slice(0, most)
      let progress: ReturnType<Output['progress']> | undefined
      try {
        return await attentionResolution(model, long.length > 0 ? long : texts, {
          context,
          ...defined({ layers, queries, trials, seed }),
          onProgress({ done, total }) {
            progress ??= output.progress(`${label}, heads and copies`, total)
            progress.update(done)
          },
        })
      } finally {
        progress?.end()
      }
    })
    const named: [string, ResolutionResult][] = [['model', results.model]]
    if (results.baseline) named.push(['baseline', results.baseline])
    const percent = (share: number): string => `${(100 * share).toFixed(1)} %`
    output.line('Mean attention weight by distance')
    output.table(
      ['', ...results.model.near.map((_, n) => String(n))],
      named.map(([name, { near }]) => [name, ...near.map(percent)]),
    )
    output.line('\nScores by distance')
    const head = named.flatMap(([name]) => [`${name} max`, 'mean', 'deviation', 'limit'])
    const rows = results.model.ranges.map(({ from, to }, i) => [
      `${from}-${to - 1}`,
      ...named.flatMap(([, { ranges }]) => {
        const { max, mean, deviation, bound } = ranges[i]!
        return [max, mean, deviation, bound].map(formatNumber)
      }),
    ])
    output.table(['distance', ...head], rows)
    if (results.model.copies.length > 0) {
      output.line('\nCopies of random tokens: first choices that are right')
      const copies = results.model.copies.map(({ distance }, i) => [
        distance,
        ...named.map(([, result]) => percent(result.copies[i]!.accuracy)),
      ])
      output.table(['distance', ...named.map(([name]) => name)], copies)
    }
    const { documents, window } = results.model
    output.line(
      `\n${documents} ${documents === 1 ? 'text' : 'texts'} of ${context} tokens; the trained window is ${window}`,
    )
    output.value({ model: path, result: results.model, baseline: results.baseline })
  },
}
