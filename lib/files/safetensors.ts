import { createHash } from 'node:crypto'
import { constants } from 'node:fs'
import { type FileHandle, open, rm } from 'node:fs/promises'
import { didYouMean, formatBytes, quote, RopewalkError } from '../errors.js'
import { writeAll, writeFailure } from './durable.js'
import { isObject, type JsonObject, type JsonValue, parseJson } from './json.js'

/**
 * The safetensors format: u64 little-endian N, a JSON header of N bytes, then the tensors without gap or overlap to the
 * last byte of the file. Only the header is read here; every rule of the reference reader holds (tensor.rs of
 * huggingface/safetensors), and duplicate keys, which it lets pass, are refused too.
 */

const maxHeaderBytes = 100_000_000

/** Bits of an element, in the reference writer's order: by rising alignment. */
const dtypeBits = {
  BOOL: 8,
  F4: 4,
  F6_E2M3: 6,
  F6_E3M2: 6,
  U8: 8,
  I8: 8,
  F8_E5M2: 8,
  F8_E4M3: 8,
  F8_E8M0: 8,
  I16: 16,
  U16: 16,
  F16: 16,
  BF16: 16,
  I32: 32,
  U32: 32,
  F32: 32,
  C64: 64,
  F64: 64,
  I64: 64,
  U64: 64,
} as const

export type Dtype = keyof typeof dtypeBits
const dtypes = Object.keys(dtypeBits) as Dtype[]

/** One tensor of a file: `offset` and `bytes` are absolute and in bytes; `dims` as in the header. */
export type TensorInfo = { name: string; dtype: Dtype; dims: number[]; offset: number; bytes: number }

export type SafetensorsFile = {
  path: string
  size: number
  metadata: Map<string, string>
  /** In the order of their offsets. */
  tensors: Map<string, TensorInfo>
  /** The bytes of one tensor, copied out of the file. */
  read(name: string): Promise<Uint8Array>
  close(): Promise<void>
}

/** One tensor to write: `data()` gives exactly `bytes` bytes, at once or in pieces. */
export type TensorEntry = {
  name: string
  dtype: Dtype
  dims: readonly number[]
  bytes: number
  data(): Uint8Array | Promise<Uint8Array> | AsyncIterable<Uint8Array>
}

/** Bytes of a tensor; throws RangeError for a size that no file can hold or that is no whole number of bytes. */
export function tensorBytes(dtype: Dtype, dims: readonly number[]): number {
  let elements = 1
  for (const dim of dims) {
    if (!Number.isSafeInteger(dim) || dim < 0) throw new RangeError(`shape [${dims}]: ${dim} is not a dimension`)
    elements *= dim
    if (!Number.isSafeInteger(elements)) throw new RangeError(`shape [${dims}]: the product is beyond 2^53`)
  }
  const bits = elements * dtypeBits[dtype]
  if (!Number.isSafeInteger(bits)) throw new RangeError(`shape [${dims}] of ${dtype}: the size is beyond 2^53 bits`)
  if (bits % 8 !== 0) throw new RangeError(`shape [${dims}] of ${dtype}: ${bits} bits are not a whole number of bytes`)
  return bits / 8
}

/**
 * Opens a file and checks its whole header against its size. `shownPath` is the name for messages where `path` is what
 * a link points to. Throws RopewalkError (ERR_SAFETENSORS, ERR_JSON, ERR_UTF8, ERR_PICKLE, ERR_NOT_FOUND, ...).
 */
export async function openSafetensors(path: string, shownPath = path): Promise<SafetensorsFile> {
  // non-blocking: opening a FIFO would otherwise wait for a writer that never comes
  const handle = await open(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0)).catch((cause) => {
    throw openError(cause, shownPath)
  })
  try {
    const stat = await handle.stat()
    if (!stat.isFile()) {
      throw new RopewalkError('ERR_NOT_A_FILE', `${shownPath}: not a regular file: a safetensors file is expected`)
    }
    const { size } = stat
    const { metadata, tensors } = await readHeader(handle, shownPath, size)
    const read = async (name: string): Promise<Uint8Array> => {
      const tensor = tensors.get(name)
      if (tensor === undefined) {
        throw new RangeError(`${shownPath}: no tensor ${quote(name)}${didYouMean(name, tensors.keys())}`)
      }
      return readExactly(handle, shownPath, tensor.offset, tensor.bytes)
    }
    return { path, size, metadata, tensors, read, close: () => handle.close() }
  } catch (error) {
    await handle.close()
    throw error
  }
}

