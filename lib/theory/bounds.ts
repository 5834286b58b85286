/**
 * What Theorem 2.1 of arXiv 2306.15595 states for |a(s) - a_lin(s)| / max|h_j| in the middle between two neighbouring
 * positions: d / (32 ln c). It is no bound. Its proof needs sum_j theta_j^2 <= d / (4 ln c), and gets it from
 * c^x <= 1 + x ln c (Eq. 14); c^x is convex, so it lies above that tangent. {@link worstInterpolation} is what is attained.
 */
export const publishedInterpolationBound = (headDim: number, theta: number): number => headDim / (32 * Math.log(theta))

/**
 * The bound that the same proof gives without that step, for |a(s) - a_lin(s)| / max|h_j| at s = s1 + part between two
 * positions s1 and s1 + 1.
 *
 * The error of a straight line between s1 and s2 is at most max|a''| (s - s1)(s2 - s) / 2. Every term of a'' turns with
 * its theta_j: |a''(s)| = |Re sum_j -theta_j^2 h_j e^(i s theta_j)| <= max|h_j| sum_j theta_j^2. With theta_j = c^(-2j/d)
 * the sum is geometric, (1 - c^-2) / (1 - c^(-4/d)), so
 *
 *   |a(s) - a_lin(s)| <= max|h_j| (s - s1)(s2 - s) / (2 (1 - c^(-4/d)))
 *
 * (the factor 1 - c^-2 is left at 1). For d = 128, c = 10000, in the middle: 0.49979 max|h_j|.
 */
export const interpolationBound = (headDim: number, theta: number, part = 0.5): number =>
  (part * (1 - part)) / (2 * (1 - theta ** (-4 / headDim)))

/**
 * The largest |a(s) - a_lin(s)| that coefficients of |h_j| <= 1 can have at s = s1 + part: term by term
 * sum_j |e^(i part theta_j) - (1 - part) - part e^(i theta_j)|, reached where each h_j turns its term onto the real
 * axis. In the middle that is sum_j (1 - cos(theta_j / 2)), and with s1 = 0, h_j = e^(-i theta_j / 2) reaches it.
 */
export function worstInterpolation(freqs: Float64Array, part = 0.5): number {
  let sum = 0
  for (const freq of freqs) {
    const re = Math.cos(part * freq) - (1 - part) - part * Math.cos(freq)
    const im = Math.sin(part * freq) - part * Math.sin(freq)
    sum += Math.hypot(re, im)
  }
  return sum
}

/**
 * B(s) = sum_{k=0}^{d/2-1} |A_(k+1)(s)|, A_k(s) = sum_{j<k} e^(i s theta_j): summation by parts turns a(s) into
 * Re sum_k A_(k+1)(s) (h_k - h_(k+1)) with h_(d/2) = 0, hence |a(s)| <= max|h_k - h_(k+1)| B(s) <= 2 max|h_j| B(s)
 * (Eq. 8 of arXiv 2306.15595, its bound for extrapolated scores). B(0) = (d/2)(d/2 + 1) / 2.
 */
export function extrapolationSum(freqs: Float64Array, s: number): number {
  let [re, im, sum] = [0, 0, 0]
  for (const freq of freqs) {
    const angle = s * freq
    re += Math.cos(angle)
    im += Math.sin(angle)
    sum += Math.sqrt(re * re + im * im)
  }
  return sum
}

/**
 * The largest |a(s)| / max|h_j| at any s: d/2, one for each pair, by the triangle inequality, and reached by
 * h_j = e^(-i s theta_j). Eq. 8 is above it wherever B(s) > d/4.
 */
export const worstScore = (headDim: number): number => headDim / 2

/**
 * How much the score can change, at most, between distance 0 and distance s when |h_j| <= 1, with positions divided by
 * `factor`: sum_j |e^(i s theta_j / factor) - 1| = sum_j 2 |sin(s theta_j / (2 factor))|. For small s it falls as
 * 1 / factor: what Position Interpolation costs in telling near neighbours apart.
 */
export const separation = (freqs: Float64Array, s: number, factor = 1): number =>
  freqs.reduce((sum, freq) => sum + 2 * Math.abs(Math.sin((s * freq) / (2 * factor))), 0)
