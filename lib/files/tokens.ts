import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { type FileHandle, mkdir, open, rename, rm, stat } from 'node:fs/promises'
import { homedir } from 'node:os'
import { extname, join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { quote, RopewalkError } from '../errors.js'
import { sha256File, temporaryName, writeAll, writeFailure } from './durable.js'
import { documentFiles, readDocuments } from './text.js'

/**
 * Documents as token ids, in one file that is made once for the same texts and the same tokenizer:
 *
 *   ids u32 (N) | end of each document f64 (D) | documents of each data file, JSON | trailer (64 bytes)
 *   trailer: "RWTOKEN1", N f64, D f64, bytes of the JSON f64, SHA-256 of all before
 *
 * It is a cache: nothing is fsynced, and a file that a crash or a disk has damaged is noticed by its checksum and made
 * again. Two processes may make it at the same time; either's result is whole when it gets its name.
 */
export interface TokenFile {
  readonly path: string
  /** SHA-256 over the texts' files, the tokenizer and how documents were read: equal keys, equal tokens. */
  readonly key: string
  readonly tokens: number
  /** Index of the first token after each document. */
  readonly ends: Float64Array
  /** Data files in order, with the number of documents from each. */
  readonly files: readonly { path: string; documents: number }[]
  /** Token ids `at` .. `at + count`. */
  read(at: number, count: number): Promise<Int32Array>
  close(): Promise<void>
}

export interface TokenOptions {
  /** Text -> ids, special tokens of the start included. */
  encode: (text: string) => readonly number[]
  /** Identifies what `encode` does. */
  tokenizerHash: string
  /** Added after each document; undefined for nothing. */
  eosId: number | undefined
  /** Field or column of the text in .jsonl and .parquet files. */
  field: string
  /** Folder of the cache; default $XDG_CACHE_HOME/ropewalk/tokens, ~/.cache/ropewalk/tokens. */
  cacheDir?: string | undefined
  signal?: AbortSignal | undefined
  onProgress?: ((progress: TokenProgress) => void) | undefined
  onWarning?: ((message: string) => void) | undefined
}

/** Bytes of data files; `hash` comes first and always, `tokenize` only where the cache has nothing. */
export interface TokenProgress {
  stage: 'hash' | 'tokenize'
  bytes: number
  totalBytes: number
}

const MAGIC = 'RWTOKEN1'
const TRAILER_BYTES = 64
const CHUNK = 1 << 20
/** Encoding runs on this thread; after so many milliseconds others have their turn. */
const TURN = 10

/** The tokens of files and folders of documents, from the cache or made now. Throws what reading documents throws. */
export async function openTokens(paths: readonly string[], options: TokenOptions): Promise<TokenFile> {
  const { tokenizerHash, eosId, field, signal, onProgress, onWarning } = options
  const sources: { path: string; bytes: number }[] = []
  for (const path of await documentFiles(paths)) sources.push({ path, bytes: (await stat(path)).size })
  const totalBytes = sources.reduce((sum, { bytes }) => sum + bytes, 0)
  const hashes: string[] = []
  let bytes = 0
  for (const source of sources) {
    signal?.throwIfAborted()
    hashes.push(extname(source.path).toLowerCase(), await sha256File(source.path))
    onProgress?.({ stage: 'hash', bytes: (bytes += source.bytes), totalBytes })
  }
  const identity = { format: MAGIC, tokenizer: tokenizerHash, eos: eosId ?? null, field, files: hashes }
  const key = createHash('sha256').update(JSON.stringify(identity)).digest('hex')
  const dir = options.cacheDir ?? defaultCacheDir()
  const path = join(dir, `${key.slice(0, 32)}.tokens`)

  const cached = await openCached(path).catch((error: unknown) => {
    if (!(error instanceof RopewalkError && error.code === 'ERR_CACHE_DAMAGED')) throw error
    onWarning?.(`${error.message}: it is made again`)
    return undefined
  })
  if (!cached) {
    await mkdir(dir, { recursive: true }).catch((error: unknown) => {
      throw cacheError(error, dir)
    })
    await build(path, sources, totalBytes, options)
  }
  const { handle, tokens, ends, documents } = cached ?? (await openCached(path))!
  return {
    path,
    key,
    tokens,
    ends,
    files: sources.map((source, i) => ({ path: source.path, documents: documents[i] ?? 0 })),
    async read(at, count) {
      if (!(Number.isInteger(at) && Number.isInteger(count) && at >= 0 && count > 0 && at + count <= tokens)) {
        throw new RangeError(`tokens ${at} .. ${at + count} do not lie inside the ${tokens} of ${path}`)
      }
      const ids = new Int32Array(count)
      await readExactly(handle, new Uint8Array(ids.buffer), at * 4, path)
      return ids
    },
    close: () => handle.close(),
  }
}

function defaultCacheDir(): string {
  const base = process.env.XDG_CACHE_HOME || (process.platform === 'win32' && process.env.LOCALAPPDATA)
  return join(base || join(homedir(), '.cache'), 'ropewalk', 'tokens')
}

function cacheError(error: unknown, path: string): RopewalkError {
  return new RopewalkError(
    'ERR_CACHE',
    `${path}: tokens cannot be kept there (${(error as Error).message}): set cacheDir to a folder where they can`,
    { cause: error },
  )
}

interface Cached {
  handle: FileHandle
  tokens: number
  ends: Float64Array
  documents: number[]
}

/** Opens and checks a file of the cache; undefined where there is none, ERR_CACHE_DAMAGED where it is not as written. */
async function openCached(path: string): Promise<Cached | undefined> {
  const handle = await open(path, 'r').catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined
    throw cacheError(error, path)
  })
  if (!handle) return undefined
  try {
    const damaged = (what: string): never => {
      throw new RopewalkError('ERR_CACHE_DAMAGED', `${path}: the cached tokens are damaged (${what})`)
    }
    const { size } = await handle.stat()
    if (size < TRAILER_BYTES) damaged(`${size} bytes`)
    const trailer = Buffer.alloc(TRAILER_BYTES)
    await readExactly(handle, trailer, size - TRAILER_BYTES, path)
    if (trailer.toString('latin1', 0, 8) !== MAGIC) damaged('no trailer')
    const [tokens, count, text] = [8, 16, 24].map((at) => trailer.readDoubleLE(at)) as [number, number, number]
    const sizes = [tokens, count, text].every((value) => Number.isSafeInteger(value) && value >= 0)
    if (!sizes || tokens * 4 + count * 8 + text + TRAILER_BYTES !== size) damaged('sizes do not add up')
    const hash = createHash('sha256')
    const end = size - 33 // inclusive: all but the checksum
    for await (const chunk of createReadStream(path, { end, highWaterMark: CHUNK })) hash.update(chunk as Buffer)
    if (hash.digest().compare(trailer, 32) !== 0) damaged('checksum')
    const ends = new Float64Array(count)
    await readExactly(handle, new Uint8Array(ends.buffer), tokens * 4, path)
    const json = Buffer.alloc(text)
    await readExactly(handle, json, tokens * 4 + count * 8, path)
    return { handle, tokens, ends, documents: JSON.parse(json.toString()) as number[] }
  } catch (error) {
    await handle.close()
    throw error
  }
}