function openError(cause: NodeJS.ErrnoException, path: string): RopewalkError {
  if (cause.code === 'ENOENT') {
    return new RopewalkError('ERR_NOT_FOUND', `${path}: does not exist: check the path, or download the model`, {
      cause,
    })
  }
  return new RopewalkError('ERR_READ', `${path}: cannot be opened (${cause.message}): check its permissions`, { cause })
}

async function readHeader(
  handle: FileHandle,
  file: string,
  size: number,
): Promise<{ metadata: Map<string, string>; tensors: Map<string, TensorInfo> }> {
  const first = await readExactly(handle, file, 0, Math.min(size, 64))
  if (size < 8) {
    fail(file, `the file has ${size} bytes, but the header length alone takes 8: the file is truncated: re-download it`)
  }
  const length = Buffer.from(first.buffer, first.byteOffset).readBigUInt64LE(0)
  if (length > maxHeaderBytes || Number(length) + 8 > size) {
    refuseOtherFormats(first, file)
    if (length > maxHeaderBytes) {
      fail(
        file,
        `header length ${length}, but the limit is ${maxHeaderBytes}: not a safetensors file, or damaged: re-download it`,
      )
    }
    fail(
      file,
      `header length ${length} + 8 is more than the file's ${size} bytes: the file is truncated: re-download it`,
    )
  }
  const headerBytes = Number(length)
  const header = parseJson(await readExactly(handle, file, 8, headerBytes), `${file} (header)`, { maxDepth: 8 })
  if (!isObject(header)) fail(file, 'the header is not a JSON object {...}: not a safetensors file: re-download it')
  const dataStart = 8 + headerBytes
  const tensors = checkContiguity(readTensors(header, file), file, size, dataStart)
  for (const tensor of tensors) tensor.offset += dataStart
  return { metadata: readMetadata(header, file), tensors: new Map(tensors.map((tensor) => [tensor.name, tensor])) }
}

/** Each tensor by itself: its fields, and its size against its shape. Offsets are still relative to the data. */
function readTensors(header: JsonObject, file: string): TensorInfo[] {
  const fields = ['dtype', 'shape', 'data_offsets']
  return Object.entries(header)
    .filter(([name]) => name !== '__metadata__')
    .map(([name, entry]) => {
      const at = `tensor ${quote(name)}`
      if (!isObject(entry)) fail(file, `${at}: ${quote(entry)}, but it must be an object with ${fields.join(', ')}`)
      for (const key of Object.keys(entry)) {
        if (!fields.includes(key)) fail(file, `${at}: unknown field ${quote(key)}${didYouMean(key, fields)}`)
      }
      for (const key of fields) if (!(key in entry)) fail(file, `${at}: the field ${quote(key)} is missing`)
      const { dtype, shape, data_offsets: offsets } = entry
      if (typeof dtype !== 'string' || !dtypes.includes(dtype as Dtype)) {
        const hint = typeof dtype === 'string' ? didYouMean(dtype, dtypes) : ''
        fail(file, `${at}: dtype ${quote(dtype)} is not one of ${dtypes.join(', ')}${hint}`)
      }
      const dims = readCounts(shape, `${at}: shape`, file)
      const [begin, end, ...rest] = readCounts(offsets, `${at}: data_offsets`, file)
      if (end === undefined || rest.length > 0)
        fail(file, `${at}: data_offsets ${quote(offsets)}, but it must be [begin, end]`)
      if (end < begin) fail(file, `${at}: data_offsets [${begin}, ${end}]: the end lies before the begin`)
      let bytes = 0
      try {
        bytes = tensorBytes(dtype as Dtype, dims)
      } catch (error) {
        fail(file, `${at}: ${(error as Error).message}`)
      }
      if (end - begin !== bytes) {
        fail(
          file,
          `${at}: data_offsets [${begin}, ${end}] hold ${end - begin} bytes, but ${dtype} of shape [${dims}] takes ${bytes}`,
        )
      }
      return { name, dtype: dtype as Dtype, dims, offset: begin, bytes }
    })
}

