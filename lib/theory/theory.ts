import { quote } from '../errors.js'
import * as bounds from './bounds.js'
import { type FitFigure, fitFigure, short, type SumFigure, sumFigure } from './figures.js'
import { uniform } from './random.js'
import { type Coefficients, frequencies, interpolationError } from './score.js'
import { type Statement, statements } from './statements.js'

/**
 * Options of {@link theory}; the defaults are the paper's LLaMA.
 *
 * @category Theory
 */
export interface TheoryOptions {
  /** d, the dimension of an attention head: even, from 2 to 1024. Default 128. */
  headDim?: number
  /** c, the base of the frequencies, above 1. Default 10000. */
  theta?: number
  /** L, the trained window in tokens: from d, as the fit needs, to 1,048,576. Default 2048. */
  window?: number
  /** L', the extended window: above L, at most 16,777,216. Default 16 L. */
  context?: number
  /** Of the random targets and coefficients; the same seed gives the same numbers. Default 0. */
  seed?: number
  /** Called now and then with the share of the work that is done. */
  onProgress?: (part: number) => void
}

/**
 * Theorem 2.1: |a(s) - a_lin(s)| / max|h_j| between two neighbouring positions, a_lin the straight line through both.
 *
 * @category Theory
 */
export interface InterpolationBounds {
  /** The published d / (32 ln c), in the middle; no bound. */
  published: number
  /** 1 / (8 (1 - c^(-4/d))), in the middle. */
  corrected: number
  /** What h_j = e^(-i theta_j / 2) reaches in the middle of 0 and 1, and no |h_j| <= 1 exceeds. */
  worst: number
  /** What random coefficients reached of the corrected bound, at random places. */
  random: {
    /** Share of the bound. */
    most: number
    /** How many were tried. */
    tries: number
  }
  /** By place between two positions, 0 to 1. */
  curve: {
    /** The place. */
    part: number[]
    /** The published constant's parabola. */
    published: number[]
    /** The corrected bound. */
    corrected: number[]
    /** The most that any |h_j| <= 1 has there. */
    worst: number[]
  }
}

/**
 * How many times larger the extrapolated side is than the interpolated one, per max|h_j|.
 *
 * @category Theory
 */
export interface BoundRatios {
  /** 64 ln c: Eq. 8 with B = d over the published constant. The paper's "about 600". */
  published: number
  /** Eq. 8 with B = d over the corrected bound. */
  corrected: number
  /** Eq. 8 at the least B(s) of [0, 2L) over the corrected bound. */
  plotted: number
  /** Eq. 8 at the least B(s) of [0, L') over the corrected bound. */
  extended: number
  /** The largest |a(s)|, which is d/2, over the largest interpolation error: values that are reached. */
  attained: number
}

/**
 * What {@link theory} gives: every series and every statement, computed.
 *
 * @category Theory
 */
export interface Theory {
  /** d, as in the options. */
  headDim: number
  /** c */
  theta: number
  /** L */
  window: number
  /** L' */
  context: number
  /** As in the options. */
  seed: number
  /** Theorem 2.1. */
  interpolation: InterpolationBounds
  /** The comparison of the two bounds. */
  ratios: BoundRatios
  /** Figure 2. */
  fit: FitFigure
  /** Figure 5. */
  sums: SumFigure
  /**
   * By factor of interpolation: the most that the score can change between distance 0 and 1 .. 8, for |h_j| <= 1.
   */
  resolution: {
    /** 1 .. 8 */
    distances: number[]
    /** 1, 2, 4, 8, 16 and L'/L, each once. */
    factors: {
      /** What positions are divided by. */
      factor: number
      /** By distance. */
      changes: number[]
    }[]
  }
  /** The paper's claims and what these numbers say of them. */
  statements: Statement[]
}

const TRIES = 500

/**
 * The mathematics of arXiv 2306.15595 (Theorem 2.1, Eq. 8, Figures 2 and 5) recomputed for any head: it needs no model
 * and no device, and runs on the calling thread (d = 128, L = 2048: a second; it grows with L d^2). TypeError or
 * RangeError for options out of range.
 *
 * @category Theory
 */
