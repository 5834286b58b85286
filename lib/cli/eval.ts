import {
  Llama,
  passkey,
  type PasskeyResult,
  perplexity,
  perplexityByPosition,
  type PerplexityResult,
  readTokenDocuments,
} from '../index.js'
import {
  type Command,
  commonOptions,
  defined,
  noteModel,
  readUse,
  useOptions,
  UsageError,
  type Values,
} from './options.js'
import { formatNumber, type Output } from './output.js'

/** The option of evaluations that also measure what scaling changed. */
export const baseline = {
  kind: 'flag',
  help: 'also evaluate the same weights with the positions unscaled',
} as const

/** Of evaluations whose prompts are made to measure. */
export const promptContext = {
  kind: 'number',
  value: 'n',
  min: 1,
  whole: true,
  help: 'prompt and answer in tokens',
  default: "the model's window",
} as const

const perplexityOptions = {
  data: { kind: 'texts', value: 'file', required: true, help: 'texts: .txt, .jsonl, .parquet, or a folder of them' },
  windows: {
    kind: 'numbers',
    value: 'n,n,...',
    min: 2,
    help: 'window lengths in tokens',
    default: "the model's window",
  },
  stride: { kind: 'number', value: 'n', min: 1, whole: true, help: 'tokens by which windows move on', default: '256' },
  truncate: { kind: 'number', value: 'n', min: 2, whole: true, help: 'cut each document after so many tokens' },
  'by-position': { kind: 'flag', help: 'mean loss by distance from the start of one window instead' },
  'no-bos': { kind: 'flag', help: 'no beginning-of-sequence token before the windows' },
  field: { kind: 'text', value: 'name', help: 'field of .jsonl and .parquet that holds the text', default: 'text' },
  baseline,
  ...useOptions,
  ...commonOptions,
} as const

const passkeyOptions = {
  context: promptContext,
  distances: {
    kind: 'number',
    value: 'n',
    min: 1,
    whole: true,
    help: 'nominal distances of the key from the end, which are in whole sentences of filler',
    default: '32',
  },
  trials: { kind: 'number', value: 'n', min: 1, whole: true, help: 'keys tried at each distance', default: '10' },
  seed: { kind: 'number', value: 'n', min: 0, whole: true, help: 'of the keys', default: '0' },
  baseline,
  ...useOptions,
  ...commonOptions,
} as const

/** Runs an evaluation on the model and, where asked, on the same weights without scaling, one after the other. */
export async function evaluate<T>(
  path: string,
  values: Values<typeof useOptions> & { baseline: boolean },
  output: Output,
  body: (model: Llama, label: string) => Promise<T>,
): Promise<{ model: T; baseline: T | undefined; window: number }> {
  const { baseline } = values
  const options = readUse(values)
  const results: T[] = []
  let window = 0
  for (const rope of baseline ? [undefined, 'none' as const] : [undefined]) {
    using model = await Llama.load(path, { ...options, ...(rope ? { rope } : {}) })
    if (!rope) {
      window = model.contextWindow
      noteModel(model, output)
      if (baseline && model.config.rope.type === 'default') {
        output.note(
          `warning: ${path} has no scaling to leave out (NTK is in its rope_theta): the baseline is the same model`,
        )
      }
    }
    results.push(await body(model, rope ? 'baseline' : 'model'))
  }
  return { model: results[0]!, baseline: results[1], window }
}

export const evalPerplexity: Command<typeof perplexityOptions> = {
  name: 'eval perplexity',
  summary: 'Measures sliding-window perplexity at several window lengths.',
  details:
    'Documents shorter than the largest window are left out. Two figures are given: `perplexity`, in which every token\n' +
    'counts the same, and `by window`, from the mean over windows, as in the paper and in YaRN. --by-position cuts the\n' +
    'documents into windows that do not overlap, and tells up to where more context helps.',
  examples: ['ropewalk eval perplexity ./llama-8k --data pg19-test.jsonl --windows 2048,4096,8192 --baseline'],
  operands: ['model'],
  options: perplexityOptions,
  async run({ operands: [path], values }, output) {
    if (values['by-position']) return byPosition(path!, values, output)
    const { data, windows, stride, truncate, field } = values
    // The windows of the extended model are also the baseline's.
    let lengths = windows
    const results = await evaluate(path!, values, output, async (model, label) => {
      lengths ??= [model.contextWindow]
      const documents = await readTokenDocuments(model, data, defined({ field }))
      const bos = values['no-bos'] ? false : undefined
      let at = 0
      let progress: ReturnType<Output['progress']> | undefined
      try {
        return await perplexity(model, documents, {
          windows: lengths,
          ...defined({ stride, truncate, bos }),
          onProgress({ window, done, total, perplexity }) {
            if (window !== at) {
              progress?.end()
              progress = output.progress(`${label}, window ${window}`, total)
              at = window
            }
            progress!.update(done, `perplexity ${formatNumber(perplexity)}`)
          },
        })
      } finally {
        progress?.end()
      }
    })
    const rows = [
      ...results.model.map((result) => ['model', ...perplexityRow(result)]),
      ...(results.baseline ?? []).map((result) => ['baseline', ...perplexityRow(result)]),
    ]
    output.table(['', 'window', 'stride', 'documents', 'targets', 'perplexity', '95 % interval', 'by window'], rows)
    const { skipped } = results.model[0]!
    if (skipped > 0) output.note(`${skipped} documents are shorter than the largest window and were left out`)
    output.value({ model: path, results: results.model, baseline: results.baseline })
  },
}

