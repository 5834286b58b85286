/**
 * A bad file or a bad environment. Wrong arguments given to the API are TypeError or RangeError instead. The message
 * names the file, the field, the value, the rule and the remedy, for people; `code` is stable, for programs:
 *
 * | code | when |
 * |---|---|
 * | `ERR_NOT_FOUND`, `ERR_READ` | a file or folder is not there; it cannot be read |
 * | `ERR_NOT_A_FILE`, `ERR_NOT_A_FOLDER`, `ERR_PATH` | it is something else; it lies, by a link or its name, outside the model's folder |
 * | `ERR_TOO_LARGE`, `ERR_UTF8`, `ERR_JSON` | a text file is too large to be what it should be, not UTF-8, or not JSON |
 * | `ERR_CONFIG` | config.json is of another architecture, asks for what is not supported, or contradicts itself; an adapter's is of another base |
 * | `ERR_TENSORS`, `ERR_INDEX`, `ERR_SAFETENSORS`, `ERR_PICKLE` | tensors are missing, superfluous or of other dims; the shards' index is wrong; a file is damaged; only pickle files are there |
 * | `ERR_FILE_CHANGED` | weights that are used in place were modified, or their file was cut |
 * | `ERR_NOT_FINITE` | weights, logits, or too many steps' losses or gradients are NaN or infinite |
 * | `ERR_FILE_CHANGED` | a weight file that is used in place was modified |
 * | `ERR_TOKENIZER` | tokenizer.json is not usable, or belongs to another model |
 * | `ERR_FORMAT`, `ERR_BINARY`, `ERR_FIELD`, `ERR_EMPTY`, `ERR_PARQUET` | a file of documents: unknown format, no text, no such field, nothing in it, damaged |
 * | `ERR_NO_TEXT`, `ERR_TEXT_TOO_SHORT`, `ERR_DATA` | too little text for an evaluation, or for one training window |
 * | `ERR_CACHE` | tokenised data cannot be kept, or changed while they were read |
 * | `ERR_EXISTS`, `ERR_NO_SPACE`, `ERR_WRITE` | the target is already there; the disk or quota is full; another failure to write |
 * | `ERR_CHECKPOINT`, `ERR_RESUME` | no healthy checkpoint; one of a run with other options, model or data |
 * | `ERR_DEVICE_UNAVAILABLE`, `ERR_OUT_OF_MEMORY`, `ERR_DEVICE` | the device cannot be opened; it has too little memory; an operation failed on it |
 * | `ERR_NO_ADDON`, `ERR_BAD_ADDON`, `ERR_STALE_ADDON` | the native part is missing for this platform, damaged, or of another version |
 *
 * @category Devices and errors
 */
export class RopewalkError extends Error {
  /** What is wrong, as in the table above. */
  readonly code: string

  /** As Error's constructor, with a code before the message. */
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
