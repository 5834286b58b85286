import { extrapolationSum } from './bounds.js'
import { LeastSquares, NormalEquations } from './fit.js'
import { normals } from './random.js'
import { attentionScore, type Coefficients, magnitude } from './score.js'

/**
 * One way to solve the fit of Figure 2.
 *
 * @category Theory
 */
export interface FitSolution {
  /** `qr`: Householder reflections in float64; `normal64`, `normal32`: the normal equations kept in float64, float32. */
  solver: 'qr' | 'normal64' | 'normal32'
  /** eps of min |X w - y|^2 + eps |w|^2. */
  ridge: number
  /** max_j |h_j| */
  magnitude: number
  /** Root mean square of a(s) - y(s) over the window. */
  residual: number
  /** max |a(s)| over whole s in [0, L). */
  inside: number
  /** max |a(s)| over whole s in [L, 2L). */
  outside: number
}

/**
 * Figure 2: random targets y(s), normal with variance 1, for s in [0, L), fitted by least squares in the basis cos(s
 * theta_j), sin(s theta_j) of an attention score.
 *
 * @category Theory
 */
export interface FitFigure {
  /** y(s), s = 0 .. L - 1 */
  targets: number[]
  /** Which solution the scores are of: the best conditioned solver, with the small ridge. */
  shown: Pick<FitSolution, 'solver' | 'ridge'>
  /** a(s), s = 0 .. 2L - 1 */
  scores: number[]
  /** The same score between whole positions: each s, and a(s). */
  between: {
    /** By eighths of a position. */
    s: number[]
    /** a(s) */
    scores: number[]
  }
  /** max |a(s) - a_lin(s)| over `between`. */
  deviation: number
  /** max |a(s)| over its fractional positions. */
  fractional: number
  /** max |a(s)| over its whole positions. */
  whole: number
  /** Largest over smallest singular value of the basis at s = 0 .. L - 1, as float64 resolves it: up to about 1e17. */
  condition: number
  /** Every solver with every ridge. */
  solutions: FitSolution[]
}

/** The paper fits with eps = 0 and remarks that ridge regression removes the blow-up. */
const RIDGES = [0, 1e-5, 1] as const
const SHOWN = { solver: 'qr', ridge: 1e-5 } as const

/** Places of the third panel: 25 .. 75 by eighths in the paper; in a small window its middle half. */
function panel(window: number): number[] {
  const [from, to] = window >= 100 ? [25, 75] : [Math.floor(window / 4), Math.floor((3 * window) / 4)]
  return Array.from({ length: (to - from) * 8 }, (_, i) => from + i / 8)
}

export type Tick = (done: number) => void

