import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { type FileHandle, mkdir, open, rename, rm, stat } from 'node:fs/promises'
import { homedir } from 'node:os'
import { extname, join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { quote, RopewalkError } from '../errors.js'
import { sha256File, temporaryName, writeAll, writeFailure } from './durable.js'
import { documentFiles, type ExampleFields, readDocuments } from './text.js'

/**
 * Documents as token ids, in shards on disk: one for each data file, made once for the same content and tokenizer, so
 * that a file added to the data costs no more than itself.
 *
 *   ids u32 (N) | end of each document f64 (D) | tokens of its prompt f64 (P = D or 0) | trailer (64 bytes)
 *   trailer: "RWTOKEN2", N f64, D f64, P f64, SHA-256 of all before
 *
 * It is a cache: nothing is fsynced, and a shard that a crash or a disk has damaged is noticed by its checksum and made
 * again. Two processes may make one at the same time; either's result is whole when it gets its name.
 */
export interface TokenFile {
  /** SHA-256 over the texts' files, the tokenizer and how documents were read: equal keys, equal tokens. */
  readonly key: string
  readonly tokens: number
  /** Index of the first token after each document. */
  readonly ends: Float64Array
  /** How many tokens of each document are its prompt, which is not to be learned; of plain texts empty. */
  readonly prompts: Float64Array
  /** Data files in order, with the number of documents from each. */
  readonly files: readonly { path: string; documents: number }[]
  /** Token ids `at` .. `at + count`. */
  read(at: number, count: number): Promise<Int32Array>
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
  /** Fields of a prompt and its completion, in place of `field`. */
  fields?: ExampleFields | undefined
  /** Folder of the cache; default $XDG_CACHE_HOME/ropewalk/tokens, ~/.cache/ropewalk/tokens. */
  cacheDir?: string | undefined
  signal?: AbortSignal | undefined
  onProgress?: ((progress: TokenProgress) => void) | undefined
  onWarning?: ((message: string) => void) | undefined
}

/**
 * How far the reading of data files has come.
 *
 * @category Training
 */
export interface TokenProgress {
  /** `hash` comes first and always, `tokenize` only where the cache has nothing. */
  stage: 'hash' | 'tokenize'
  /** Bytes of the files that this stage has read. */
  bytes: number
  /** Bytes of all files. */
  totalBytes: number
}

const MAGIC = 'RWTOKEN2'
const TRAILER_BYTES = 64
const CHUNK = 1 << 20
/** Encoding runs on this thread; after so many milliseconds others have their turn. */
const TURN = 10

interface Shard {
  path: string
  tokens: number
  ends: Float64Array
  prompts: Float64Array
}

/** The tokens of files and folders of documents, from the cache or made now. Throws what reading documents throws. */
export async function openTokens(paths: readonly string[], options: TokenOptions): Promise<TokenFile> {
  const { tokenizerHash, eosId, field, fields, signal, onProgress, onWarning } = options
  const sources: { path: string; bytes: number }[] = []
  for (const path of await documentFiles(paths)) sources.push({ path, bytes: (await stat(path)).size })
  const totalBytes = sources.reduce((sum, { bytes }) => sum + bytes, 0)
  const dir = options.cacheDir ?? defaultCacheDir()
  const keys: string[] = []
  let bytes = 0
  for (const source of sources) {
    signal?.throwIfAborted()
    const file = [extname(source.path).toLowerCase(), await sha256File(source.path)]
    const read = fields ? { prompt: fields.prompt, completion: fields.completion } : field
    const identity = { format: MAGIC, tokenizer: tokenizerHash, eos: eosId ?? null, field: read, file }
    keys.push(createHash('sha256').update(JSON.stringify(identity)).digest('hex'))
    onProgress?.({ stage: 'hash', bytes: (bytes += source.bytes), totalBytes })
  }

  const shards: Shard[] = []
  let before = 0
  for (const [i, source] of sources.entries()) {
    const path = join(dir, `${keys[i]!.slice(0, 32)}.tokens`)
    let shard = await openShard(path).catch((error: unknown) => {
      if (!(error instanceof RopewalkError && error.code === 'ERR_CACHE_DAMAGED')) throw error
      onWarning?.(`${error.message}: it is made again`)
      return undefined
    })
    if (!shard) {
      await mkdir(dir, { recursive: true }).catch((error: unknown) => {
        throw cacheError(error, dir)
      })
      const progress = (done: number): void => onProgress?.({ stage: 'tokenize', bytes: before + done, totalBytes })
      await build(path, source, options, progress)
      shard = (await openShard(path))!
    }
    before += source.bytes
    shards.push(shard)
  }

  const tokens = shards.reduce((sum, shard) => sum + shard.tokens, 0)
  const ends = new Float64Array(shards.reduce((sum, shard) => sum + shard.ends.length, 0))
  const prompts = new Float64Array(fields ? ends.length : 0)
  const starts: number[] = []
  let documents = 0
  let start = 0
  for (const shard of shards) {
    starts.push(start)
    ends.set(
      shard.ends.map((end) => start + end),
      documents,
    )
    if (fields) prompts.set(shard.prompts, documents)
    documents += shard.ends.length
    start += shard.tokens
  }
  return {
    key: createHash('sha256').update(keys.join()).digest('hex'),
    tokens,
    ends,
    prompts,
    files: sources.map(({ path }, i) => ({ path, documents: shards[i]!.ends.length })),
    async read(at, count) {
      if (!(Number.isInteger(at) && Number.isInteger(count) && at >= 0 && count > 0 && at + count <= tokens)) {
        throw new RangeError(`tokens ${at} .. ${at + count} do not lie inside the ${tokens} of ${paths.join(', ')}`)
      }
      const ids = new Int32Array(count)
      for (const [i, shard] of shards.entries()) {
        const from = Math.max(at, starts[i]!)
        const to = Math.min(at + count, starts[i]! + shard.tokens)
        if (from >= to) continue
        const part = new Uint8Array(ids.buffer, (from - at) * 4, (to - from) * 4)
        // opened for each read: thousands of files must not hold thousands of descriptors
        const handle = await open(shard.path)
        try {
          await readExactly(handle, part, (from - starts[i]!) * 4, shard.path)
        } finally {
          await handle.close()
        }
      }
      return ids
    },
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

/** Opens and checks a shard; undefined where there is none, ERR_CACHE_DAMAGED where it is not as written. */
async function openShard(path: string): Promise<Shard | undefined> {
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
    const [tokens, count, prompted] = [8, 16, 24].map((at) => trailer.readDoubleLE(at)) as [number, number, number]
    const sizes = [tokens, count].every((value) => Number.isSafeInteger(value) && value >= 0)
    const known = prompted === 0 || prompted === count
    if (!sizes || !known || tokens * 4 + (count + prompted) * 8 + TRAILER_BYTES !== size) damaged('sizes do not add up')
    const hash = createHash('sha256')
    const end = size - 33 // inclusive: all but the checksum
    for await (const chunk of createReadStream(path, { end, highWaterMark: CHUNK })) hash.update(chunk as Buffer)
    if (hash.digest().compare(trailer, 32) !== 0) damaged('checksum')
    const ends = new Float64Array(count)
    await readExactly(handle, new Uint8Array(ends.buffer), tokens * 4, path)
    const prompts = new Float64Array(prompted)
    await readExactly(handle, new Uint8Array(prompts.buffer), tokens * 4 + count * 8, path)
    return { path, tokens, ends, prompts }
  } finally {
    await handle.close()
  }
}

async function build(
  path: string,
  source: { path: string; bytes: number },
  { encode, eosId, field, fields, signal }: TokenOptions,
  progress: (bytes: number) => void,
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
    const prompts: number[] = []
    let turn = Date.now()
    let bytes = 0
    for await (const { text, prompt } of readDocuments([source.path], { field, fields })) {
      if (text === '') continue
      const ids = encode(text)
      await put(ids)
      if (eosId !== undefined) await put([eosId])
      if (tokens > (ends.at(-1) ?? 0)) {
        ends.push(tokens)
        if (prompt !== undefined) prompts.push(commonPrefix(ids, encode(prompt)))
      }
      bytes = Math.min(source.bytes, bytes + text.length)
      if (Date.now() - turn < TURN) continue
      progress(bytes)
      await setImmediate()
      signal?.throwIfAborted()
      turn = Date.now()
    }
    progress(source.bytes)
    await flush()
    await write(new Uint8Array(Float64Array.from([...ends, ...prompts]).buffer))
    const trailer = Buffer.alloc(32)
    trailer.write(MAGIC, 'latin1')
    ;[tokens, ends.length, prompts.length].forEach((value, i) => trailer.writeDoubleLE(value, 8 + 8 * i))
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

/** Tokens of a text that its prompt alone begins with, too: one that reaches into the completion is not of the prompt. */
function commonPrefix(a: readonly number[], b: readonly number[]): number {
  let n = 0
  while (n < a.length && a[n] === b[n]) n++
  return n
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
