/**
 * A bad file or a bad environment. Wrong arguments given to the API are TypeError or RangeError instead.
 * `code` is stable ('ERR_...'); the message names the file, the field, the value, the rule and the remedy.
 */
export class RopewalkError extends Error {
  readonly code: string

  constructor(code: string, message: string, options?: ErrorOptions) {
    super(message, options)
    this.name = 'RopewalkError'
    this.code = code
  }
}

/** A value as it should stand in a message: JSON spelling, on one line, at most `limit` characters. */
export function quote(value: unknown, limit = 80): string {
  if (value === undefined || typeof value === 'function' || typeof value === 'symbol') return String(value)
  if (typeof value === 'bigint' || typeof value === 'number') return String(value)
  // cut before the spelling, so that a 100 MB string costs nothing here
  const text = JSON.stringify(typeof value === 'string' ? value.slice(0, limit + 1) : value) ?? String(value)
  return text.length > limit ? `${text.slice(0, limit - 3)}...` : text
}

/** 1536 -> "1536 bytes (1.5 KiB)": exact, and readable. */
export function formatBytes(bytes: number): string {
  const units = ['KiB', 'MiB', 'GiB', 'TiB']
  let scaled = bytes
  let unit = ''
  for (const name of units) {
    if (scaled < 1024) break
    scaled /= 1024
    unit = name
  }
  return unit === '' ? `${bytes} bytes` : `${bytes} bytes (${scaled.toFixed(1)} ${unit})`
}

/** `; did you mean "x"?` for the nearest candidate, '' where none is near enough to be a slip of the hand. */
export function didYouMean(name: string, candidates: Iterable<string>): string {
  let best = ''
  let bestDistance = Math.max(1, Math.floor(name.length / 3)) + 1
  for (const candidate of candidates) {
    const distance = editDistance(name.toLowerCase(), candidate.toLowerCase(), bestDistance)
    if (distance < bestDistance) {
      best = candidate
      bestDistance = distance
    }
  }
  return best === '' ? '' : `; did you mean ${quote(best)}?`
}

/** Edits (insert, delete, replace, swap of neighbours) from a to b; stops counting at `limit`. */
function editDistance(a: string, b: string, limit: number): number {
  if (Math.abs(a.length - b.length) >= limit) return limit
  let before: number[] = []
  let previous = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    const current = [i]
    for (let j = 1; j <= b.length; j++) {
      const replaced = previous[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1)
      current[j] = Math.min(previous[j] + 1, current[j - 1] + 1, replaced)
      const swapped = i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]
      if (swapped) current[j] = Math.min(current[j], before[j - 2] + 1)
    }
    before = previous
    previous = current
  }
  return previous[b.length]
}
