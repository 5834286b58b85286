import { open, readdir, stat } from 'node:fs/promises'
import { extname, join, resolve } from 'node:path'
import { didYouMean, quote, RopewalkError } from '../errors.js'
import { readSmallFile } from './bytes.js'
import { readParquet } from './parquet.js'
import { decodeText, fieldError, readObjects, readRows, textField } from './rows.js'

/**
 * One text to train on or to measure; `source` is file, file:line or file#row. `prompt` is the beginning of the text that is
 * given and not to be learned, where documents are pairs of fields.
 */
export type TextDocument = { text: string; source: string; prompt?: string }

/**
 * Names of the fields that hold an example's two parts.
 *
 * @category Training
 */
export interface ExampleFields {
  /** What the model is given: its tokens are read, not learned. */
  prompt: string
  /** What it is to say next; the text is the prompt with the completion right behind it. */
  completion: string
}

const readers: Record<string, (path: string, field: string) => AsyncIterable<TextDocument>> = {
  '.txt': readText,
  '.jsonl': readLines,
  '.ndjson': readLines,
  '.parquet': readTable,
}
const known = Object.keys(readers).join(', ')

/** Texts that hold documents in a form that would be taken for one long document. */
const refused: Record<string, string | undefined> = {
  '.json': 'write one object a line and call it .jsonl (jq -c ".[]" in.json > out.jsonl)',
  '.csv': 'write one object a line and call it .jsonl',
  '.tsv': 'write one object a line and call it .jsonl',
}

/** V8 holds strings of up to 2^29 - 24 characters. */
const maxTextBytes = 500_000_000

/**
 * The documents of files and folders, in the order of `paths`; folders are read recursively, sorted by name, and only
 * their .txt, .jsonl, .ndjson and .parquet files. A .txt file, and any other text that is named itself, is one document; the others have one in `field` of every
 * line or row; with `fields`, a prompt and its completion, which only they can have. Throws RopewalkError (ERR_NOT_FOUND, ERR_EMPTY, ERR_FORMAT, ERR_FIELD, ERR_UTF8, ERR_JSON, ...).
 */
export async function* readDocuments(
  paths: readonly string[],
  { field = 'text', fields }: { field?: string; fields?: ExampleFields | undefined } = {},
): AsyncGenerator<TextDocument> {
  for (const file of await documentFiles(paths)) yield* fields ? readExamples(file, fields) : readFile(file, field)
}

/** The files that readDocuments reads for `paths`, in its order. Throws RangeError where one would be read twice. */
export async function documentFiles(paths: readonly string[]): Promise<string[]> {
  if (!Array.isArray(paths) || paths.length === 0)
    throw new TypeError(`paths: ${quote(paths)}, but a list of paths is expected`)
  const found: string[] = []
  for (const path of paths) {
    const info = await stat(path).catch((cause: NodeJS.ErrnoException) => {
      if (cause.code === 'ENOENT')
        throw new RopewalkError('ERR_NOT_FOUND', `${path}: does not exist: check the path`, { cause })
      throw new RopewalkError('ERR_READ', `${path}: cannot be read (${cause.message})`, { cause })
    })
    if (info.isDirectory()) {
      const files = await listFiles(path)
      if (files.length === 0) {
        throw new RopewalkError('ERR_EMPTY', `${path}: no document in this folder: files that end in ${known} are read`)
      }
      found.push(...files)
    } else if (info.isFile()) found.push(path)
    else throw new RopewalkError('ERR_NOT_A_FILE', `${path}: neither a regular file nor a folder`)
  }
  requireOnce(found)
  return found
}

/** Throws RangeError where a file is named twice: its documents would count twice. */
export function requireOnce(files: readonly string[]): void {
  const seen = new Set<string>()
  for (const file of files) {
    if (seen.has(resolve(file))) {
      throw new RangeError(
        `${file}: given twice, by itself or with its folder: its documents would count twice. Name it once`,
      )
    }
    seen.add(resolve(file))
  }
}

async function listFiles(dir: string): Promise<string[]> {
  const found: string[] = []
  const entries = await readdir(dir, { withFileTypes: true })
  entries.sort((a, b) => (a.name < b.name ? -1 : 1))
  for (const entry of entries) {
    const path = join(dir, entry.name)
    if (entry.isDirectory()) found.push(...(await listFiles(path)))
    else if (entry.isFile() && extname(entry.name).toLowerCase() in readers) found.push(path)
  }
  return found
}

async function* readFile(path: string, field: string): AsyncGenerator<TextDocument> {
  const extension = extname(path).toLowerCase()
  const slip = didYouMean(extension, Object.keys(readers))
  if (!Object.hasOwn(readers, extension) && (Object.hasOwn(refused, extension) || slip)) {
    const remedy = refused[extension] ?? `files that end in ${known} are read${slip}`
    throw new RopewalkError('ERR_FORMAT', `${path}: ${quote(extension)} is not a document format: ${remedy}`)
  }
  const { size } = await stat(path)
  if (size === 0) throw new RopewalkError('ERR_EMPTY', `${path}: the file is empty: remove it, or write it again`)
  // Whatever else is named and holds text (README.md, LICENSE) is one document; what holds none is refused as binary.
  const read = Object.hasOwn(readers, extension) ? readers[extension] : readText
  yield* read(path, field)
}

async function* readExamples(path: string, fields: ExampleFields): AsyncGenerator<TextDocument> {
  let found = false
  for await (const row of readRows(path, [fields.prompt, fields.completion])) {
    const prompt = textField(row, fields.prompt)
    const completion = textField(row, fields.completion)
    if (completion === '') throw fieldError(row.source, fields.completion, completion, 'a text to learn')
    yield { text: prompt + completion, prompt, source: row.source }
    found = true
  }
  if (!found)
    throw new RopewalkError('ERR_EMPTY', `${path}: no line or row with an example: remove it, or write it again`)
}

async function* readText(path: string): AsyncGenerator<TextDocument> {
  yield { text: decodeText(await readSmallFile(path, maxTextBytes), path), source: path }
}

async function* readLines(path: string, field: string): AsyncGenerator<TextDocument> {
  let found = 0
  for await (const row of readObjects(path)) {
    yield { text: textField(row, field), source: row.source }
    found++
  }
  if (found === 0)
    throw new RopewalkError('ERR_EMPTY', `${path}: no line with a document: remove it, or write it again`)
}

async function* readTable(path: string, field: string): AsyncGenerator<TextDocument> {
  const handle = await open(path, 'r')
  try {
    let row = 0
    for await (const value of readParquet(handle, path, field)) {
      const source = `${path}#${row++}`
      if (value === null) throw fieldError(source, field, value, 'a string')
      yield { text: decodeText(value, source), source }
    }
    if (row === 0) throw new RopewalkError('ERR_EMPTY', `${path}: no row: remove it, or write it again`)
  } finally {
    await handle.close()
  }
}
