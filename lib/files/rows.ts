import { createReadStream } from 'node:fs'
import { open } from 'node:fs/promises'
import { extname } from 'node:path'
import { didYouMean, formatBytes, quote, RopewalkError } from '../errors.js'
import { decodeUtf8 } from './bytes.js'
import { isObject, type JsonObject, type JsonValue, parseJson } from './json.js'
import { parquetColumns, readParquetValues } from './parquet.js'

/** A line of a .jsonl file or a row of a .parquet file. */
export interface Row {
  /** file:line or file#row */
  source: string
  /** Of a parquet file, the columns that were asked for and are there. */
  fields: JsonObject
  /** All names that the file has here, for messages. */
  names: readonly string[]
}

const maxLineBytes = 256 << 20

/**
 * The rows of a .jsonl, .ndjson or .parquet file; of a parquet file those of `columns` that are there, which must hold
 * texts, whole numbers or booleans. Throws RopewalkError (ERR_FORMAT, ERR_FIELD, ERR_UTF8, ERR_JSON, ERR_PARQUET, ...).
 */
export async function* readRows(path: string, columns: readonly string[]): AsyncGenerator<Row> {
  const extension = extname(path).toLowerCase()
  if (extension === '.parquet') yield* readTable(path, columns)
  else if (extension === '.jsonl' || extension === '.ndjson') yield* readObjects(path)
  else {
    throw new RopewalkError(
      'ERR_FORMAT',
      `${path}: ${quote(extension)} has no fields: .jsonl, .ndjson and .parquet are read`,
    )
  }
}

/** The objects of a JSON Lines file; empty lines are left out. */
export async function* readObjects(path: string): AsyncGenerator<Row> {
  let line = 0
  for await (const bytes of splitLines(path)) {
    line++
    const source = `${path}:${line}`
    const text = decodeText(bytes, source)
    if (text.trim() === '') continue
    // Python writes NaN and huge integers into lines, too; they are not what is read here
    const fields = parseJson(text, source, { python: true })
    if (!isObject(fields))
      throw new RopewalkError('ERR_FORMAT', `${source}: ${quote(fields)}, but a line must be an object {...}`)
    yield { source, fields, names: Object.keys(fields) }
  }
}

async function* readTable(path: string, columns: readonly string[]): AsyncGenerator<Row> {
  const handle = await open(path, 'r')
  try {
    const names = [...(await parquetColumns(handle, path)).keys()]
    const there = columns.filter((name) => names.includes(name))
    const values = there.map((name) => readParquetValues(handle, path, name))
    for (let row = 0; there.length > 0; row++) {
      const source = `${path}#${row}`
      const cells = await Promise.all(values.map((column) => column.next()))
      if (cells.some(({ done }) => done)) break
      const fields = cells.map(({ value }) => (value instanceof Uint8Array ? decodeText(value, source) : value))
      yield { source, fields: Object.fromEntries(there.map((name, i) => [name, fields[i] as JsonValue])), names }
    }
  } finally {
    await handle.close()
  }
}

/** The value of a field. Throws ERR_FIELD where there is none, naming those that are there. */
export function fieldOf({ fields, names, source }: Row, field: string): JsonValue {
  if (Object.hasOwn(fields, field)) return fields[field]!
  throw new RopewalkError(
    'ERR_FIELD',
    `${source}: no field ${quote(field)}; there are ${names.map((name) => quote(name)).join(', ') || 'none'}` +
      didYouMean(field, names),
  )
}

/** A field that is a string. Throws ERR_FIELD. */
export function textField(row: Row, field: string): string {
  const value = fieldOf(row, field)
  if (typeof value === 'string') return value
  throw fieldError(row.source, field, value, 'a string')
}

/** A field's value is not what it must be. */
export function fieldError(source: string, field: string, value: unknown, rule: string): RopewalkError {
  return new RopewalkError('ERR_FIELD', `${source}: ${quote(field)} is ${quote(value)}, but it must be ${rule}`)
}

/** The lines of a file as bytes, so that a character is never cut between two reads. */
async function* splitLines(path: string): AsyncGenerator<Uint8Array> {
  let rest: Buffer[] = []
  let length = 0
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 }) as AsyncIterable<Buffer>) {
    let from = 0
    for (let end = chunk.indexOf(10); end >= 0; end = chunk.indexOf(10, from)) {
      yield Buffer.concat([...rest, chunk.subarray(from, end)])
      rest = []
      length = 0
      from = end + 1
    }
    rest.push(chunk.subarray(from))
    length += chunk.length - from
    if (length > maxLineBytes) {
      throw new RopewalkError(
        'ERR_TOO_LARGE',
        `${path}: a line of more than ${formatBytes(maxLineBytes)}: is it JSON Lines?`,
      )
    }
  }
  if (length > 0) yield Buffer.concat(rest)
}

/** UTF-8 without a byte order mark; `source` names it in messages. */
export function decodeText(bytes: Uint8Array, source: string): string {
  const nul = bytes.indexOf(0)
  if (nul >= 0) {
    throw new RopewalkError(
      'ERR_BINARY',
      `${source}: a NUL byte at offset ${nul}: binary data, or UTF-16; convert it to UTF-8`,
    )
  }
  const text = decodeUtf8(bytes, source)
  return text.startsWith('\ufeff') ? text.slice(1) : text
}