export function theory(options: TheoryOptions = {}): Theory {
  const { headDim, theta, window, context, seed, onProgress } = check(options)
  const freqs = frequencies(headDim, theta)
  const total = 3 * window + Math.max(2 * window, context)
  // The event loop does not turn meanwhile: a listener is told seldom, and writes at once.
  const step = Math.max(1, Math.floor(total / 100))
  const tick =
    (before: number) =>
    (done: number): void => {
      if ((before + done) % step === 0) onProgress?.((before + done) / total)
    }
  const fit = fitFigure(freqs, window, seed, tick(0))
  const sums = sumFigure(freqs, window, context, tick(3 * window))
  const interpolation = interpolationBounds(freqs, theta, window, seed)
  const ratio = (sum: number): number => (2 * sum * headDim) / interpolation.corrected
  const computed = {
    ...{ headDim, theta, window, context, seed, interpolation, fit, sums },
    ratios: {
      published: (2 * headDim) / interpolation.published,
      corrected: ratio(1),
      plotted: ratio(sums.plotted.min),
      extended: ratio(sums.extended.min),
      attained: bounds.worstScore(headDim) / interpolation.worst,
    },
    resolution: resolution(freqs, context / window),
  }
  if (total % step !== 0) onProgress?.(1)
  return { ...computed, statements: statements(computed) }
}

function interpolationBounds(freqs: Float64Array, theta: number, window: number, seed: number): InterpolationBounds {
  const headDim = 2 * freqs.length
  const part = Array.from({ length: 65 }, (_, i) => i / 64)
  const published = bounds.publishedInterpolationBound(headDim, theta)
  return {
    published,
    corrected: bounds.interpolationBound(headDim, theta),
    worst: bounds.worstInterpolation(freqs),
    random: { most: randomErrors(freqs, theta, window, seed), tries: TRIES },
    curve: {
      part,
      published: short(part.map((x) => 4 * x * (1 - x) * published)),
      corrected: short(part.map((x) => bounds.interpolationBound(headDim, theta, x))),
      worst: short(part.map((x) => bounds.worstInterpolation(freqs, x))),
    },
  }
}

/** The largest share of the corrected bound that coefficients of length 1 and random directions reach. */
function randomErrors(freqs: Float64Array, theta: number, window: number, seed: number): number {
  const random = uniform(seed)
  const headDim = 2 * freqs.length
  let most = 0
  for (let i = 0; i < TRIES; i++) {
    const angles = Float64Array.from(freqs, () => 2 * Math.PI * random())
    const h: Coefficients = { re: angles.map(Math.cos), im: angles.map(Math.sin) }
    const [from, place] = [Math.floor(random() * window), 0.01 + 0.98 * random()]
    const error = interpolationError(h, freqs, from, place)
    most = Math.max(most, error / bounds.interpolationBound(headDim, theta, place))
  }
  return most
}

function resolution(freqs: Float64Array, factor: number): Theory['resolution'] {
  const distances = [1, 2, 3, 4, 5, 6, 7, 8]
  const factors = [...new Set([1, 2, 4, 8, 16, factor])].sort((a, b) => a - b)
  return {
    distances,
    factors: factors.map((factor) => ({
      factor,
      changes: short(distances.map((s) => bounds.separation(freqs, s, factor))),
    })),
  }
}

function check(options: TheoryOptions): Required<Omit<TheoryOptions, 'onProgress'>> & TheoryOptions {
  const known = ['headDim', 'theta', 'window', 'context', 'seed', 'onProgress']
  const unknown = Object.keys(options).find((name) => !known.includes(name))
  if (unknown !== undefined) throw new TypeError(`${unknown}: no such option; there are ${known.join(', ')}`)
  const { headDim = 128, theta = 10000, window = 2048, context = 16 * window, seed = 0, onProgress } = options
  const count = (name: string, value: unknown, least: number, most: number): void => {
    if (typeof value !== 'number') throw new TypeError(`${name}: ${quote(value)}, but it must be a number`)
    if (!Number.isInteger(value) || value < least || value > most) {
      throw new RangeError(`${name}: ${value}, but it must be a whole number from ${least} to ${most}`)
    }
  }
  count('headDim', headDim, 2, 1024)
  if (headDim % 2 !== 0) throw new RangeError(`headDim: ${headDim}, but rotary pairs need an even head dimension`)
  if (typeof theta !== 'number') throw new TypeError(`theta: ${quote(theta)}, but it must be a number`)
  if (!(theta > 1) || !Number.isFinite(theta))
    throw new RangeError(`theta: ${theta}, but it must be finite and above 1`)
  count('window', window, headDim, 1 << 20)
  count('context', context, window + 1, 1 << 24)
  count('seed', seed, 0, Number.MAX_SAFE_INTEGER)
  return { headDim, theta, window, context, seed, ...(onProgress && { onProgress }) }
}
