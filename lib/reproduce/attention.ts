import { attentionResolution, type ResolutionResult } from '../index.js'
import { type Axis, lineChart, STYLES, ticksOf } from '../report/plot.js'
import { modelTitle } from './beyond.js'
import type { Finding } from '../report/page.js'
import type { ReportFolder } from './folder.js'
import { forwardWork, idOf, madeBy, type Plan } from './models.js'
import { textsOf, trainUnits } from './perplexity.js'
import { finalId, resultOf } from './results.js'
import { type Experiment, figure, given, label, type Section, type Table } from './sections.js'
import { doublings, type Settings, timesText, windowOf } from './settings.js'
import { leftOutOf, type Unit } from './units.js'

/**
 * What reviewers of the paper asked for, read from the model: how finely attention tells near tokens apart, and how large
 * its scores get at far ones, before and after fine-tuning.
 */

/** The base read beyond its window, and the interpolated model before and after fine-tuning, at each factor. */
function looks({
  settings,
  window,
}: {
  settings: Settings
  window: number
}): { id: string; factor: number; context: number }[] {
  return settings.extensions.flatMap(({ factor }) => {
    const ids = ['base', idOf({ method: 'pi', factor, step: 0 }), finalId(settings, 'pi', factor)]
    const direct = settings.direct.includes(factor) ? [finalId(settings, 'direct', factor)] : []
    return [...ids, ...direct].map((id) => ({ id, factor, context: windowOf(window, factor) }))
  })
}

const attentionKey = (id: string, context: number): string => `attention/${id}/${context}`

type AttentionUnit = Omit<ResolutionResult, 'layers'>

function attentionUnits(plan: Plan): Unit[] {
  const { settings, window } = plan
  const { documents, queries, trials } = settings.resolution
  return looks(plan).map(({ id, context }) => ({
    key: attentionKey(id, context),
    label: `attention, ${id}, ${context}`,
    work: forwardWork(documents * context, context, window) * 4,
    after: madeBy(id),
    async run({ model: load, signal, progress }) {
      const model = await load(id)
      const texts = await textsOf(plan, 'pg19', model)
      if (texts.reach < context - 1) return { value: { leftOut: `no document of ${context - 1} tokens` } }
      const { layers: _, ...value } = await attentionResolution(model, texts.documents.slice(0, documents), {
        ...{ context, queries, trials, seed: settings.seed, range: Math.max(1, Math.round(window / 8)) },
        ...(signal ? { signal } : {}),
        onProgress: ({ done, total }) => progress(done / total),
      })
      return { value: value satisfies AttentionUnit }
    },
  }))
}

const found = (folder: ReportFolder) => {
  const { settings, model } = folder.record
  return looks({ settings, window: model.window }).flatMap(({ id, factor, context }) => {
    const unit = resultOf<AttentionUnit>(folder, attentionKey(id, context))
    return unit ? [{ id, factor, context, unit }] : []
  })
}

const thousandths = (value: number): string => value.toFixed(3)
const percent = (value: number): string => `${(100 * value).toFixed(0)} %`

/** Both look at the same attention, which is measured once. */
const measured: Pick<Experiment, 'data' | 'trains' | 'units'> = {
  data: ['pg19'],
  trains: true,
  units: (plan) => [...trainUnits(plan), ...attentionUnits(plan)],
}

export const resolution: Experiment = {
  id: 'resolution',
  title: 'Near tokens: the loss of angular resolution by factor',
  ...measured,
  section(folder): Section {
    const { settings, model } = folder.record
    const list = found(folder)
    const distances = [...new Set(list.flatMap(({ unit }) => unit.copies.map(({ distance }) => distance)))]
    const tables: Table[] = [
      {
        id: 'resolution-near',
        caption: 'Mean attention weight of the token itself (0) and of the tokens 1 to 8 before, over layers and heads',
        head: ['model', 'read to', ...Array.from({ length: 9 }, (_, n) => String(n))],
        rows: list.map(({ id, context, unit }) => [
          label(modelTitle(id)),
          given(context),
          ...unit.near.map((weight) => figure(weight, thousandths)),
        ]),
      },
      {
        id: 'resolution-copies',
        caption: 'How often, in short texts, the first choice repeats random tokens that came so many tokens before',
        head: ['model', 'read to', ...distances.map(String)],
        rows: list.map(({ id, context, unit }) => [
          label(modelTitle(id)),
          given(context),
          ...distances.map((distance) =>
            figure(unit.copies.find((copy) => copy.distance === distance)?.accuracy, percent),
          ),
        ]),
      },
    ]
    const charts = [0, 1].map((tuned) => {
      const shown = list.filter(({ id, factor }) =>
        id === 'base'
          ? factor === settings.extensions[0]!.factor
          : id === (tuned ? finalId(settings, 'pi', factor) : idOf({ method: 'pi', factor, step: 0 })),
      )
      const most = Math.max(0.01, ...shown.flatMap(({ unit }) => unit.near.slice(1)))
      const y: Axis = {
        label: 'attention weight',
        min: 0,
        max: most * 1.1,
        ticks: ticksOf(0, most * 1.1, 4),
      }
      return lineChart({
        title: tuned ? 'Attention to near tokens, PI fine-tuned' : 'Attention to near tokens, PI alone',
        x: { label: 'tokens before', min: 1, max: 8, ticks: [1, 2, 3, 4, 5, 6, 7, 8] },
        y,
        lines: shown.map(({ id, factor, unit }, i) => ({
          ...STYLES[i % STYLES.length]!,
          name: id === 'base' ? 'no change' : timesText(factor),
          points: unit.near.slice(1).map((weight, n) => [n + 1, weight] as const),
        })),
        legend: true,
      })
    })
    return {
      id: 'resolution',
      title: this.title,
      text: [
        `Positions divided by s bring neighbours s times closer in angle. ${settings.resolution.documents} documents of PG-19, ` +
          `${settings.resolution.queries} queries in each head and document; copies of random tokens, ${settings.resolution.trials} at each distance. ` +
          `The unchanged model reads beyond its window of ${model.window}.`,
      ],
      tables,
      charts: list.length > 0 ? charts : [],
      leftOut: leftOutOf(folder, 'attention/'),
    }
  },
}

