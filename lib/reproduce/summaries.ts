import { mkdir } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { summaryPrompt } from '../eval/summaries.js'
import { loadTokenizer } from '../files/tokenizer.js'
import { readArticles, summarize, type SummaryResult, writeSummaryExamples } from '../index.js'
import { forwardWork, METHODS, type Plan, train, trainUnit } from './models.js'
import { publishedTable } from './published.js'
import { finalId, resultOf } from './results.js'
import { type Experiment, figure, label, percent1 } from './sections.js'
import { extensionOf, type Settings, windowOf } from './settings.js'
import { type Bench, type LeftOut, leftOutOf, type Unit } from './units.js'

/** Table 6: GovReport, summarised by a model that was stretched and then fine-tuned on summaries. */

/** The model that was fine-tuned on summaries. */
const ID = 'summary'
const trainKey = ({ summaries }: Settings): string => `train/${ID}-${summaries.factor}`
const resultKey = (id: string): string => `summaries/${id}`

const limits = ({ summaries: { articleTokens, summaryTokens } }: Settings) => ({ articleTokens, summaryTokens })

/** Number of a whole set where only the file could tell; for the progress bar. */
const SOME = 1000

function tuneUnit(plan: Plan): Unit {
  const { settings, window } = plan
  const { factor, epochs, train: count } = settings.summaries
  const context = windowOf(window, factor)
  return {
    key: trainKey(settings),
    label: 'fine-tuning on summaries',
    work: 3 * epochs * forwardWork((count ?? SOME) * context, context, window),
    after: [`train/pi-${factor}`],
    run: (bench) => tune(plan, bench),
  }
}

/** Why articles and summaries of these lengths do not fit the window; undefined where they do. */
async function tooLong({ settings, window, base }: Plan): Promise<LeftOut | undefined> {
  const { factor, articleTokens, summaryTokens } = settings.summaries
  const frame = (await loadTokenizer(base)).encode(summaryPrompt('')).length
  const [needed, there] = [articleTokens + frame + summaryTokens, windowOf(window, factor)]
  if (needed <= there) return undefined
  return {
    leftOut:
      `articles of ${articleTokens} tokens with the prompt's ${frame} and summaries of ${summaryTokens} make ${needed}, but the largest ` +
      `window is ${there}: give a larger one of --contexts, or less of --article-tokens and --summary-tokens`,
  }
}

async function tune(plan: Plan, bench: Bench) {
  const long = await tooLong(plan)
  if (long) return { value: long }
  const { settings, window, base, data, cacheDir } = plan
  const { factor, epochs, learningRate } = settings.summaries
  const from = finalId(settings, 'pi', factor)
  const examples = join(bench.folder.path, 'data', 'summary-examples.jsonl')
  await mkdir(join(bench.folder.path, 'data'), { recursive: true })
  const model = { tokenizer: () => loadTokenizer(base) }
  const count = await writeSummaryExamples(model, data['gov-report-train']!, examples, limits(settings))
  const { batchSize, accumulate } = extensionOf(settings, factor)
  const steps = Math.max(1, Math.ceil((epochs * count) / (batchSize * accumulate)))
  const { warmupSteps, schedule, finalFraction, maxGradNorm, seed } = settings
  return train(bench, {
    ...{ method: ID, factor, from },
    targets: new Map([[steps, ID]]),
    options: {
      data: examples,
      fields: { prompt: 'prompt', completion: 'completion' },
      packing: 'documents',
      ...{ context: windowOf(window, factor), steps, batchSize, accumulate },
      ...{ learningRate, schedule, finalFraction, maxGradNorm, seed, warmupSteps: Math.min(warmupSteps, steps) },
      ...(cacheDir === undefined ? {} : { cacheDir }),
    },
  })
}

function summaryUnit(plan: Plan, id: string, after: string[]): Unit {
  const { settings, window, data } = plan
  const { factor, temperature, topP, test } = settings.summaries
  const context = windowOf(window, factor)
  return {
    key: resultKey(id),
    label: `summaries, ${id}`,
    work: forwardWork((test ?? SOME) * context, context, window),
    after,
    async run({ model: load, signal, progress }) {
      const long = await tooLong(plan)
      if (long) return { value: long }
      const articles = await readArticles(data['gov-report']!)
      const model = await load(id)
      const result: SummaryResult = await summarize(model, articles.slice(0, test ?? undefined), {
        ...{ ...limits(settings), temperature, topP, seed: settings.seed },
        ...(signal ? { signal } : {}),
        onProgress: ({ done, total }) => progress(done / total),
      })
      // The folder that a file lies in is no part of the result.
      const records = result.records.map((record) => ({ ...record, source: basename(record.source) }))
      return { value: { ...result, records } }
    },
  }
}

const FIGURES = { rouge1: 'ROUGE-1', rouge2: 'ROUGE-2', rougeL: 'ROUGE-L', rougeLsum: 'ROUGE-Lsum' } as const

export const table6: Experiment = {
  id: 'table-6',
  title: 'Table 6: long-document summarization',
  data: ['gov-report', 'gov-report-train'],
  trains: true,
  units(plan) {
    const { settings } = plan
    const { factor } = settings.summaries
    const before = finalId(settings, 'pi', factor)
    return [
      trainUnit(plan, 'pi', factor),
      tuneUnit(plan),
      summaryUnit(plan, before, [`train/pi-${factor}`]),
      summaryUnit(plan, ID, [trainKey(settings)]),
    ]
  },
  section(folder) {
    const { settings, model, kind } = folder.record
    const { factor, articleTokens, summaryTokens, epochs, temperature, topP } = settings.summaries
    const rows = [
      { id: ID, name: `${METHODS.pi} ${windowOf(model.window, factor)}, fine-tuned on summaries` },
      { id: finalId(settings, 'pi', factor), name: `${METHODS.pi} ${windowOf(model.window, factor)}, before that` },
    ].map(({ id, name }) => {
      const result = resultOf<SummaryResult>(folder, resultKey(id))
      return [
        label(name),
        figure(result?.articles, String),
        ...(Object.keys(FIGURES) as (keyof typeof FIGURES)[]).map((type) =>
          figure(result?.[type].fmeasure, (value) => (100 * value).toFixed(1)),
        ),
        figure(result && result.ended / result.articles, percent1),
      ]
    })
    const own = kind === 'miniature' ? ' Articles and summaries are the miniature’s own, in GovReport’s format.' : ''
    return {
      id: 'table-6',
      title: this.title,
      text: [
        `The paper's template; articles cut after ${articleTokens} tokens, summaries of up to ${summaryTokens}, sampled at temperature ` +
          `${temperature}, top-p ${topP}. Fine-tuning from the PI model with the prompt's loss masked, ${epochs} epochs ` +
          `(counted at an article a window). F-measures, with Porter stems.${own}`,
      ],
      tables: [
        {
          id: 'table-6',
          caption: 'ROUGE against the reference summaries, times 100',
          head: ['model', 'articles', ...Object.values(FIGURES), 'ended by the model'],
          rows,
        },
        ...publishedTable('table-6', kind),
      ],
      charts: [],
      leftOut: leftOutOf(folder, 'summaries/'),
    }
  },
}
