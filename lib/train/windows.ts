import { basename } from 'node:path'
import { RopewalkError } from '../errors.js'
import type { TokenFile } from '../files/tokens.js'

/** Parts of a file of tokens, each for one row of a batch; shorter ones than `context` are filled up. */
export interface Windows {
  file: TokenFile
  count: number
  /** The first token of a window, and how many there are. */
  place(window: number): { at: number; length: number }
}

/** The tokens as one stream, cut every `context` tokens; what is left over at the end is not used. */
export function streamWindows(file: TokenFile, context: number): Windows {
  return {
    file,
    count: Math.floor(file.tokens / context),
    place: (window) => ({ at: window * context, length: context }),
  }
}

/**
 * Whole examples: as many as follow each other and fit. `tooLong` lists those that are longer than a window; they are left
 * out.
 */
export function exampleWindows(file: TokenFile, context: number): Windows & { tooLong: number[] } {
  const starts: number[] = []
  const lengths: number[] = []
  const tooLong: number[] = []
  let open = false
  file.ends.forEach((end, document) => {
    const start = document === 0 ? 0 : file.ends[document - 1]!
    const length = end - start
    if (length > context) {
      tooLong.push(document)
      open = false
    } else if (open && lengths.at(-1)! + length <= context) lengths[lengths.length - 1]! += length
    else {
      starts.push(start)
      lengths.push(length)
      open = true
    }
  })
  const place = (window: number) => ({ at: starts[window]!, length: lengths[window]! })
  return { file, count: starts.length, place, tooLong }
}

/** The windows of data files. Throws RopewalkError ERR_DATA where there is none. */
export function windowsOf(
  file: TokenFile,
  paths: readonly string[],
  {
    context,
    examples,
    onWarning,
  }: { context: number; examples: boolean; onWarning?: ((message: string) => void) | undefined },
  option: string,
): Windows {
  if (!examples) {
    const windows = streamWindows(file, context)
    if (windows.count > 0) return windows
    throw new RopewalkError(
      'ERR_DATA',
      `${option}: a window of context ${context} takes ${context} tokens, but ${paths.join(', ')} ` +
        `${paths.length === 1 ? 'has' : 'have'} ${file.tokens}: use a smaller context or more data`,
    )
  }
  const windows = exampleWindows(file, context)
  const { tooLong, count } = windows
  if (tooLong.length > 0) {
    const [first] = tooLong as [number]
    const tokens = file.ends[first]! - (first === 0 ? 0 : file.ends[first - 1]!)
    const what =
      `${option}: ${tooLong.length} of ${file.ends.length} examples are longer than the context of ${context} tokens, the first ` +
      `is ${nameOf(file, first)} with ${tokens}`
    if (count === 0) throw new RopewalkError('ERR_DATA', `${what}: use a larger context or shorter examples`)
    onWarning?.(`${what}: they are left out`)
  }
  return windows
}

/** "books.jsonl, document 3" */
export function nameOf(file: TokenFile, document: number): string {
  let left = document
  const source = file.files.find(({ documents }) => {
    if (left < documents) return true
    left -= documents
    return false
  })
  return `${basename(source!.path)}, document ${left + 1}`
}

/** Index of the document that holds a token: the first whose end lies behind it. */
export function documentAt(ends: Float64Array, token: number): number {
  let low = 0
  for (let high = ends.length; low < high;) {
    const middle = (low + high) >>> 1
    if (ends[middle]! <= token) low = middle + 1
    else high = middle
  }
  return low
}
