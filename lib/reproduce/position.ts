import { lastGain } from '../eval/position.js'
import { perplexityByPosition, type PositionResult } from '../index.js'
import { lineChart, STYLES } from '../report/plot.js'
import { contrasted, modelTitle, pairs } from './beyond.js'
import { lengthAxis, logAxis } from './charts.js'
import type { ReportFolder } from './folder.js'
import { forwardWork, madeBy } from './models.js'
import { textsOf, trainUnits } from './perplexity.js'
import { resultOf } from './results.js'
import { type Experiment, figure, given, label, perplexityText, type Section, type Table } from './sections.js'
import { doublings, timesText, windowOf } from './settings.js'
import { leftOutOf, type Unit } from './units.js'

/** Perplexity by position within the window: does the far context help, and where does it stop. */

const positionKey = (id: string, context: number): string => `position/${id}/${context}`

export const positions: Experiment = {
  id: 'position',
  title: 'Perplexity by position: does the far context help, and where does it stop',
  data: ['pg19'],
  trains: true,
  units: (plan) => [
    ...trainUnits(plan),
    ...pairs(plan).map(({ id, context }): Unit => {
      const { settings, window } = plan
      const { documents, windows } = settings.position
      return {
        key: positionKey(id, context),
        label: `perplexity by position, ${id}, ${context}`,
        work: forwardWork(documents * windows * context, context, window),
        after: madeBy(id),
        async run({ model: load, signal, progress }) {
          const model = await load(id)
          const texts = await textsOf(plan, 'pg19', model)
          if (texts.reach < context - 1) return { value: { leftOut: `no document of ${context - 1} tokens` } }
          const value: PositionResult = await perplexityByPosition(model, texts.documents.slice(0, documents), {
            ...{ window: context, windowsPerDocument: windows },
            ...(signal ? { signal } : {}),
            onProgress: ({ done, total }) => progress(done / total),
          })
          return { value }
        },
      }
    }),
  ],
  section: (folder) => positionSection(folder),
}

function positionSection(folder: ReportFolder): Section {
  const { settings, model } = folder.record
  const charts: string[] = []
  const rows: Table['rows'] = []
  for (const { factor } of settings.extensions) {
    const context = windowOf(model.window, factor)
    const found = contrasted(settings, factor).flatMap((id) => {
      const result = resultOf<PositionResult>(folder, positionKey(id, context))
      return result ? [{ id, result }] : []
    })
    if (found.length === 0) continue
    const lines = found.map(({ id, result }, i) => ({
      ...STYLES[i % STYLES.length]!,
      name: modelTitle(id),
      points: result.bins.slice(4).map(({ from, to, perplexity }) => [Math.sqrt(from * to), perplexity] as const),
    }))
    charts.push(
      lineChart({
        title: `${timesText(factor)}: perplexity by tokens before`,
        x: lengthAxis('tokens of text before', [16, ...doublings(model.window / 2, context)]),
        y: logAxis(
          'perplexity',
          lines.flatMap(({ points }) => points.map(([, value]) => value)),
        ),
        lines,
        legend: true,
      }),
    )
    for (const { id, result } of found) {
      const last = result.bins.filter(({ from }) => from * 2 <= context)
      const [far, before] = [last.at(-1), last.at(-2)]
      rows.push([
        label(modelTitle(id)),
        given(context),
        figure(before?.perplexity, perplexityText),
        figure(far?.perplexity, perplexityText),
        figure(lastGain(result.bins), String),
      ])
    }
  }
  return {
    id: 'position',
    title: positions.title,
    text: [
      'Documents cut into windows that do not overlap; each token is scored by what stands before it. Text helps up to the end ' +
        'of the last bin in which the loss is lower than in the one before by more than 1.96 standard errors (95 %).',
    ],
    tables: [
      {
        id: 'position',
        caption:
          'PG-19: perplexity in the last two doublings of the tokens before, and up to where context helps, at 95 %',
        head: ['model', 'window', 'last doubling but one', 'last doubling', 'helps up to'],
        rows,
      },
    ],
    charts,
    leftOut: leftOutOf(folder, 'position/'),
  }
}
