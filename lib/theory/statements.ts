import type { Theory } from './theory.js'

/**
 * A claim of the paper, or one about it, held against what was computed.
 *
 * @category Theory
 */
export interface Statement {
  /** Short and stable, for programs. */
  id: string
  /** In words. */
  claim: string
  /** Whether the figures bear it out. */
  holds: boolean
  /** The figures it rests on. */
  figures: string
}

/** The blow-up beyond the window is called one from this ratio of the largest scores outside and inside. */
const BLOW_UP = 10
/** Growth below this is no blow-up: the fit's own scatter. */
const LEFT = 5

/** Four digits; very large and very small ones with an exponent. */
export function format(value: number): string {
  const size = Math.abs(value)
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(1).replace('e+', 'e')
  return String(Number(value.toPrecision(4)))
}

const percent = (share: number): string => `${format(100 * share)} %`

/** Every claim with its verdict; the words are fixed, the numbers and verdicts are computed. */
export function statements(theory: Omit<Theory, 'statements'>): Statement[] {
  const { headDim: d, window, context, interpolation, ratios, fit, sums, resolution } = theory
  const { published, corrected, worst, random } = interpolation
  const { plotted, extended } = sums
  const ratioOf = (solver: string, ridge: number): number => {
    const found = fit.solutions.find((entry) => entry.solver === solver && entry.ridge === ridge)!
    return found.outside / found.inside
  }
  const shown = fit.solutions.find((entry) => entry.solver === fit.shown.solver && entry.ridge === fit.shown.ridge)!
  const unregularised = ['qr', 'normal64', 'normal32'].map((solver) => ratioOf(solver, 0))
  const last = resolution.factors.find(({ factor }) => factor === context / window)!
  const kept = last.changes[0]! / resolution.factors[0]!.changes[0]!
  const sumText = ({ min, minAt, below, firstBelow }: typeof plotted): string =>
    `least B(s)/d ${format(min)} at s = ${minAt}` +
    (firstBelow === undefined ? '' : `; below 1 at ${percent(below)} of s, first at s = ${firstBelow}`)
  return [
    {
      id: 'theorem-published',
      claim: 'Theorem 2.1 as published: between two positions, |a(s) - a_lin(s)| is at most max|h| d / (32 ln c)',
      holds: worst <= published,
      figures:
        `h_j = exp(-i theta_j / 2) has max|h| = 1 and reaches ${format(worst)} in the middle of positions 0 and 1; ` +
        `d / (32 ln c) is ${format(published)}. The proof uses c^x <= 1 + x ln c (Eq. 14), and c^x is convex`,
    },
    {
      id: 'theorem-corrected',
      claim:
        'With the sum over theta_j^2 exact: |a(s) - a_lin(s)| is at most max|h| (s - s1)(s2 - s) / (2 (1 - c^(-4/d)))',
      holds: worst <= corrected && random.most <= 1,
      figures:
        `${format(corrected)} max|h| in the middle; the example above reaches ${percent(worst / corrected)} of it, ` +
        `${random.tries} random h at random places at most ${percent(random.most)}`,
    },
    {
      id: 'ratio-bounds',
      claim: `The bound on interpolated scores is at least 64 ln c = ${format(ratios.published)} times smaller than that on extrapolated ones`,
      holds: ratios.plotted >= ratios.published,
      figures:
        `with the corrected bound ${format(ratios.corrected)} times where B(s) = d, ${format(ratios.plotted)} at the least ` +
        `B(s) up to ${plotted.to}, ${format(ratios.extended)} at the least up to ${extended.to}`,
    },
    {
      id: 'ratio-attained',
      claim: 'The largest values differ as much as the bounds do',
      holds: ratios.attained >= ratios.corrected,
      figures:
        `|a(s)| reaches ${format(d / 2)} max|h| at any s, inside the window and outside; the interpolation error reaches ` +
        `${format(worst)} max|h|: ${format(ratios.attained)} times less`,
    },
    {
      id: 'extrapolation-bound',
      claim:
        'Eq. 8, |a(s)| <= 2 max|h| B(s), says more than the triangle inequality, |a(s)| <= max|h| d / 2, somewhere',
      holds: 2 * extended.min * d < d / 2,
      figures: `2 B(s) is at least ${format(2 * extended.min * d)} for s below ${extended.to}, d / 2 is ${format(d / 2)}`,
    },
    {
      id: 'sums-plotted',
      claim: `B(s) >= d for s up to twice the window, ${plotted.to} (Figure 5)`,
      holds: plotted.firstBelow === undefined,
      figures: `${sumText(plotted)}; at s = 0 ${format(sums.values[0]!)}, at s = 1 ${format(sums.values[1]!)}, median ${format(plotted.median)}`,
    },
    {
      id: 'sums-extended',
      claim: `B(s) >= d for s up to the extended window, ${extended.to}`,
      holds: extended.firstBelow === undefined,
      figures: sumText(extended),
    },
    {
      id: 'fit-extrapolates',
      claim: `A score that fits random targets in the window grows far beyond it (Figure 2; here ${BLOW_UP} times or more)`,
      holds: shown.outside >= BLOW_UP * shown.inside,
      figures:
        `largest |a(s)| ${format(shown.inside)} for s below ${window}, ${format(shown.outside)} from there to ` +
        `${2 * window}: ${format(shown.outside / shown.inside)} times (ridge ${fit.shown.ridge})`,
    },
    {
      id: 'fit-interpolates',
      claim: 'The same score between whole positions stays within twice what it is at them (Figure 2)',
      holds: fit.fractional <= 2 * fit.whole,
      figures:
        `largest |a(s)| ${format(fit.whole)} at whole s, ${format(fit.fractional)} between; largest distance from the straight ` +
        `line ${format(fit.deviation)}, where the corrected bound allows ${format(corrected * shown.magnitude)}: max|h| is ${format(shown.magnitude)}`,
    },
    {
      id: 'fit-height',
      claim: 'How high it grows without a ridge is a property of the fit, not of the solver',
      holds: Math.max(...unregularised) <= 2 * Math.min(...unregularised),
      figures:
        `outside over inside: ${format(unregularised[0]!)} by QR in float64, ${format(unregularised[1]!)} by the normal ` +
        `equations in float64, ${format(unregularised[2]!)} in float32; the basis has a condition number of ` +
        `${format(fit.condition)}, and float64 resolves about 1e16`,
    },
    {
      id: 'fit-ridge',
      claim: `Ridge regression with eps = 1 removes most of the growth (here: leaves less than ${LEFT} times)`,
      holds: ratioOf('qr', 1) < LEFT,
      figures: `outside over inside: ${format(ratioOf('qr', 1e-5))} with eps = 1e-5, ${format(ratioOf('qr', 1))} with eps = 1`,
    },
    {
      id: 'resolution',
      claim: `Stretched to ${context}, neighbours can be told apart about as well as before (here: to 90 %)`,
      holds: kept >= 0.9,
      figures:
        `the most that a score can change from distance 0 to 1 is ${format(last.changes[0]!)} max|h| with positions divided ` +
        `by ${format(context / window)}, ${format(resolution.factors[0]!.changes[0]!)} without: ${percent(kept)}`,
    },
  ]
}
