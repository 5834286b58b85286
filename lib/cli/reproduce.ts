import { Llama } from '../index.js'
import { combine, TOO_FEW } from '../reproduce/combine.js'
import { DATA_SETS, EXPERIMENTS } from '../reproduce/experiments.js'
import { ReportFolder } from '../reproduce/folder.js'
import { reproduceMiniature } from '../reproduce/mini/mini.js'
import { CLAIMS_TITLE, claimsTable, sectionsOf } from '../reproduce/page.js'
import { reproduce as run, type ReproduceResult, writePages } from '../reproduce/run.js'
import type { Table } from '../reproduce/sections.js'
import { paperSettings, type Settings } from '../reproduce/settings.js'
import { listen } from './interrupt.js'
import { type Command, commandLine, commonOptions, defined, modelOptions, UsageError, type Values } from './options.js'
import type { Output } from './output.js'

const whole = { kind: 'number', value: 'n', min: 1, whole: true } as const

const options = {
  out: {
    kind: 'text',
    value: 'folder',
    help: 'where the report goes, and is gone on with',
    default: './ropewalk-report',
  },
  only: { kind: 'text', value: 'ids', help: 'experiments, by the ids below, with commas between', default: 'all' },
  data: { kind: 'texts', value: 'name=path', help: 'data sets, by the names below; more paths of one with commas' },
  contexts: {
    kind: 'numbers',
    value: 'n,n',
    min: 2,
    help: 'extended windows in tokens',
    default: '4, 8 and 16 times the window',
  },
  direct: {
    kind: 'numbers',
    value: 'n,n',
    min: 2,
    help: 'those that are also fine-tuned without PI',
    default: 'the first',
  },
  tune: { kind: 'text', value: 'names', help: 'baselines that are fine-tuned, too: ntk, yarn, or both' },
  steps: { ...whole, help: 'optimizer steps of each fine-tuning', default: '1000' },
  lr: { kind: 'number', value: 'x', min: 0, help: 'learning rate', default: '2e-5' },
  batch: { ...whole, help: 'windows in one pass', default: '1' },
  accumulate: { ...whole, help: 'passes in one step', default: '64, beyond 4x 128' },
  stride: { ...whole, help: 'tokens by which the window of a perplexity moves on', default: '256' },
  documents: { ...whole, help: 'documents of a corpus at most', default: '128' },
  distances: { ...whole, help: 'of a passkey', default: '32' },
  trials: {
    ...whole,
    help: 'prompts of a passkey’s distance, a heat map’s cell, a task of RULER',
    default: '10, 5 and 20',
  },
  items: { ...whole, help: 'questions of a set, and articles to summarize, at most', default: 'all' },
  'article-tokens': { ...whole, help: 'after which an article is cut', default: '15000' },
  'summary-tokens': { ...whole, help: 'of a summary at most', default: '1000' },
  epochs: { ...whole, help: 'over the articles with summaries', default: '10' },
  seed: { ...whole, min: 0, help: 'of the order of texts, of keys and of sampling', default: '0' },
  mini: { kind: 'flag', help: 'the miniature: the model that comes with the package, and generated data' },
  quick: { kind: 'flag', help: 'with --mini: everything with a few steps, a look and no measurement' },
  force: { kind: 'flag', help: 'delete the report that is in --out, and begin anew' },
  page: { kind: 'flag', help: 'no run: makes the page and the CSV files of --out again, from its JSON' },
  combine: {
    kind: 'texts',
    value: 'report',
    help: 'no run: holds the claims against finished reports of two seeds or more',
  },
  ...modelOptions,
  ...commonOptions,
} as const

/** Words with commas between, in lines of a help text. */
function inLines(words: readonly string[]): string {
  const lines = ['']
  for (const word of words) {
    if (lines.at(-1)!.length + word.length > 100) lines.push('')
    lines[lines.length - 1] += `${lines.at(-1) === '' ? '  ' : ', '}${word}`
  }
  return lines.join(',\n')
}

