import { type Axis, type Line, lineChart, logTicksOf, STYLES, ticksOf } from '../report/plot.js'
import type { ReportFolder } from './folder.js'
import { idOf, METHODS, type Method } from './models.js'
import { CORPORA, type Corpus, passkeyOf, perplexityOf, stepIds } from './results.js'
import { timesText, windowOf } from './settings.js'

/** The charts of the report; what has no figure yet is left out of them. */

type Points = [x: number, y: number][]

const style = (index: number) => STYLES[index % STYLES.length]!

/** A logarithmic axis that holds all values. */
export function logAxis(label: string, values: readonly number[], format?: (value: number) => string): Axis {
  const finite = values.filter((value) => Number.isFinite(value) && value > 0)
  const [low, high] = finite.length > 0 ? [Math.min(...finite), Math.max(...finite)] : [1, 10]
  const [min, max] = [low / 1.05, Math.max(high, low * 1.2) * 1.05]
  const ticks = logTicksOf(min, max)
  const shown = ticks.length > 3 ? ticks : ticksOf(min, max)
  return {
    label: `${label}, log scale`,
    min,
    max,
    ticks: shown,
    log: true,
    format: format ?? ((value) => String(Number(value.toPrecision(3)))),
  }
}

/** An axis of lengths, with the lengths themselves as ticks. */
export const lengthAxis = (label: string, lengths: readonly number[]): Axis => {
  const ticks = [...new Set(lengths)].sort((a, b) => a - b)
  const [min, max] = [ticks[0] ?? 1, ticks.at(-1) ?? 2]
  return { label, min: min === max ? min / 2 : min, max, ticks, log: true }
}

const share: Pick<Axis, 'min' | 'max' | 'ticks' | 'format'> = {
  ...{ min: 0, max: 1, ticks: [0, 0.25, 0.5, 0.75, 1] },
  format: (value) => `${Math.round(100 * value)} %`,
}

/** Perplexity against the window: PI beside no change, and direct fine-tuning beside no change. */
export function lossCharts(
  folder: ReportFolder,
  corpus: Corpus,
  rows: readonly { method: Method; factor: number; id: string; windows: number[] }[],
): string[] {
  const pointsOf = ({ id, windows }: (typeof rows)[number]): Points =>
    windows.flatMap((window): Points => {
      const value = perplexityOf(folder, corpus, id, window)?.perplexity
      return value === undefined ? [] : [[window, value]]
    })
  return (['pi', 'direct'] as const).flatMap((method) => {
    const shown = rows.filter((row) => row.method === 'base' || row.method === method)
    const lines = shown.map((row, i) => ({
      ...style(i),
      name: row.method === 'base' ? METHODS.base : `${METHODS[method]} ${timesText(row.factor)}`,
      points: pointsOf(row),
    }))
    if (shown.length < 2 || lines.every(({ points }) => points.length === 0)) return []
    const values = lines.flatMap(({ points }) => points.map(([, value]) => value))
    return lineChart({
      title: `${CORPORA[corpus]}: ${method === 'pi' ? 'interpolated' : 'fine-tuned without interpolation'}`,
      x: lengthAxis(
        'window, in tokens',
        shown.flatMap(({ windows }) => windows),
      ),
      y: logAxis('perplexity', values),
      lines,
      legend: true,
    })
  })
}

/** Table 3 as a picture. */
export function stepCharts(folder: ReportFolder): string[] {
  const { settings, model } = folder.record
  const lines = settings.extensions.map(({ factor, steps }, i): Line & { points: Points } => ({
    ...style(i),
    name: timesText(factor),
    points: stepIds(settings, 'pi', factor).flatMap(({ step, id }): Points => {
      const value = perplexityOf(folder, 'pg19', id, windowOf(model.window, factor))?.perplexity
      return value === undefined ? [] : [[step / steps, value]]
    }),
  }))
  const values = lines.flatMap(({ points }) => points.map(([, value]) => value))
  if (values.length === 0) return []
  const x = { ...share, label: 'share of the steps' }
  const y = logAxis('perplexity at the extended window', values)
  return [lineChart({ title: 'PI, while it is fine-tuned', x, y, lines, legend: true })]
}

/** k_max over the steps, and what was found at each distance at the end. */
export function passkeyCharts(
  folder: ReportFolder,
  rows: readonly { method: Method; factor: number; steps: number; window: number }[],
): string[] {
  const { settings } = folder.record
  const methods = (['pi', 'direct'] as const).filter((method) => rows.some((row) => row.method === method))
  return methods.flatMap((method) => {
    const shown = rows.filter((row) => row.method === method)
    const overSteps = shown.map(({ factor, steps, window }, i) => ({
      ...style(i),
      name: timesText(factor),
      points: stepIds(settings, method, factor).flatMap(({ step, id }): Points => {
        const result = passkeyOf(folder, id, window)
        return result ? [[step / steps, result.kmax / window]] : []
      }),
    }))
    const byDistance = shown.map(({ factor, steps, window }, i) => ({
      ...style(i),
      name: timesText(factor),
      points: (passkeyOf(folder, idOf({ method, factor, step: steps }), window)?.distances ?? []).map(
        ({ distance, accuracy }): [number, number] => [distance / window, accuracy],
      ),
    }))
    if ([...overSteps, ...byDistance].every(({ points }) => points.length === 0)) return []
    const name = METHODS[method]
    return [
      lineChart({
        title: `${name}: k_max, while it is fine-tuned`,
        x: { ...share, label: 'share of the steps' },
        y: { ...share, label: 'k_max, share of the window' },
        lines: overSteps,
        legend: true,
      }),
      lineChart({
        title: `${name}: keys found after it`,
        x: { ...share, label: 'distance of the key from the end, share of the window' },
        y: { ...share, label: 'keys found' },
        lines: byDistance,
        legend: true,
      }),
    ]
  })
}
