import type { FileHandle } from 'node:fs/promises'
import { brotliDecompressSync, gunzipSync } from 'node:zlib'
import { decompressLz4, decompressLz4Raw, decompressSnappy, decompressZstd } from 'hyparquet-compressors'
import { didYouMean, quote, RopewalkError } from '../errors.js'
import { deltaLengthValues, fixedValues, hybrid, plainValues } from './parquet-values.js'
import { ThriftReader, type ThriftStruct, type ThriftValue } from './thrift.js'

/**
 * One column of a parquet file, value by value. Readers that allocate what headers and run lengths claim can be
 * asked for gigabytes by 300 bytes; here every count is held against the bytes it can come from. Decompression is that
 * of Node and hyparquet-compressors, into buffers of checked size.
 * Format: parquet.thrift and Encodings.md of apache/parquet-format.
 */

const maxFooterBytes = 64 << 20
const maxPageBytes = 1 << 30
/** No codec makes more of a byte, but for a text that repeats without end. */
const maxExpansion = 20_000
/** Runs hold many values in few bytes (a column of nulls), but not without limit. */
const maxValuesPerByte = 1 << 16

/** Physical types that are read, and the bytes of a value where all have the same. */
const TEXT = 6
const widths: Record<number, number> = { 0: 1 / 8, 1: 4, 2: 8 }

type Column = { type: number; optional: boolean; codec: number; values: number; start: number; bytes: number }
type Page = { count: number; encoding: number; levels: Uint8Array | undefined; data: Uint8Array }

const inflate: Record<number, (data: Uint8Array, size: number) => Uint8Array> = {
  0: (data) => data,
  1: decompressSnappy,
  2: (data, size) => gunzipSync(data, { maxOutputLength: Math.max(size, 1) }),
  4: (data, size) => brotliDecompressSync(data, { maxOutputLength: Math.max(size, 1) }),
  5: decompressLz4,
  6: (data, size) => decompressZstd(data, new Uint8Array(size)),
  7: decompressLz4Raw,
}

/** The values of text column `field`: UTF-8 bytes, or null. Throws RopewalkError ERR_PARQUET or ERR_FIELD. */
export function readParquet(handle: FileHandle, path: string, field: string): AsyncGenerator<Uint8Array | null> {
  return readColumns(handle, path, field, [TEXT])
}

/** A value of a column: UTF-8 bytes of a text, or what stands there. */
export type ParquetValue = Uint8Array | number | boolean | null

/** The values of a column of texts, whole numbers or booleans. Throws RopewalkError ERR_PARQUET or ERR_FIELD. */
export async function* readParquetValues(
  handle: FileHandle,
  path: string,
  field: string,
): AsyncGenerator<ParquetValue> {
  const type = (await parquetColumns(handle, path)).get(field)?.get(1)
  const convert = conversions[Number(type)]
  for await (const value of readColumns(handle, path, field, [TEXT, ...Object.keys(widths).map(Number)])) {
    yield value === null || convert === undefined ? value : await guard(path, quote(field), () => convert(value))
  }
}

const conversions: Record<number, (value: Uint8Array) => number | boolean> = {
  0: ([bit]) => bit === 1,
  1: (value) => Buffer.from(value).readInt32LE(0),
  2: (value) => {
    const whole = Buffer.from(value).readBigInt64LE(0)
    if (!Number.isSafeInteger(Number(whole))) throw new RangeError(`${whole} is more than a number holds exactly`)
    return Number(whole)
  },
}

/** The columns directly below the root, with their schema elements. Throws RopewalkError ERR_PARQUET. */
export async function parquetColumns(handle: FileHandle, path: string): Promise<Map<string, ThriftStruct>> {
  const { size } = await handle.stat()
  const footer = await guard(path, 'footer', () => readFooter(handle, size))
  return guard(path, 'schema', () => topColumns(footer))
}