async function build(
  path: string,
  sources: readonly { path: string; bytes: number }[],
  totalBytes: number,
  { encode, eosId, field, signal, onProgress }: TokenOptions,
): Promise<void> {
  const temporary = temporaryName(path)
  const handle = await open(temporary, 'wx').catch((error: unknown) => {
    throw cacheError(error, path)
  })
  const hash = createHash('sha256')
  let written = 0
  const write = async (bytes: Uint8Array): Promise<void> => {
    hash.update(bytes)
    await writeAll(handle, bytes)
    written += bytes.byteLength
  }
  const chunk = new Uint32Array(CHUNK)
  let filled = 0
  let tokens = 0
  const put = async (ids: readonly number[]): Promise<void> => {
    for (const id of ids) {
      if (filled === chunk.length) await flush()
      chunk[filled++] = id
    }
    tokens += ids.length
  }
  const flush = async (): Promise<void> => {
    await write(new Uint8Array(chunk.buffer, 0, filled * 4))
    filled = 0
  }
  try {
    const ends: number[] = []
    const documents: number[] = []
    let before = 0
    let turn = Date.now()
    for (const source of sources) {
      let bytes = 0
      const first = ends.length
      for await (const { text } of readDocuments([source.path], { field })) {
        if (text === '') continue
        await put(encode(text))
        if (eosId !== undefined) await put([eosId])
        if (tokens > (ends.at(-1) ?? 0)) ends.push(tokens)
        bytes = Math.min(source.bytes, bytes + text.length)
        if (Date.now() - turn < TURN) continue
        onProgress?.({ stage: 'tokenize', bytes: before + bytes, totalBytes })
        await setImmediate()
        signal?.throwIfAborted()
        turn = Date.now()
      }
      documents.push(ends.length - first)
      onProgress?.({ stage: 'tokenize', bytes: (before += source.bytes), totalBytes })
    }
    await flush()
    await write(new Uint8Array(Float64Array.from(ends).buffer))
    const json = Buffer.from(JSON.stringify(documents))
    await write(json)
    const trailer = Buffer.alloc(32)
    trailer.write(MAGIC, 'latin1')
    ;[tokens, ends.length, json.length].forEach((value, i) => trailer.writeDoubleLE(value, 8 + 8 * i))
    await write(trailer)
    await writeAll(handle, hash.digest())
    await handle.close()
    await rename(temporary, path)
  } catch (error) {
    await handle.close().catch(() => undefined)
    await rm(temporary, { force: true })
    throw await writeFailure(error, path, written + 4 * CHUNK)
  }
}

async function readExactly(handle: FileHandle, bytes: Uint8Array, position: number, path: string): Promise<void> {
  for (let done = 0; done < bytes.byteLength;) {
    const { bytesRead } = await handle.read(bytes, done, bytes.byteLength - done, position + done)
    if (bytesRead === 0) {
      throw new RopewalkError(
        'ERR_CACHE',
        `${path}: ends at byte ${position + done}: ${quote(path)} changed while it was read`,
      )
    }
    done += bytesRead
  }
}
