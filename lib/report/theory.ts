import type { Theory } from '../theory/theory.js'
import { format } from '../theory/statements.js'
import { barChart } from './cells.js'
import { figure, findings, page, table } from './page.js'
import { type Axis, escapeXml, lineChart, logTicksOf, STYLES, ticksOf } from './plot.js'

const [BLUE, RED, GREEN, YELLOW, VIOLET] = STYLES
/** Curves of many points are thin, without markers, and solid. */
const curve = ({ color }: { color: string }) => ({ color, width: 1.5 })

/** An axis from 0, or from -most, to a round number above `most`. */
function linear(label: string, most: number, both = false): Axis {
  const ticks = ticksOf(0, most * 1.15, 4)
  const max = Math.max(ticks.at(-1)!, most * 1.05)
  const all = both ? [...ticks.slice(1).map((tick) => -tick), ...ticks].sort((a, b) => a - b) : ticks
  return { label, min: both ? -max : 0, max, ticks: all }
}

const positions = (to: number, label = 'distance s, in tokens'): Axis => ({
  label,
  min: 0,
  max: to,
  ticks: ticksOf(0, to, 4),
})

const most = (values: readonly number[]): number => values.reduce((top, value) => Math.max(top, Math.abs(value)), 0)

/** Figure 2 of arXiv 2306.15595: the fit, its extrapolation, its interpolation. */
export function fitCharts({ window, fit }: Pick<Theory, 'window' | 'fit'>): string[] {
  const { targets, scores, between } = fit
  const every = Math.ceil(window / 512)
  const inside = scores.slice(0, window)
  const places = between.s.map((s, i) => [s, between.scores[i]!] as const)
  const [from, to] = [between.s[0]!, Math.ceil(between.s.at(-1)!)]
  const third = linear('a(s)', most(between.scores), true)
  const whole = Array.from({ length: to - from + 1 }, (_, i) => from + i)
  return [
    lineChart({
      title: 'Figure 2a: fitted in the window',
      x: positions(window),
      y: linear('a(s)', most(targets), true),
      lines: [
        { color: RED.color, marker: 'dot', dots: true, name: 'random targets', points: points(targets, every) },
        { ...curve(BLUE), name: 'the fitted score', points: points(inside) },
      ],
      legend: true,
    }),
    lineChart({
      title: 'Figure 2b: the same score beyond it',
      x: positions(2 * window),
      y: linear('a(s)', most(scores), true),
      lines: [{ ...curve(BLUE), name: 'the fitted score', points: points(scores) }],
      marks: [{ x: window, text: `window, ${window}` }],
      legend: true,
    }),
    lineChart({
      title: 'Figure 2c: the same score between positions',
      x: {
        label: 'distance s; lines at whole positions',
        min: from,
        max: to,
        ticks: ticksOf(from, to, 5),
        grid: whole,
      },
      y: third,
      lines: [
        { ...curve(BLUE), name: 'every eighth of a position', points: places },
        {
          ...{ color: YELLOW.color, marker: 'dot', dots: true, name: 'whole positions' },
          points: places.filter(([s]) => Number.isInteger(s)),
        },
      ],
      legend: true,
    }),
  ]
}

/** Figure 5 of arXiv 2306.15595, B(s)/d, as plotted there and up to the extended window. */
export function sumCharts({ window, context, sums }: Pick<Theory, 'window' | 'context' | 'sums'>): string[] {
  const { values, plotted, extended } = sums
  const low = Math.min(plotted.min, extended.min, 1) * 0.8
  const ticks = logTicksOf(low, plotted.max * 1.1)
  const y: Axis = { label: 'B(s) / d, log scale', min: low, max: plotted.max * 1.1, ticks, log: true }
  const chart = (title: string, to: number): string =>
    lineChart({
      title,
      x: positions(to),
      y,
      lines: [{ ...curve(BLUE), points: points(values.slice(0, to)) }],
      marks: [{ y: 1, text: 'B(s) = d' }],
    })
  return [
    chart(`Figure 5: B(s) / d up to ${2 * window}`, 2 * window),
    chart(`The same up to the extended window, ${context}`, context),
  ]
}

/** Theorem 2.1: the published constant, the bound, and what is attained; and the ratios of the two sides. */
export function boundCharts(theory: Pick<Theory, 'interpolation' | 'ratios' | 'window' | 'context'>): string[] {
  const { interpolation, ratios, window, context } = theory
  const { part, published, corrected, worst } = interpolation.curve
  const line = (values: readonly number[]): [number, number][] => values.map((value, i) => [part[i]!, value])
  const values = [ratios.published, ratios.corrected, ratios.plotted, ratios.extended, ratios.attained]
  const top = Math.max(...values)
  return [
    lineChart({
      title: 'Error of the straight line, max|h| = 1',
      x: { label: 'place between two positions', min: 0, max: 1, ticks: [0, 0.25, 0.5, 0.75, 1] },
      y: linear('|a(s) - a_lin(s)|', most(corrected)),
      lines: [
        { ...curve(RED), dash: '7 4', width: 2, name: 'as published', points: line(published) },
        { ...curve(GREEN), dash: '2 3', width: 2.4, name: 'corrected', points: line(corrected) },
        { ...curve(BLUE), name: 'the most that occurs', points: line(worst) },
      ],
      legend: true,
    }),
    barChart({
      title: 'Extrapolated over interpolated',
      groups: ['published', 'B = d', `s < ${2 * window}`, `s < ${context}`, 'attained'],
      y: { ...linear('times', top), format },
      series: [{ name: 'ratio', color: VIOLET.color, values }],
    }),
  ]
}