/** `eval perplexity --by-position` */
async function byPosition(path: string, values: Values<typeof perplexityOptions>, output: Output): Promise<void> {
  const { data, windows, stride, truncate, field } = values
  if ((windows?.length ?? 1) > 1) throw new UsageError('--by-position takes one window, but --windows lists several')
  if (stride !== undefined || truncate !== undefined) {
    throw new UsageError(
      '--by-position has windows that do not overlap, and uses whole texts: leave --stride and --truncate out',
    )
  }
  let window = windows?.[0]
  const results = await evaluate(path, values, output, async (model, label) => {
    window ??= model.contextWindow
    const documents = await readTokenDocuments(model, data, defined({ field }))
    const bos = values['no-bos'] ? false : undefined
    const watch = watching(output, `${label}, windows`)
    try {
      return await perplexityByPosition(model, documents, {
        window,
        ...defined({ bos }),
        onProgress: ({ done, total, perplexity }) => watch.at(done, total, `perplexity ${formatNumber(perplexity)}`),
      })
    } finally {
      watch.end()
    }
  })
  const columns = [results.model, results.baseline].filter((result) => result !== undefined)
  const rows = results.model.bins.map(({ from, to, targets }, i) => [
    ...[`${from} - ${to}`, targets],
    ...columns.flatMap(({ bins }) => {
      const { nll, standardError, gain, gainError } = bins[i]!
      return [withError(nll, standardError), gain === undefined ? '-' : withError(gain, gainError)]
    }),
  ])
  const names = columns.length > 1 ? ['nll', 'gain', 'baseline', 'gain'] : ['nll', 'gain']
  output.table(['distance', 'targets', ...names], rows)
  for (const [i, { helpsUpTo, window, documents }] of columns.entries()) {
    const name = i === 0 ? 'model' : 'baseline'
    const found =
      helpsUpTo === undefined
        ? 'a single document has no standard errors: give more of them'
        : `more context helps up to ${helpsUpTo} of ${window - 1} tokens, at 95 %`
    output.line(`${name}: ${found} (${documents} documents)`)
  }
  output.value({ model: path, result: results.model, baseline: results.baseline })
}

const withError = (value: number, error: number | undefined): string =>
  value.toFixed(4) + (error === undefined ? '' : ` ± ${error.toFixed(4)}`)

export const percent = (share: number): string => `${(100 * share).toFixed(0)} %`

/** A progress line that begins with its first step. */
export function watching(
  output: Output,
  what: string,
): { at(done: number, total: number, text: string): void; end(): void } {
  let progress: ReturnType<Output['progress']> | undefined
  return {
    at: (done, total, text) => (progress ??= output.progress(what, total)).update(done, text),
    end: () => progress?.end(),
  }
}

function perplexityRow(result: PerplexityResult): (string | number)[] {
  const { window, stride, documents, targets, interval } = result
  const range = interval ? interval.map(formatNumber).join(' - ') : '-'
  const { perplexity, perplexityWindowMean } = result
  return [window, stride, documents, targets, formatNumber(perplexity), range, formatNumber(perplexityWindowMean)]
}

export const evalPasskey: Command<typeof passkeyOptions> = {
  name: 'eval passkey',
  summary: 'Hides a five-digit key in a long text, at many distances from its end, and asks for it.',
  details:
    'kmax is the largest distance such that at every distance up to it at least 20 % of the answers are right. Of distances\n' +
    'that filler cannot tell apart, whose prompts are the same, only the largest is asked for.',
  examples: [
    'ropewalk eval passkey ./llama-8k --context 8192',
    'ropewalk eval passkey ./llama-8k --distances 8 --trials 3',
  ],
  operands: ['model'],
  options: passkeyOptions,
  async run({ operands: [path], values }, output) {
    const { distances, trials, seed } = values
    let { context } = values
    const results = await evaluate(path!, values, output, async (model, label) => {
      context ??= model.contextWindow
      const watch = watching(output, `${label}, prompts`)
      try {
        return await passkey(model, {
          context,
          ...defined({ distances, trials, seed }),
          onProgress: ({ done, total, accuracy }) => watch.at(done, total, `accuracy ${percent(accuracy)}`),
        })
      } finally {
        watch.end()
      }
    })
    const columns = [results.model, results.baseline].filter((result) => result !== undefined)
    const names = ['accuracy', 'baseline'].slice(0, columns.length)
    const rows = results.model.distances.map(({ distance, tokens }, i) => [
      distance,
      Math.round(tokens),
      ...columns.map((result) => percent(result.distances[i]!.accuracy)),
    ])
    output.table(['distance', 'tokens', ...names], rows)
    for (const [i, result] of columns.entries()) output.line(verdict(i === 0 ? 'model' : 'baseline', result))
    output.value({ model: path, result: results.model, baseline: results.baseline })
  },
}

function verdict(name: string, { kmax, accuracy, context }: PasskeyResult): string {
  return `${name}: kmax ${kmax} of ${context}, ${(100 * accuracy).toFixed(1)} % of all answers right`
}
