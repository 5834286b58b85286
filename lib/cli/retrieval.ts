// Evaluations of retrieval beside the paper's: the heat map over length and depth, and RULER.
import { decodeUtf8, readSmallFile } from '../files/bytes.js'
import { needle, ruler, type RulerTask } from '../index.js'
import { baseline, evaluate, percent, promptContext, watching } from './eval.js'
import { type Command, commonOptions, defined, useOptions } from './options.js'

const needleOptions = {
  contexts: {
    kind: 'numbers',
    value: 'n,n,...',
    min: 1,
    help: 'prompt and answer in tokens',
    default: "quarters of the model's window",
  },
  depths: {
    kind: 'numbers',
    value: 'n,n,...',
    min: 0,
    max: 100,
    help: 'where the key stands, in % of the text',
    default: '0,10,...,100',
  },
  trials: { kind: 'number', value: 'n', min: 1, whole: true, help: 'keys tried in each cell', default: '5' },
  seed: { kind: 'number', value: 'n', min: 0, whole: true, help: 'of the keys', default: '0' },
  baseline,
  ...useOptions,
  ...commonOptions,
} as const

export const evalNeedle: Command<typeof needleOptions> = {
  name: 'eval needle',
  summary: 'Hides a five-digit key at many depths of texts of many lengths: a heat map of accuracy.',
  details: 'The prompts are those of `ropewalk eval passkey`. Depth 0 is the beginning of the text, 100 its end.',
  examples: [
    'ropewalk eval needle ./llama-8k',
    'ropewalk eval needle ./llama-8k --contexts 2048,8192 --depths 0,50,100 --trials 10',
  ],
  operands: ['model'],
  options: needleOptions,
  async run({ operands: [path], values }, output) {
    const { trials, seed } = values
    let { contexts } = values
    const depths = values.depths?.map((depth) => depth / 100)
    const results = await evaluate(path!, values, output, async (model, label) => {
      contexts ??= [1, 2, 3, 4].map((n) => Math.floor((n * model.contextWindow) / 4))
      const watch = watching(output, `${label}, prompts`)
      try {
        return await needle(model, {
          contexts,
          ...defined({ depths, trials, seed }),
          onProgress: ({ done, total, accuracy }) => watch.at(done, total, `accuracy ${percent(accuracy)}`),
        })
      } finally {
        watch.end()
      }
    })
    for (const [i, result] of [results.model, results.baseline].entries()) {
      if (!result) continue
      const name = i === 0 ? 'model' : 'baseline'
      const rows = result.depths.map((depth, d) => [
        percent(depth),
        ...result.contexts.map((_, c) => percent(result.cells[c * result.depths.length + d]!.accuracy)),
      ])
      output.table([results.baseline ? `${name}, depth` : 'depth', ...result.contexts.map(String)], rows)
      output.line(`${name}: ${(100 * result.accuracy).toFixed(1)} % of all answers right`)
    }
    output.value({ model: path, result: results.model, baseline: results.baseline })
  },
}

const rulerOptions = {
  context: promptContext,
  tasks: { kind: 'text', value: 'name,...', help: 'such as niah_single_1,niah_multivalue,vt,cwe,fwe', default: 'all' },
  trials: { kind: 'number', value: 'n', min: 1, whole: true, help: 'prompts of each task', default: '20' },
  seed: { kind: 'number', value: 'n', min: 0, whole: true, help: 'of the prompts', default: '0' },
  haystack: { kind: 'text', value: 'file', help: 'a text that needles are hidden in', default: 'a sentence of noise' },
  words: { kind: 'text', value: 'file', help: 'words for the lists of cwe', default: 'English, then made-up ones' },
  'no-shots': { kind: 'flag', help: 'no solved example before the questions of vt and cwe' },
  baseline,
  ...useOptions,
  ...commonOptions,
} as const

export const evalRuler: Command<typeof rulerOptions> = {
  name: 'eval ruler',
  summary: "Runs RULER's retrieval, tracing and aggregation tasks at any length.",
  details:
    'Needles in a haystack (niah_*), variable tracking (vt), common words (cwe), frequent words (fwe). An answer scores the\n' +
    'share of the references that it contains.',
  examples: [
    'ropewalk eval ruler ./llama-8k --context 8192 --tasks vt,cwe',
    'ropewalk eval ruler ./llama-8k --haystack essays.txt --trials 100 --json',
  ],
  operands: ['model'],
  options: rulerOptions,
  async run({ operands: [path], values }, output) {
    const { trials, seed } = values
    let { context } = values
    const tasks = values.tasks?.split(',').map((name) => name.trim() as RulerTask)
    const haystack = values.haystack === undefined ? undefined : await text(values.haystack)
    const words = values.words === undefined ? undefined : (await text(values.words)).split(/\s+/).filter(Boolean)
    const shots = values['no-shots'] ? 0 : undefined
    const results = await evaluate(path!, values, output, async (model, label) => {
      context ??= model.contextWindow
      const watch = watching(output, `${label}, prompts`)
      try {
        return await ruler(model, {
          context,
          ...defined({ tasks, trials, seed, haystack, words, shots }),
          onProgress: ({ done, total, task, accuracy }) => watch.at(done, total, `${task} ${percent(accuracy)}`),
        })
      } finally {
        watch.end()
      }
    })
    const columns = [results.model, results.baseline].filter((result) => result !== undefined)
    const rows = results.model.tasks.map(({ task, trials }, i) => [
      ...[task, trials],
      ...columns.flatMap((result) => {
        const { accuracy, interval } = result.tasks[i]!
        return [percent(accuracy), interval.map(percent).join(' - ')]
      }),
    ])
    const names = ['accuracy', '95 % interval', 'baseline', '95 % interval'].slice(0, 2 * columns.length)
    output.table(['task', 'trials', ...names], rows)
    for (const [i, { accuracy, context }] of columns.entries()) {
      output.line(`${i === 0 ? 'model' : 'baseline'}: ${percent(accuracy)} on average at ${context} tokens`)
    }
    output.value({ model: path, result: results.model, baseline: results.baseline })
  },
}

const TEXT_BYTES = 256 << 20

const text = async (path: string): Promise<string> => decodeUtf8(await readSmallFile(path, TEXT_BYTES), path)