async function* readColumns(
  handle: FileHandle,
  path: string,
  field: string,
  types: readonly number[],
): AsyncGenerator<Uint8Array | null> {
  const { size } = await handle.stat()
  const footer = await guard(path, 'footer', () => readFooter(handle, size))
  const found = await guard(path, 'schema', () => findColumn(topColumns(footer), path, field, types))
  const groups = await guard(path, 'footer', () => structs(footer.get(4), 'row groups'))
  for (const [index, group] of groups.entries()) {
    const what = `row group ${index}, column ${quote(field)}`
    const column = await guard(path, what, () => readColumn(group, field, found, size))
    const chunk = await guard(path, what, () => readBytes(handle, column.start, column.bytes))
    const decoder = new ColumnDecoder(chunk, column)
    for (;;) {
      const values = await guard(path, what, () => decoder.next())
      if (values === undefined) break
      yield* values
    }
  }
}

/** Every error inside becomes one that names the file and the place. */
async function guard<T>(path: string, what: string, read: () => T | Promise<T>): Promise<T> {
  try {
    return await read()
  } catch (cause) {
    if (cause instanceof RopewalkError) throw cause
    throw new RopewalkError(
      'ERR_PARQUET',
      `${path}: ${what}: ${(cause as Error).message}: damaged; download it again`,
      {
        cause,
      },
    )
  }
}

async function readFooter(handle: FileHandle, size: number): Promise<ThriftStruct> {
  if (size < 12) throw new RangeError(`the file has ${size} bytes, but a parquet file has at least 12`)
  const tail = Buffer.from(await readBytes(handle, size - 8, 8))
  const magic = tail.toString('latin1', 4)
  if (magic === 'PARE') throw new RangeError('the file is encrypted')
  if (magic !== 'PAR1') throw new RangeError(`the file ends in ${quote(magic)}, not "PAR1"`)
  const length = tail.readUInt32LE(0)
  if (length > size - 12 || length > maxFooterBytes) {
    throw new RangeError(`${length} bytes, but the file has ${size} and a footer at most ${maxFooterBytes}`)
  }
  return new ThriftReader(await readBytes(handle, size - 8 - length, length)).struct()
}

function topColumns(footer: ThriftStruct): Map<string, ThriftStruct> {
  const schema = structs(footer.get(2), 'schema')
  const found = new Map<string, ThriftStruct>()
  // depth first, the root first: only what is directly below the root counts
  let skip = 0
  for (const element of schema.slice(1)) {
    const children = Number(element.get(5) ?? 0)
    if (skip === 0) found.set(textOf(element.get(4)), element)
    else skip--
    skip += children
  }
  return found
}

/** Checks that `field` is a column of one of the types, a value a row; returns its type and whether it may hold nulls. */
function findColumn(
  found: Map<string, ThriftStruct>,
  path: string,
  field: string,
  types: readonly number[],
): Pick<Column, 'type' | 'optional'> {
  const column = found.get(field)
  if (column === undefined) {
    throw new RopewalkError(
      'ERR_FIELD',
      `${path}: no column ${quote(field)}; there are ${[...found.keys()].map((name) => quote(name)).join(', ') || 'none'}` +
        didYouMean(field, found.keys()),
    )
  }
  const type = column.has(1) ? Number(column.get(1)) : -1
  if (!types.includes(type) || column.get(3) === 2) {
    const kinds = types.length > 1 ? 'texts, whole numbers or booleans' : 'texts'
    throw new RopewalkError('ERR_FIELD', `${path}: column ${quote(field)} does not hold ${kinds}: name another field`)
  }
  return { type, optional: column.get(3) === 1 }
}