/** Computes Figure 2; `tick` hears how many of the 3L places are done. */
export function fitFigure(freqs: Float64Array, window: number, seed: number, tick: Tick): FitFigure {
  const pairs = freqs.length
  const targets = normals(window, seed)
  const row = new Float64Array(2 * pairs)
  const fill = (s: number): Float64Array => {
    for (let j = 0; j < pairs; j++) {
      const angle = s * freqs[j]!
      row[j] = Math.cos(angle)
      row[pairs + j] = Math.sin(angle)
    }
    return row
  }
  const qr = new LeastSquares(2 * pairs)
  const normal64 = new NormalEquations(2 * pairs, Float64Array)
  const normal32 = new NormalEquations(2 * pairs, Float32Array)
  for (let s = 0; s < window; s++) {
    fill(s)
    qr.add(row, targets[s]!)
    normal64.add(row, targets[s]!)
    normal32.add(Float32Array.from(row), targets[s]!)
    tick(s + 1)
  }
  const solvers = { qr, normal64, normal32 } as const
  const fits = Object.entries(solvers).flatMap(([name, solver]) =>
    RIDGES.map((ridge) => ({
      ...{ solver: name as FitSolution['solver'], ridge, weights: solver.solve(ridge) },
      ...{ squares: 0, inside: 0, outside: 0 },
    })),
  )
  const shown = fits.find(({ solver, ridge }) => solver === SHOWN.solver && ridge === SHOWN.ridge)!
  const scores = new Float64Array(2 * window)
  for (let s = 0; s < 2 * window; s++) {
    fill(s)
    for (const fit of fits) {
      const score = row.reduce((sum, value, k) => sum + value * fit.weights[k]!, 0)
      if (fit === shown) scores[s] = score
      if (s >= window) fit.outside = Math.max(fit.outside, Math.abs(score))
      else {
        fit.inside = Math.max(fit.inside, Math.abs(score))
        fit.squares += (score - targets[s]!) ** 2
      }
    }
    tick(window + s + 1)
  }
  // a(s) = sum_j w_j cos(s theta_j) + w_(d/2+j) sin(s theta_j), so h_j = w_j - i w_(d/2+j)
  const coefficients = (weights: Float64Array): Coefficients => ({
    re: weights.slice(0, pairs),
    im: weights.slice(pairs).map((value) => -value),
  })
  const h = coefficients(shown.weights)
  const places = panel(window)
  const values = places.map((s) => attentionScore(h, freqs, s))
  const largest = (wholes: boolean): number =>
    places.reduce((most, s, i) => (Number.isInteger(s) === wholes ? Math.max(most, Math.abs(values[i]!)) : most), 0)
  let deviation = 0
  places.forEach((s, i) => {
    const from = Math.floor(s)
    const [left, right] = [attentionScore(h, freqs, from), attentionScore(h, freqs, from + 1)]
    deviation = Math.max(deviation, Math.abs(values[i]! - (left + (s - from) * (right - left))))
  })
  const singular = qr.singularValues()
  return {
    targets: short(targets),
    shown: SHOWN,
    scores: short(scores),
    between: { s: places, scores: short(values) },
    ...{ deviation, fractional: largest(false), whole: largest(true) },
    condition: singular[0]! / singular.at(-1)!,
    solutions: fits.map(({ solver, ridge, weights, squares, inside, outside }) => ({
      ...{ solver, ridge, magnitude: magnitude(coefficients(weights)) },
      ...{ residual: Math.sqrt(squares / window), inside, outside },
    })),
  }
}

/**
 * Where B(s)/d lies over whole s in [0, to).
 *
 * @category Theory
 */
export interface SumRange {
  /** End of the range, which it leaves out. */
  to: number
  /** The least B(s)/d. */
  min: number
  /** The s of the least. */
  minAt: number
  /** The middle one. */
  median: number
  /** The largest. */
  max: number
  /** Share of s with B(s) < d. */
  below: number
  /** The first s with B(s) < d. */
  firstBelow: number | undefined
}

/**
 * Figure 5: B(s)/d of Eq. 8.
 *
 * @category Theory
 */
export interface SumFigure {
  /** B(s)/d, s = 0 .. max(2L, L') - 1 */
  values: number[]
  /** Over [0, 2L), which the paper plots. */
  plotted: SumRange
  /** Over [0, L'). */
  extended: SumRange
}

/** Computes Figure 5; `tick` hears how many places are done. */
export function sumFigure(freqs: Float64Array, window: number, context: number, tick: Tick): SumFigure {
  const headDim = 2 * freqs.length
  const values = Float64Array.from({ length: Math.max(2 * window, context) }, (_, s) => {
    tick(s + 1)
    return extrapolationSum(freqs, s) / headDim
  })
  const range = (to: number): SumRange => {
    const part = values.subarray(0, to)
    const sorted = part.slice().sort()
    const minAt = part.indexOf(sorted[0]!)
    const firstBelow = part.findIndex((value) => value < 1)
    return {
      ...{ to, min: sorted[0]!, minAt, max: sorted[to - 1]! },
      median: (sorted[(to - 1) >> 1]! + sorted[to >> 1]!) / 2,
      below: part.reduce((count, value) => count + (value < 1 ? 1 : 0), 0) / to,
      firstBelow: firstBelow < 0 ? undefined : firstBelow,
    }
  }
  return { values: short(values), plotted: range(2 * window), extended: range(context) }
}

/** Seven digits, so that a series is no larger than its plot needs. */
export const short = (values: Iterable<number>): number[] => Array.from(values, (value) => Number(value.toPrecision(7)))
