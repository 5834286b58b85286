/** The complex coefficients h_j of an attention score, d/2 of them. */
export interface Coefficients {
  re: Float64Array
  im: Float64Array
}

/** RoPE's frequencies theta_j = c^(-2j/d), j = 0 .. d/2 - 1 (arXiv 2104.09864; section 2.1 of arXiv 2306.15595). */
export const frequencies = (headDim: number, theta: number): Float64Array =>
  Float64Array.from({ length: headDim / 2 }, (_, j) => theta ** ((-2 * j) / headDim))

/**
 * The attention score of a query and a key at distance s before scaling and softmax, as arXiv 2306.15595 writes it:
 * a(s) = Re sum_j h_j e^(i s theta_j), h_j = (q_2j + i q_2j+1)(k_2j - i k_2j+1). s need not be whole.
 */
export function attentionScore({ re, im }: Coefficients, freqs: Float64Array, s: number): number {
  let sum = 0
  for (let j = 0; j < freqs.length; j++) {
    const angle = s * freqs[j]!
    sum += re[j]! * Math.cos(angle) - im[j]! * Math.sin(angle)
  }
  return sum
}

/** h_j of a query and a key whose pairs are (2j, 2j+1). */
export function coefficientsOf(q: ArrayLike<number>, k: ArrayLike<number>): Coefficients {
  const pairs = q.length / 2
  const [re, im] = [new Float64Array(pairs), new Float64Array(pairs)]
  for (let j = 0; j < pairs; j++) {
    const [qr, qi, kr, ki] = [q[2 * j]!, q[2 * j + 1]!, k[2 * j]!, k[2 * j + 1]!]
    re[j] = qr * kr + qi * ki
    im[j] = qi * kr - qr * ki
  }
  return { re, im }
}

/** max_j |h_j| */
export const magnitude = ({ re, im }: Coefficients): number =>
  re.reduce((most, value, j) => Math.max(most, Math.hypot(value, im[j]!)), 0)

/** max_j |h_j - h_(j+1)| with h_(d/2) = 0, the factor of Eq. 8. */
export function variation({ re, im }: Coefficients): number {
  let most = 0
  for (let j = 0; j < re.length; j++) {
    most = Math.max(most, Math.hypot(re[j]! - (re[j + 1] ?? 0), im[j]! - (im[j + 1] ?? 0)))
  }
  return most
}

/** |a(s) - a_lin(s)| at s = from + part, a_lin the straight line through a(from) and a(from + 1). */
export function interpolationError(h: Coefficients, freqs: Float64Array, from: number, part: number): number {
  const [left, right] = [attentionScore(h, freqs, from), attentionScore(h, freqs, from + 1)]
  return Math.abs(attentionScore(h, freqs, from + part) - (left + part * (right - left)))
}