function readColumn(
  group: ThriftStruct,
  field: string,
  found: Pick<Column, 'type' | 'optional'>,
  size: number,
): Column {
  const chunks = structs(group.get(1), 'columns')
  const meta = chunks
    .flatMap((chunk) => struct(chunk.get(3), 'column') ?? [])
    .find((meta) => pathOf(meta.get(3)) === field)
  if (meta === undefined) throw new RangeError('the row group has no such column')
  const rows = count(group.get(3), 'rows')
  const values = count(meta.get(5), 'values')
  const bytes = count(meta.get(7), 'compressed bytes')
  const dataStart = count(meta.get(9), 'data offset')
  const dictionaryStart = meta.has(11) ? count(meta.get(11), 'dictionary offset') : 0
  const start = dictionaryStart > 0 ? Math.min(dictionaryStart, dataStart) : dataStart
  if (start + bytes > size) throw new RangeError(`bytes ${start} to ${start + bytes}, but the file has ${size}`)
  if (values !== rows) throw new RangeError(`${values} values, but the row group has ${rows} rows`)
  if (values > bytes * maxValuesPerByte) throw new RangeError(`${values} values cannot come from ${bytes} bytes`)
  const codec = Number(meta.get(4) ?? 0)
  if (!(codec in inflate)) throw new RangeError(`compression codec ${codec} is not supported`)
  return { ...found, codec, values, start, bytes }
}

/** The pages of one column chunk, one after the other. */
class ColumnDecoder {
  private readonly reader: ThriftReader
  private dictionary: Uint8Array[] = []
  private left: number

  constructor(
    chunk: Uint8Array,
    private readonly column: Column,
  ) {
    this.reader = new ThriftReader(chunk)
    this.left = column.values
  }

  /** The values of the next data page; undefined after the last one. */
  next(): (Uint8Array | null)[] | undefined {
    while (this.left > 0) {
      const page = this.page()
      if (page === undefined) continue
      this.left -= page.count
      return this.decode(page)
    }
    return undefined
  }

  private page(): Page | undefined {
    const header = this.reader.struct()
    const compressed = count(header.get(3), 'compressed page bytes')
    const size = count(header.get(2), 'page bytes')
    const { bytes, offset } = this.reader
    if (size > Math.min(maxPageBytes, Math.max(compressed, 64) * maxExpansion)) {
      throw new RangeError(`a page of ${size} bytes cannot come from ${compressed}`)
    }
    if (compressed > bytes.length - offset) {
      throw new RangeError(`a page of ${compressed} bytes, but ${bytes.length - offset} are left`)
    }
    this.reader.offset += compressed
    const data = bytes.subarray(offset, offset + compressed)
    const [plain, dictionary, second] = [5, 7, 8].map((id) => struct(header.get(id), 'page header'))
    if (dictionary !== undefined) {
      this.dictionary = this.plain(this.inflate(data, size), count(dictionary.get(1), 'dictionary values'))
      return undefined
    }
    if (second !== undefined) return this.secondPage(second, data, size)
    if (plain === undefined) return undefined
    const values = this.checkCount(plain.get(1))
    const body = this.inflate(data, size)
    if (!this.column.optional) return { count: values, encoding: Number(plain.get(2)), levels: undefined, data: body }
    if (body.length < 4) throw new RangeError('a page ends inside its levels')
    const length = Buffer.from(body.buffer, body.byteOffset).readUInt32LE(0)
    if (length > body.length - 4) throw new RangeError(`levels of ${length} bytes in a page of ${body.length}`)
    return {
      count: values,
      encoding: Number(plain.get(2)),
      levels: body.subarray(4, 4 + length),
      data: body.subarray(4 + length),
    }
  }

  /** DATA_PAGE_V2: its levels stand first and are never compressed. */
  private secondPage(header: ThriftStruct, data: Uint8Array, size: number): Page {
    const levelBytes = count(header.get(5), 'level bytes')
    const skipped = count(header.get(6), 'repetition bytes')
    const head = levelBytes + skipped
    if (head > data.length || head > size) throw new RangeError(`levels of ${head} bytes in a page of ${data.length}`)
    const body = data.subarray(head)
    return {
      count: this.checkCount(header.get(1)),
      encoding: Number(header.get(4)),
      levels: this.column.optional ? data.subarray(skipped, head) : undefined,
      data: header.get(7) === false ? body : this.inflate(body, size - head),
    }
  }

