import { perplexity, readTokenDocuments, type TokenDocument } from '../index.js'
import { slidingWindows } from '../eval/perplexity.js'
import type { ReportFolder, ReportRecord } from './folder.js'
import { forwardWork, idOf, madeBy, METHODS, type Method, type Plan, trainUnit } from './models.js'
import { publishedTable } from './published.js'
import {
  type Cell,
  type Experiment,
  figure,
  given,
  intervalText,
  label,
  none,
  percent,
  perplexityText,
  type Table,
} from './sections.js'
import { CORPORA, type Corpus, largestWindow, perplexityKey, perplexityOf, stepIds } from './results.js'
import { doublings, type Settings, windowOf } from './settings.js'
import { lossCharts, stepCharts } from './charts.js'
import { leftOutOf, type Unit } from './units.js'

/** Tables 1, 2 and 3: sliding-window perplexity of two corpora. */

/** Texts of a corpus that all windows are measured on: those of at least the largest window, or the longest. */
export interface Texts {
  documents: TokenDocument[]
  /** Tokens of the shortest of them. */
  reach: number
  longest: number
}

const readings = new WeakMap<Plan, Map<Corpus, Promise<Texts>>>()

/** Read once a run: every model of a report has the same tokenizer. */
export function textsOf(plan: Plan, corpus: Corpus, model: Parameters<typeof readTokenDocuments>[0]): Promise<Texts> {
  const known = readings.get(plan) ?? new Map<Corpus, Promise<Texts>>()
  readings.set(plan, known)
  const reading = known.get(corpus) ?? readTexts(plan, corpus, model)
  known.set(corpus, reading)
  return reading
}

async function readTexts(plan: Plan, corpus: Corpus, model: Parameters<typeof readTokenDocuments>[0]): Promise<Texts> {
  const { settings, window, data } = plan
  const all = await readTokenDocuments(model, data[corpus]!)
  const longest = Math.max(...all.map(({ ids }) => ids.length))
  // One token of a window is the BOS.
  const needed = Math.min(largestWindow(settings, window) - 1, longest)
  const documents = all.filter(({ ids }) => ids.length >= needed).slice(0, settings.documents)
  return { documents, reach: Math.min(...documents.map(({ ids }) => ids.length)), longest }
}

/** Measures a model on a corpus with windows of one length. */
export function perplexityUnit(plan: Plan, corpus: Corpus, id: string, window: number): Unit {
  const { settings } = plan
  const truncate =
    corpus === 'proof-pile' ? Math.max(settings.proofPileTokens, largestWindow(settings, plan.window)) : undefined
  // What texts there are is known when they have been read; this is only for the progress bar.
  const length = largestWindow(settings, plan.window)
  const passes = slidingWindows(length, window, settings.stride).length
  return {
    key: perplexityKey(corpus, id, window),
    label: `perplexity, ${CORPORA[corpus]}, ${id}, window ${window}`,
    work: forwardWork(settings.documents * passes * window, window, plan.window),
    after: madeBy(id),
    async run({ model: load, signal, progress }) {
      const model = await load(id)
      const { documents, reach, longest } = await textsOf(plan, corpus, model)
      if (reach < window - 1) {
        return { value: { leftOut: `no document has ${window - 1} tokens, the longest has ${longest}` } }
      }
      const [result] = await perplexity(model, documents, {
        windows: [window],
        stride: Math.min(settings.stride, window - 1),
        ...(truncate === undefined ? {} : { truncate }),
        ...(signal ? { signal } : {}),
        onProgress: ({ done, total }) => progress(done / total),
      })
      return { value: result }
    },
  }
}

/** Models of tables 1 and 2, with the windows that each is measured at. */
export function rowsOf({ settings, window }: { settings: Settings; window: number }) {
  const rows: { method: Method; factor: number; steps: number; id: string; windows: number[] }[] = []
  rows.push({
    ...{ method: 'base', factor: 1, steps: 0, id: 'base' },
    windows: doublings(window, largestWindow(settings, window)),
  })
  for (const { factor, steps } of settings.extensions) {
    const methods: Method[] = settings.direct.includes(factor) ? ['direct', 'pi'] : ['pi']
    for (const method of methods) {
      const id = idOf({ method, factor, step: steps })
      rows.push({ method, factor, steps, id, windows: doublings(window, windowOf(window, factor)) })
    }
  }
  return rows
}

/** Fine-tunings of a run: PI at every factor, direct where asked. */
export function trainUnits(plan: Plan): Unit[] {
  const { settings } = plan
  return settings.extensions.flatMap(({ factor }) => [
    trainUnit(plan, 'pi', factor),
    ...(settings.direct.includes(factor) ? [trainUnit(plan, 'direct', factor)] : []),
  ])
}

const view = ({ settings, model }: ReportRecord) => ({ settings, window: model.window })

