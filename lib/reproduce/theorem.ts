import { type Theory, theory } from '../index.js'
import { boundCharts, fitCharts, resolutionChart, sumCharts } from '../report/theory.js'
import { format } from '../theory/statements.js'
import type { Plan } from './models.js'
import { type Experiment, figure, label, type Section } from './sections.js'
import { windowOf } from './settings.js'
import type { Unit } from './units.js'

/** Theorem 2.1 and figures 2 and 5: mathematics, for the paper's LLaMA and for the head of the model at hand. */

const KEYS = { paper: 'theory/paper', model: 'theory/model' } as const

function units({ settings, window }: Plan): Unit[] {
  const context = windowOf(window, Math.max(...settings.extensions.map(({ factor }) => factor)))
  const unit = (
    key: string,
    of: (model: { headDim: number; theta: number }) => Parameters<typeof theory>[0],
  ): Unit => ({
    key,
    label: 'theory',
    work: 4 * window,
    async run({ model: load, progress }) {
      const { config } = await load('base')
      const options = of({ headDim: config.headDim, theta: config.rope.theta })
      return { value: theory({ ...options, seed: settings.seed, onProgress: (part) => progress(part) }) }
    },
  })
  return [unit(KEYS.paper, () => ({})), unit(KEYS.model, (head) => ({ ...head, window, context }))]
}

const WHOSE = { paper: 'The paper’s LLaMA', model: 'This model' } as const

function experiment(
  id: string,
  title: string,
  text: string,
  charts: (result: Theory) => string[],
  statements: readonly string[],
  tables: (result: Theory, whose: string, suffix: string) => Section['tables'] = () => [],
  drawn: (result: Theory) => string = () => '',
): Experiment {
  return {
    id,
    title,
    data: [],
    trains: false,
    units,
    section(folder) {
      const found = (['paper', 'model'] as const).flatMap((name) => {
        const result = folder.get<Theory>(KEYS[name])
        return result ? [{ name, result, whose: `${WHOSE[name]}, d = ${result.headDim}, L = ${result.window}` }] : []
      })
      return {
        id,
        title,
        text: found.length > 0 ? [text] : [],
        tables: found.flatMap(({ name, result, whose }) => tables(result, whose, name === 'paper' ? '' : '-model')),
        charts: [],
        groups: found.map(({ result, whose }) => ({ name: `${whose}${drawn(result)}`, charts: charts(result) })),
        findings: found.flatMap(({ result, whose }) =>
          result.statements
            .filter((statement) => statements.includes(statement.id))
            .map(({ claim, holds, figures }) => ({ claim: `${whose}: ${claim}`, seen: holds, figures })),
        ),
        leftOut: [],
      }
    },
  }
}

export const theorem = experiment(
  'theorem-2.1',
  'Theorem 2.1: the error of interpolation, and the ratio of the bounds',
  'A score between two trained positions against the straight line through both. All is computed from the dimensions alone, ' +
    'for the paper’s LLaMA (d = 128, c = 10000, L = 2048) and for the head of this model.',
  (result) => [...boundCharts(result), resolutionChart(result)],
  ['theorem-published', 'theorem-corrected', 'ratio-bounds', 'ratio-attained', 'extrapolation-bound', 'resolution'],
  ({ interpolation, ratios }, whose, suffix) => [
    {
      id: `theorem-2.1${suffix}`,
      caption: `${whose}: bounds per max|h|, and how many times larger the extrapolated side is`,
      head: ['bound', 'interpolation, in the middle', 'extrapolated over interpolated'],
      rows: [
        [label('as published, B = d'), figure(interpolation.published, format), figure(ratios.published, format)],
        [label('corrected, B = d'), figure(interpolation.corrected, format), figure(ratios.corrected, format)],
        [
          label('corrected, least B in the plotted range'),
          figure(interpolation.corrected, format),
          figure(ratios.plotted, format),
        ],
        [
          label('corrected, least B up to the extended window'),
          figure(interpolation.corrected, format),
          figure(ratios.extended, format),
        ],
        [label('what is attained'), figure(interpolation.worst, format), figure(ratios.attained, format)],
      ],
    },
  ],
)

const SOLVERS = {
  qr: 'QR, float64',
  normal64: 'normal equations, float64',
  normal32: 'normal equations, float32',
} as const

export const figure2 = experiment(
  'figure-2',
  'Figure 2: a score fitted in the window, extrapolated and interpolated',
  'Random targets, fitted by least squares in the basis of an attention score. How high the blow-up beyond the window is ' +
    'depends on the solver and the ridge, because the basis is nearly dependent; the table has several.',
  fitCharts,
  ['fit-extrapolates', 'fit-interpolates', 'fit-height', 'fit-ridge'],
  ({ fit }, whose, suffix) => [
    {
      id: `figure-2${suffix}`,
      caption: `${whose}: largest |a(s)| inside and outside of the window`,
      head: ['solver', 'ridge', 'inside', 'outside', 'outside / inside'],
      rows: fit.solutions.map(({ solver, ridge, inside, outside }) => [
        label(SOLVERS[solver]),
        figure(ridge, String),
        figure(inside, format),
        figure(outside, format),
        figure(outside / inside, format),
      ]),
    },
  ],
  ({ fit: { shown } }) => `; drawn: ${SOLVERS[shown.solver]}, ridge ${shown.ridge}`,
)

export const figure5 = experiment(
  'figure-5',
  'Figure 5: B(s)/d, the sum in the bound on extrapolated scores',
  'As plotted in the paper, and up to the extended window.',
  sumCharts,
  ['sums-plotted', 'sums-extended'],
  ({ sums }, whose, suffix) => [
    {
      id: `figure-5${suffix}`,
      caption: `${whose}: B(s)/d`,
      head: ['range', 'least', 'at s', 'median', 'largest', 'share below 1'],
      rows: [sums.plotted, sums.extended].map(({ to, min, minAt, median, max, below }) => [
        label(`s < ${to}`),
        ...[figure(min, format), figure(minAt, String), figure(median, format), figure(max, format)],
        figure(below, (share) => `${(100 * share).toFixed(1)} %`),
      ]),
    },
  ],
)