function readCounts(value: JsonValue, what: string, file: string): number[] {
  if (!Array.isArray(value)) fail(file, `${what} ${quote(value)}, but it must be a list of whole numbers`)
  for (const item of value) {
    if (typeof item !== 'number' || !Number.isSafeInteger(item) || item < 0 || Object.is(item, -0)) {
      fail(file, `${what} ${quote(value)}: ${quote(item)} is not a whole number of at least 0`)
    }
  }
  return value as number[]
}

/** All tensors together: from byte 0 of the data to the last byte of the file, without gap or overlap. */
function checkContiguity(tensors: TensorInfo[], file: string, size: number, dataStart: number): TensorInfo[] {
  tensors.sort((a, b) => a.offset - b.offset || a.bytes - b.bytes)
  let end = 0
  let before = ''
  for (const { name, offset, bytes } of tensors) {
    if (offset !== end) {
      const where = before === '' ? 'the data begins at 0' : `the tensor before it, ${quote(before)}, ends at ${end}`
      const what = offset < end ? 'they overlap' : `${offset - end} bytes belong to no tensor`
      fail(file, `tensor ${quote(name)}: begins at ${offset}, but ${where}: ${what}`)
    }
    end += bytes
    before = name
  }
  const expected = dataStart + end
  if (expected === size) return tensors
  const last = before === '' ? 'the header without tensors' : `the last tensor, ${quote(before)},`
  if (expected > size) {
    fail(file, `${last} ends at byte ${expected}, but the file has ${size}: the file is truncated: re-download it`)
  }
  return fail(
    file,
    `${last} ends at byte ${expected}, but the file has ${size}: ${size - expected} bytes belong to no tensor`,
  )
}

function readMetadata(header: JsonObject, file: string): Map<string, string> {
  if (!('__metadata__' in header)) return new Map()
  const entries = header.__metadata__
  if (!isObject(entries)) fail(file, `__metadata__: ${quote(entries)}, but it must be an object of strings`)
  return new Map(
    Object.entries(entries).map(([key, value]) => {
      if (typeof value !== 'string')
        fail(file, `__metadata__: ${quote(key)} is ${quote(value)}, but it must be a string`)
      return [key, value]
    }),
  )
}

/** Other formats under this name: asked only when the length cannot be one, since a small length may look like a magic. */
function refuseOtherFormats(first: Uint8Array, file: string): void {
  const text = Buffer.from(first).toString('latin1')
  if (text.startsWith('PK') || first[0] === 0x80) throw pickleError(file)
  const git = text.startsWith('version https://git-lfs')
  const seen = git
    ? 'a Git LFS pointer'
    : text.startsWith('GGUF')
      ? 'a GGUF file'
      : /^\s*<(!|html)/i.test(text) && 'an HTML page'
  if (seen === false) return
  const remedy = git ? 'run "git lfs pull" in its repository' : 'download the safetensors file of the model'
  throw new RopewalkError('ERR_SAFETENSORS', `${file}: ${seen}, not a safetensors file: ${remedy}`)
}

/** Pickle runs code when it is loaded (CVE-2025-32434: even with weights_only): there is no way to read it here. */
export function pickleError(file: string): RopewalkError {
  return new RopewalkError(
    'ERR_PICKLE',
    `${file}: a PyTorch pickle file, which can run any code when it is loaded, and is never read. Convert it once, in ` +
      'Python, from a source you trust: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, ' +
      'safe_serialization=True)',
  )
}

async function readExactly(handle: FileHandle, file: string, offset: number, bytes: number): Promise<Uint8Array> {
  const buffer = new Uint8Array(bytes)
  let done = 0
  while (done < bytes) {
    // one read call of more than 2 GiB is refused by Node
    const { bytesRead } = await handle.read(buffer, done, Math.min(bytes - done, 1 << 30), offset + done)
    if (bytesRead === 0) {
      fail(
        file,
        `the file ends at byte ${offset + done}, inside ${bytes} bytes at ${offset}: it was cut while it was open`,
      )
    }
    done += bytesRead
  }
  return buffer
}

function fail(file: string, what: string): never {
  throw new RopewalkError('ERR_SAFETENSORS', `${file}: ${what}`)
}

// ---- writing

/** Tensors in the order of the reference writer: descending alignment of the dtype, then the bytes of the name. */
function canonicalOrder(entries: Iterable<TensorEntry>): TensorEntry[] {
  return [...entries]
    .map((entry) => ({ entry, rank: dtypes.indexOf(entry.dtype), key: Buffer.from(entry.name) }))
    .sort((a, b) => b.rank - a.rank || Buffer.compare(a.key, b.key))
    .map(({ entry }) => entry)
}