/** The claim that was left open: that scores beyond the window are larger than those within it. */
function blowUp(list: ReturnType<typeof found>, window: number): Finding[] {
  const most = (ranges: (typeof list)[number]['unit']['ranges']): number =>
    Math.max(...ranges.map(({ max }) => Math.abs(max)))
  const ratios = list
    .filter(({ id }) => id === 'base')
    .map(({ context, unit }) => {
      const outside = unit.ranges.filter(({ from }) => from >= window)
      return { context, ratio: most(outside) / most(unit.ranges.filter(({ from }) => from < window)) }
    })
    .filter(({ ratio }) => Number.isFinite(ratio))
  if (ratios.length === 0) return []
  const claim = 'Read beyond its window, the unchanged model has larger scores there than within it, at every length'
  const figures = ratios.map(({ context, ratio }) => `${ratio.toFixed(2)} at ${context}`).join(', ')
  return [
    { claim, seen: ratios.every(({ ratio }) => ratio > 1), figures: `largest beyond over largest within: ${figures}` },
  ]
}

export const scoreMaxima: Experiment = {
  id: 'score-maxima',
  title: 'Attention scores by distance: do they blow up beyond the window',
  ...measured,
  section(folder): Section {
    const { settings, model } = folder.record
    const list = found(folder)
    const rows: Table['rows'] = list.map(({ id, context, unit }) => {
      const inside = unit.ranges.filter(({ from }) => from < model.window)
      const outside = unit.ranges.filter(({ from }) => from >= model.window)
      const most = (ranges: typeof inside, of: 'max' | 'min' | 'bound'): number | undefined =>
        ranges.length === 0 ? undefined : ranges.reduce((top, range) => Math.max(top, Math.abs(range[of])), 0)
      const [near, far] = [most(inside, 'max'), most(outside, 'max')]
      const text = (value: number): string => value.toFixed(2)
      return [
        label(modelTitle(id)),
        given(context),
        figure(near, text),
        figure(far, text),
        figure(near && far && far / near, text),
        figure(most([...inside, ...outside], 'bound'), text),
      ]
    })
    const charts = settings.extensions.map(({ factor }) => {
      const shown = list.filter((entry) => entry.factor === factor)
      const values = shown.flatMap(({ unit }) => unit.ranges.map(({ max }) => max))
      const [low, high] = [Math.min(0, ...values), Math.max(1, ...values)]
      const context = windowOf(model.window, factor)
      const lengths = doublings(model.window, context)
      return lineChart({
        title: `${timesText(factor)}: largest score by distance`,
        x: { label: 'distance, in tokens', min: 0, max: context, ticks: [0, ...lengths.slice(-3)] },
        y: {
          label: 'largest score',
          min: low,
          max: high * 1.05,
          ticks: ticksOf(low, high * 1.05, 4),
        },
        lines: shown.map(({ id, unit }, i) => ({
          ...STYLES[i % STYLES.length]!,
          name: modelTitle(id).replace(` ${timesText(factor)}`, ''),
          points: unit.ranges.map(({ from, to, max }) => [(from + to) / 2, max] as const),
        })),
        marks: [{ x: model.window, text: `window, ${model.window}` }],
        legend: true,
      })
    })
    return {
      id: 'score-maxima',
      title: this.title,
      text: [
        'Scores q · k / √d before the softmax, of all layers and heads, the first token of the text left out: the claim that ' +
          'extrapolated scores can become catastrophically large, measured on the model before and after.',
      ],
      tables: [
        {
          id: 'score-maxima',
          caption:
            'Largest score within and beyond the original window; and what lengths of queries and keys would allow',
          head: ['model', 'read to', 'within', 'beyond', 'beyond / within', 'at most'],
          rows,
        },
      ],
      charts: list.length > 0 ? charts : [],
      findings: blowUp(list, model.window),
      leftOut: leftOutOf(folder, 'attention/'),
    }
  },
}