  private checkCount(value: ThriftValue | undefined): number {
    const values = count(value, 'page values')
    if (values > this.left) throw new RangeError(`a page of ${values} values, but ${this.left} are left`)
    return values
  }

  private inflate(data: Uint8Array, size: number): Uint8Array {
    const result = inflate[this.column.codec](data, size)
    if (result.length !== size) throw new RangeError(`a page of ${size} bytes decompressed to ${result.length}`)
    return result
  }

  private decode({ count, encoding, levels, data }: Page): (Uint8Array | null)[] {
    const present = levels === undefined ? undefined : hybrid(levels, 1, count)
    const stored = present === undefined ? count : present.reduce((sum, level) => sum + level, 0)
    const values = this.stored(encoding, data, stored)
    if (present === undefined) return values
    let next = 0
    return Array.from(present, (level) => (level === 1 ? values[next++] : null))
  }

  private plain(data: Uint8Array, values: number): Uint8Array[] {
    const width = widths[this.column.type]
    return width === undefined ? plainValues(data, values) : fixedValues(data, values, width)
  }

  private stored(encoding: number, data: Uint8Array, stored: number): Uint8Array[] {
    if (encoding === 0) return this.plain(data, stored)
    if (encoding === 2 || encoding === 8) {
      if (stored === 0) return []
      const indices = hybrid(data.subarray(1), data[0], stored)
      return Array.from(indices, (index) => {
        const value = this.dictionary[index]
        if (value === undefined) throw new RangeError(`dictionary index ${index} of ${this.dictionary.length}`)
        return value
      })
    }
    if (encoding === 3 && this.column.type === 0) {
      // booleans in runs, behind the length of all of them
      return Array.from(hybrid(data.subarray(4), 1, stored), (bit) => Uint8Array.of(bit))
    }
    if (encoding === 6 && this.column.type === TEXT) return deltaLengthValues(data, stored)
    throw new RangeError(`encoding ${encoding} is not supported: write the file with PLAIN or a dictionary`)
  }
}

function count(value: ThriftValue | undefined, what: string): number {
  const number = typeof value === 'bigint' ? Number(value) : value
  if (typeof number !== 'number' || !Number.isSafeInteger(number) || number < 0) {
    throw new RangeError(`${what}: ${String(value)} is not a count`)
  }
  return number
}

function struct(value: ThriftValue | undefined, what: string): ThriftStruct | undefined {
  if (value !== undefined && !(value instanceof Map)) throw new RangeError(`${what}: not a structure`)
  return value
}

function structs(value: ThriftValue | undefined, what: string): ThriftStruct[] {
  if (!Array.isArray(value) || !value.every((item) => item instanceof Map)) {
    throw new RangeError(`${what}: not a list of structures`)
  }
  return value as ThriftStruct[]
}

/** A column's name; the parts of a nested one are joined by what no name has. */
function pathOf(value: ThriftValue | undefined): string {
  return Array.isArray(value) ? value.map(textOf).join('\0') : ''
}

function textOf(value: ThriftValue | undefined): string {
  return value instanceof Uint8Array ? Buffer.from(value).toString('utf8') : ''
}

async function readBytes(handle: FileHandle, start: number, bytes: number): Promise<Uint8Array> {
  const buffer = new Uint8Array(bytes)
  let done = 0
  while (done < bytes) {
    const { bytesRead } = await handle.read(buffer, done, Math.min(bytes - done, 1 << 30), start + done)
    if (bytesRead === 0) throw new RangeError(`the file ends at byte ${start + done}`)
    done += bytesRead
  }
  return buffer
}