/** The 8 length bytes and the header, padded with spaces to a multiple of 8. Throws TypeError or RangeError. */
function header(entries: TensorEntry[], metadata: Iterable<[string, string]>, path: string): Uint8Array {
  // put together by hand: an object would move names such as "0" to its front
  const members: string[] = []
  const extra = [...metadata].map(([key, value]) => {
    if (typeof value !== 'string')
      throw new TypeError(`${path}: metadata ${quote(key)}: ${quote(value)} is not a string`)
    return `${JSON.stringify(key)}:${JSON.stringify(value)}`
  })
  if (extra.length > 0) members.push(`"__metadata__":{${extra.join(',')}}`)
  const names = new Set(['__metadata__'])
  let offset = 0
  for (const { name, dtype, dims, bytes } of entries) {
    const at = `${path}: tensor ${quote(name)}`
    if (names.has(name)) throw new RangeError(`${at}: this name is taken`)
    if (/\p{Surrogate}/u.test(name)) throw new RangeError(`${at}: a lone surrogate in the name has no UTF-8 form`)
    if (!dtypes.includes(dtype))
      throw new RangeError(`${at}: dtype ${quote(dtype)}${didYouMean(String(dtype), dtypes)}`)
    const expected = tensorBytes(dtype, dims)
    if (bytes !== expected)
      throw new RangeError(`${at}: ${bytes} bytes, but ${dtype} of shape [${dims}] takes ${expected}`)
    const info = { dtype, shape: [...dims], data_offsets: [offset, offset + bytes] }
    members.push(`${JSON.stringify(name)}:${JSON.stringify(info)}`)
    names.add(name)
    offset += bytes
  }
  const text = Buffer.from(`{${members.join(',')}}`)
  const length = Math.ceil(text.length / 8) * 8
  if (length > maxHeaderBytes) {
    throw new RangeError(
      `${path}: a header of ${formatBytes(length)}, but readers take ${maxHeaderBytes} bytes: use shards`,
    )
  }
  const buffer = Buffer.alloc(8 + length, ' ')
  buffer.writeBigUInt64LE(BigInt(length))
  text.copy(buffer, 8)
  return buffer
}

/**
 * Writes a new file (an existing one is an error), tensor by tensor; `sync` fsyncs it before it is closed. What it
 * writes is byte for byte what the reference writer would. A file that failed half-way is removed.
 */
export async function writeSafetensors(
  path: string,
  entries: Iterable<TensorEntry>,
  metadata: Iterable<[string, string]> = [],
  { sync = false, signal }: { sync?: boolean; signal?: AbortSignal } = {},
): Promise<{ sha256: string; bytes: number }> {
  const ordered = canonicalOrder(entries)
  const start = header(ordered, metadata, path)
  const total = ordered.reduce((sum, entry) => sum + entry.bytes, start.length)
  const hash = createHash('sha256')
  const handle = await open(path, 'wx').catch(async (error) => {
    throw await writeFailure(error, path, total)
  })
  const write = async (bytes: Uint8Array): Promise<void> => {
    // in pieces: the hash runs on this thread and must not hold it for long
    for (let at = 0; at < bytes.byteLength; at += 1 << 23) {
      signal?.throwIfAborted()
      const piece = bytes.subarray(at, at + (1 << 23))
      hash.update(piece)
      await writeAll(handle, piece)
    }
  }
  try {
    await write(start)
    for (const entry of ordered) await writeTensor(entry, path, write)
    if (sync) await handle.sync()
  } catch (error) {
    await handle.close().catch(() => undefined)
    await rm(path, { force: true })
    throw await writeFailure(error, path, total)
  }
  await handle.close()
  return { sha256: hash.digest('hex'), bytes: total }
}

async function writeTensor(
  entry: TensorEntry,
  path: string,
  write: (bytes: Uint8Array) => Promise<void>,
): Promise<void> {
  const data = await entry.data()
  let written = 0
  for await (const piece of data instanceof Uint8Array ? [data] : data) {
    written += piece.byteLength
    if (written <= entry.bytes) await write(piece)
  }
  if (written !== entry.bytes) {
    throw new RangeError(
      `${path}: tensor ${quote(entry.name)}: data() gave ${written} bytes, not the announced ${entry.bytes}`,
    )
  }
}
