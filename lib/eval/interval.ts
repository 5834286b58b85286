/**
 * The 95 % interval of a share (Wilson, 1927), in [0, 1]. `share` may also be the mean of scores between 0 and 1: they
 * vary no more than hits and misses of the same mean do, so that the interval is then rather too wide.
 */
export function wilson(share: number, trials: number): [number, number] {
  const z = 1.959963984540054
  const scale = 1 + (z * z) / trials
  const middle = (share + (z * z) / (2 * trials)) / scale
  const half = (z / scale) * Math.sqrt((share * (1 - share)) / trials + (z * z) / (4 * trials * trials))
  return [Math.max(0, middle - half), Math.min(1, middle + half)]
}