/** The window a model was stretched to, or the base's own. */
export const targetOf = (record: ReportRecord, factor: number): number => windowOf(record.model.window, factor)

export const rowName = (method: Method, window: number): string =>
  method === 'base' ? `${window}, ${METHODS.base}` : `${window}, ${METHODS[method]}`

function perplexityTable(folder: ReportFolder, corpus: Corpus, id: string): Table[] {
  const rows = rowsOf(view(folder.record))
  const windows = [...new Set(rows.flatMap((row) => row.windows))].sort((a, b) => a - b)
  const build = (suffix: string, caption: string, cellOf: (id: string, window: number) => Cell): Table => ({
    id: `${id}${suffix}`,
    caption,
    head: ['model: window, method', ...windows.map((window) => `window ${window}`)],
    rows: rows.map((row) => [
      label(rowName(row.method, targetOf(folder.record, row.factor))),
      ...windows.map((window) => (row.windows.includes(window) ? cellOf(row.id, window) : none(''))),
    ]),
  })
  const at = (model: string, window: number) => perplexityOf(folder, corpus, model, window)
  const some = rows.flatMap((row) => row.windows.map((window) => at(row.id, window))).find((result) => result)
  const documents = some ? `, ${some.documents} documents, ${some.tokens} tokens` : ''
  return [
    build('', `${CORPORA[corpus]}: perplexity, each token counting the same${documents}`, (model, window) =>
      figure(at(model, window)?.perplexity, perplexityText),
    ),
    build(
      '-windows',
      'As in YaRN’s evaluation: from the mean over windows of their mean loss, the first counting as much as a later one',
      (model, window) => figure(at(model, window)?.perplexityWindowMean, perplexityText),
    ),
    build('-intervals', '95 % intervals of the first table, over documents', (model, window) => {
      const interval = at(model, window)?.interval
      return interval ? { value: interval.join(' '), text: intervalText(interval) } : none()
    }),
  ]
}

const corpusExperiment = (id: 'table-1' | 'table-2', corpus: Corpus): Experiment => ({
  id,
  title: `Table ${id.at(-1)}: perplexity by context window, ${CORPORA[corpus]}`,
  data: [corpus],
  trains: true,
  units: (plan) => [
    ...trainUnits(plan),
    ...rowsOf(plan).flatMap((row) => row.windows.map((window) => perplexityUnit(plan, corpus, row.id, window))),
  ],
  section(folder) {
    const { settings } = folder.record
    return {
      id,
      title: this.title,
      text: [
        `Sliding windows moved on by ${settings.stride} tokens (arXiv 2108.12409); a window begins with the BOS token and ` +
          'only tokens that no earlier window held are scored. All figures are on the same documents.',
        'No change: the model as it is, read beyond its window. Direct: fine-tuned at the larger window without interpolation. ' +
          'PI: interpolated, and fine-tuned with as many steps.',
      ],
      tables: [...perplexityTable(folder, corpus, id), ...publishedTable(id, folder.record.kind)],
      charts: lossCharts(folder, corpus, rowsOf(view(folder.record))),
      leftOut: leftOutOf(folder, `perplexity/${corpus}/`),
    }
  },
})

export const table1 = corpusExperiment('table-1', 'pg19')
export const table2 = corpusExperiment('table-2', 'proof-pile')

export const table3: Experiment = {
  id: 'table-3',
  title: 'Table 3: perplexity against fine-tuning steps, PG-19',
  data: ['pg19'],
  trains: true,
  units: (plan) => {
    const { settings, window } = plan
    return settings.extensions.flatMap(({ factor }) => [
      trainUnit(plan, 'pi', factor),
      ...stepIds(settings, 'pi', factor).map(({ id }) => perplexityUnit(plan, 'pg19', id, windowOf(window, factor))),
    ])
  },
  section(folder) {
    const { settings, model } = folder.record
    const columns = Array.from({ length: settings.points + 1 }, (_, n) => n / settings.points)
    const rows = settings.extensions.map((extension) => {
      const { factor, steps } = extension
      const window = windowOf(model.window, factor)
      const cells = stepIds(settings, 'pi', factor).map(({ id }) =>
        figure(perplexityOf(folder, 'pg19', id, window)?.perplexity, perplexityText),
      )
      return [label(`${window}, PI`), given(steps), ...cells]
    })
    return {
      id: 'table-3',
      title: this.title,
      text: [
        'The extended window, evaluated from the checkpoints of the one fine-tuning run; step 0 is interpolation alone.',
      ],
      tables: [
        {
          id: 'table-3',
          caption: 'Perplexity at the extended window, by the share of the steps done',
          head: ['model', 'steps in all', ...columns.map(percent)],
          rows,
        },
        ...publishedTable('table-3', folder.record.kind),
      ],
      charts: stepCharts(folder),
      leftOut: leftOutOf(folder, 'perplexity/pg19/'),
    }
  },
}