/** What interpolation costs at small distances: the most that a score can change from distance 0 to 1 .. 8. */
export function resolutionChart({ resolution }: Pick<Theory, 'resolution'>): string {
  const { distances, factors } = resolution
  return lineChart({
    title: 'Telling near neighbours apart',
    x: { label: 'distance s, in tokens', min: 0, max: distances.at(-1)!, ticks: [0, ...distances] },
    y: linear('largest change of the score', most(factors.flatMap(({ changes }) => changes))),
    lines: factors.map(({ factor, changes }, i) => ({
      ...STYLES[i % STYLES.length]!,
      name: factor === 1 ? 'unscaled' : `factor ${format(factor)}`,
      points: [[0, 0] as const, ...distances.map((s, at) => [s, changes[at]!] as const)],
    })),
    legend: true,
  })
}

/** Everything that `theory` computed, on one page; `about` says whose numbers they are. */
export function theoryPage(theory: Theory, { about, version }: { about?: string; version: string }): string {
  const { headDim, theta, window, context, seed, fit, statements, ratios } = theory
  const setting = `d = ${headDim}, c = ${format(theta)}, L = ${window}, L' = ${context}`
  const names = { qr: 'QR, float64', normal64: 'normal equations, float64', normal32: 'normal equations, float32' }
  const rows = fit.solutions.map(({ solver, ridge, magnitude, residual, inside, outside }) => [
    names[solver],
    ridge === 0 ? '0' : format(ridge),
    ...[magnitude, residual, inside, outside, outside / inside].map(format),
  ])
  const of = (...ids: string[]): string =>
    findings(
      statements.filter(({ id }) => ids.includes(id)).map(({ holds, ...rest }) => ({ ...rest, seen: holds })),
      ['holds', 'fails'],
    )
  const body = `<h1>Why positions are interpolated: the theory, recomputed</h1>
<p>Sections 2.3, C.1 and C.2 of <a href="https://arxiv.org/abs/2306.15595">arXiv 2306.15595</a> argue that attention scores between
trained positions are safe and scores beyond them are not. This page recomputes its theorem and Figures 2 and 5 for
${escapeXml(about ?? "the paper's LLaMA")}: ${escapeXml(setting)}. Every number and every verdict on it was computed when it was made.</p>
<p>The score of a query and a key at distance s is a(s) = Re Σ h<sub>j</sub> exp(i s θ<sub>j</sub>), a sum over d/2 pairs with
θ<sub>j</sub> = c<sup>−2j/d</sup>; the h<sub>j</sub> are what query and key hold. Position Interpolation divides positions by L'/L, so that scores are
needed between the whole positions of training; a<sub>lin</sub> is the straight line between two of them.</p>
<h2>Theorem 2.1: between two positions</h2>
${figure(
  boundCharts(theory),
  'Left: what the theorem allows, what follows from its proof, and the largest error that any h with max|h| = 1 has. Right: how many ' +
    'times larger the bound on extrapolated scores, 2 B(s) max|h|, is than the bound on interpolated ones: with the published constant, ' +
    'with the corrected one at three values of B, and the largest values themselves.',
)}
${of('theorem-published', 'theorem-corrected', 'ratio-bounds', 'ratio-attained')}
<p>The paper's “about 600 times” is ${format(ratios.published)} here. It compares two upper bounds of unlike kind, a distance from a straight line and
a size, and says nothing about the scores of a trained model; <code>ropewalk eval attention</code> measures those.</p>
<h2>Figure 5: the bound on extrapolated scores</h2>
${figure(sumCharts(theory))}
${of('sums-plotted', 'sums-extended', 'extrapolation-bound')}
<h2>Figure 2: random scores, fitted</h2>
${figure(
  fitCharts(theory),
  `Normal random targets at s = 0 .. ${window - 1} fitted by ${headDim} functions cos(s θ), sin(s θ), by QR with a ridge of ${fit.shown.ridge}: ` +
    'there float64 determines the result. The paper uses no ridge.',
)}
${table({ head: ['solver', 'ridge', 'max|h|', 'residual', 'inside', 'outside', 'ratio'], rows, caption: 'Largest |a(s)| inside and outside of the window' })}
${of('fit-extrapolates', 'fit-interpolates', 'fit-height', 'fit-ridge')}
<h2>What interpolation costs</h2>
${figure([resolutionChart(theory)], 'The most that the score can change between distance 0 and s when max|h| = 1, by the factor that positions are divided by.')}
${of('resolution')}
<p class="soft">${escapeXml(`ropewalk ${version}, ${setting}, seed ${seed}`)}. The same numbers as JSON: <code>ropewalk theory --json</code>.</p>`
  return page({ title: `ropewalk theory: ${setting}`, body })
}

const points = (values: readonly number[], every = 1): [number, number][] =>
  values.flatMap((value, s): [number, number][] => (s % every === 0 ? [[s, value]] : []))