export const reproduce: Command<typeof options> = {
  name: 'reproduce',
  summary: 'Runs the tables and figures of the Position Interpolation paper on a model, and writes a report.',
  details:
    'The defaults are the paper’s recipe. What is finished is kept: the same command goes on where it was stopped.\n' +
    'Experiments whose data are not given are named in the report, with what they need.\n\n' +
    `Experiments:\n${inLines(EXPERIMENTS.map(({ id }) => id))}\nData sets:\n` +
    Object.entries(DATA_SETS)
      .map(([name, help]) => `  ${name.padEnd(17)} ${help}`)
      .join('\n'),
  examples: [
    'ropewalk reproduce ./llama-7b --data train=pile pg19=pg19/test --contexts 8192,16384 --out report',
    'ropewalk reproduce ./llama-7b --only table-4 --data train=pile --contexts 8192 --out report',
    'ropewalk reproduce --mini --seed 1 --out report-1',
    'ropewalk reproduce --combine report-1 report-2 report-3 --out combined',
  ],
  operands: ['model?'],
  options,
  async run({ operands: [model], values }, output) {
    const { out = './ropewalk-report', mini, force } = values
    if (values.combine) {
      if (model !== undefined || mini) throw new UsageError('--combine takes finished reports: no model and no --mini')
      const { combine: reports } = values
      if (reports.length < 2) throw new UsageError(`--combine ${reports.join(' ')}: ${TOO_FEW}`)
      const claims = await combine(reports, out)
      output.table(
        ['s', 'claim', 'holds', 'figures'],
        claims.map(({ factor, claim, holds, figures }) => [factor, claim, holds ? 'yes' : 'no', figures]),
      )
      output.note(`written: ${out}/index.html`)
      output.value({ out, claims })
      return 0
    }
    if (values.page) {
      if (model !== undefined || mini) throw new UsageError('--page takes what is in --out: no model and no --mini')
      const folder = await ReportFolder.read(out)
      await writePages(folder)
      show({ folder, ...sectionsOf(folder) }, out, output)
      return 0
    }
    if (mini === (model !== undefined)) throw new UsageError('give either a model’s folder or --mini')
    if (values.quick && !mini) throw new UsageError('--quick goes with --mini only')
    const only = values.only?.split(',').map((id) => id.trim())
    const interrupt = listen(output, 'ending and keeping what is done')
    const progress = output.progress('reproduce', 100)
    const common = {
      ...{ out, only, force, signal: interrupt.signal },
      onProgress: (done: number, task: string) => progress.update(Math.floor(100 * done), `% ${task}`),
    }
    let result: ReproduceResult
    try {
      if (mini) {
        refuse(values)
        result = await reproduceMiniature({ ...common, seed: values.seed ?? 1, quick: values.quick })
      } else {
        const { device, threads } = values
        const data = readData(values.data ?? [])
        result = await run({
          ...common,
          kind: 'paper',
          base: model!,
          settings: await settingsOf(model!, values),
          data,
          device,
          threads,
        })
      }
    } catch (error) {
      progress.end()
      if (interrupt.code() === undefined || !interrupt.signal.aborted) throw error
      const next = commandLine('reproduce', model === undefined ? [] : [model], { ...values, force: false })
      output.note(`stopped; ${out} keeps what is done. To go on:\n${next}`)
      output.value({ event: 'interrupted', out, resume: next })
      return interrupt.code()
    } finally {
      progress.end()
      interrupt.stop()
    }
    show(result, out, output)
    return 0
  },
}

/** The miniature's settings are its own. */
function refuse(values: Values<typeof options>): void {
  const paper = [
    'data',
    'contexts',
    'direct',
    'tune',
    'steps',
    'lr',
    'batch',
    'accumulate',
    'stride',
    'documents',
  ] as const
  const summaries = ['items', 'article-tokens', 'summary-tokens', 'epochs'] as const
  const more = ['distances', 'trials', 'device', 'dtype', 'threads'] as const
  for (const name of [...paper, ...summaries, ...more]) {
    if (values[name] !== undefined) throw new UsageError(`--${name} does not go with --mini, whose settings are fixed`)
  }
}

/** name=path,path into paths by name. */
function readData(entries: readonly string[]): Record<string, string[]> {
  const data: Record<string, string[]> = {}
  for (const entry of entries) {
    const at = entry.indexOf('=')
    const [name, rest] = [entry.slice(0, at), entry.slice(at + 1)]
    if (at < 1 || rest === '')
      throw new UsageError(`--data ${entry}: give name=path, the name one of ${Object.keys(DATA_SETS).join(', ')}`)
    data[name] = [...(data[name] ?? []), ...rest.split(',')]
  }
  return data
}

async function settingsOf(path: string, values: Values<typeof options>): Promise<Settings> {
  const dry = await Llama.load(path, { device: 'dry' })
  const { contextWindow: window } = dry
  const dtype = values.dtype ?? dry.dtype
  dry.dispose()
  const contexts = values.contexts ?? [4, 8, 16].map((factor) => factor * window)
  const settings = paperSettings(window, contexts, values.steps)
  const { lr, batch, accumulate, stride, documents, distances, trials, seed, direct, tune, items, epochs } = values
  const stray = direct?.find((context) => !contexts.includes(context))
  if (stray !== undefined) throw new UsageError(`--direct ${stray}: is none of the contexts, ${contexts.join(', ')}`)
  const extensions = settings.extensions.map((extension) => ({
    ...extension,
    ...defined({ batchSize: batch, accumulate }),
  }))
  const tuned = tune?.split(',').map((name) => {
    if (name !== 'ntk' && name !== 'yarn') throw new UsageError(`--tune ${name}: it must be ntk, yarn or ntk,yarn`)
    return name
  })
  return {
    ...settings,
    extensions,
    dtype: dtype as Settings['dtype'],
    ...defined({
      learningRate: lr,
      stride,
      documents,
      seed,
      choiceItems: items,
      direct: direct?.map((context) => context / window),
      comparedTuned: tuned,
    }),
    passkey: { ...settings.passkey, ...defined({ distances, trials }) },
    needle: { ...settings.needle, ...defined({ trials }) },
    ruler: { ...settings.ruler, ...defined({ trials }) },
    summaries: {
      ...settings.summaries,
      ...defined({
        ...{ epochs, test: items },
        articleTokens: values['article-tokens'],
        summaryTokens: values['summary-tokens'],
      }),
    },
  }
}

function show({ folder, sections, notRun }: ReproduceResult, out: string, output: Output): void {
  const print = ({ head, rows, caption }: Table): void => {
    output.line(caption)
    output.table(
      head,
      rows.map((row) => row.map(({ text }) => text)),
    )
  }
  const claims = claimsTable(folder)
  if (claims) {
    output.line(`\n${CLAIMS_TITLE}`)
    print(claims)
  }
  for (const { title, tables, leftOut, notAsked = [] } of sections) {
    output.line(`\n${title}`)
    for (const table of tables) if (!table.id.endsWith('-published')) print(table)
    for (const line of leftOut) output.line(`left out: ${line}`)
    for (const line of notAsked) output.line(`not asked for: ${line}`)
  }
  for (const { title, why } of notRun) output.line(`${title}: ${why}`)
  output.note(`the report: ${out}/index.html`)
  output.value({ out, claims, sections: sections.map(({ charts: _, groups: __, ...section }) => section), notRun })
}
