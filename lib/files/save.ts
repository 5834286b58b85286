import { createHash } from 'node:crypto'
import { mkdir, readdir, rm } from 'node:fs/promises'
import { dirname, join, resolve } from 'node:path'
import { quote, RopewalkError } from '../errors.js'
import { readSmallFile } from './bytes.js'
import {
  existsError,
  isTaken,
  replaceFolder,
  requireSpace,
  temporaryName,
  writeFailure,
  writeNewFile,
} from './durable.js'
import { adapterConfigName, adapterWeightsName } from './adapter.js'
import { containedFile, indexName, realFolder, singleName } from './folder.js'
import { stringifyJson } from './json.js'
import { type TensorEntry, writeSafetensors } from './safetensors.js'

/** Hugging Face model folders, written: whole or not at all. */

export type SaveOptions = {
  /** config.json; keys that are undefined are left out. */
  config: Record<string, unknown>
  tensors: Iterable<TensorEntry>
  generationConfig?: Record<string, unknown>
  /** The folder whose tokenizer files go with the model. */
  copyFrom?: string
  /** Largest shard in bytes; beyond it the weights are split, with an index. Default 5e9, as transformers 4 has it. */
  maxShardBytes?: number
  /** safetensors metadata; default format: pt, which transformers asks for. */
  metadata?: Iterable<[string, string]>
  overwrite?: boolean
  signal?: AbortSignal
}

export type SavedFile = { name: string; bytes: number; sha256: string }

/** What belongs to a tokenizer, and chat_template and generation settings: copied as they are. */
const companions = [
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'tokenizer.model',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
]

const maxCompanionBytes = 256 << 20

/** Config fields that are floats in Python: 8 must be written 8.0, or transformers before 4.43 refuses the factor. */
const floatFields = new Set([
  'factor',
  'rope_theta',
  'rms_norm_eps',
  'initializer_range',
  'attention_dropout',
  'attention_factor',
  'beta_fast',
  'beta_slow',
  'mscale',
  'mscale_all_dim',
  'low_freq_factor',
  'high_freq_factor',
  'short_factor',
  'long_factor',
  'temperature',
  'top_p',
])

/**
 * Writes a model folder: into a temporary folder beside `target`, every file fsynced, then renamed into place. On any
 * failure the temporary folder is removed and `target` is as it was. Returns the files with their SHA-256.
 */
export async function saveModelFolder(target: string, options: SaveOptions): Promise<SavedFile[]> {
  const { config, generationConfig, copyFrom, maxShardBytes = 5e9, overwrite = false, signal } = options
  if (!(maxShardBytes > 0)) throw new RangeError(`maxShardBytes: ${maxShardBytes}, but it must be above 0`)
  const tensors = [...options.tensors]
  const metadata = [...(options.metadata ?? [['format', 'pt'] as [string, string]])]
  await requireReplaceable(target, overwrite)
  const copies = copyFrom === undefined ? [] : await findCompanions(copyFrom)
  return saveFolder(target, { needed: bytesOf(tensors), overwrite, signal }, async (temporary) => {
    const saved = await writeWeights(temporary, tensors, metadata, maxShardBytes, signal)
    const texts: [string, string][] = [['config.json', configText(config)]]
    if (generationConfig !== undefined) texts.push(['generation_config.json', configText(generationConfig)])
    saved.push(...(await writeTexts(temporary, texts)))
    for (const { name, path } of copies) {
      if (texts.some(([written]) => written === name)) continue
      saved.push(await copyDurable(path, temporary, name))
    }
    return saved
  })
}

export interface AdapterSaveOptions {
  /** adapter_config.json, as PEFT has it. */
  adapterConfig: Record<string, unknown>
  /** config.json of the base as the adapter wants it. */
  config: Record<string, unknown>
  /** README.md. */
  card: string
  tensors: readonly TensorEntry[]
  overwrite?: boolean
}

/** Writes an adapter's folder in the way that `saveModelFolder` does. */
export async function saveAdapterFolder(target: string, options: AdapterSaveOptions): Promise<SavedFile[]> {
  const { adapterConfig, config, card, tensors, overwrite = false } = options
  await requireReplaceable(target, overwrite)
  return saveFolder(target, { needed: bytesOf(tensors), overwrite }, async (temporary) => {
    const weights = join(temporary, adapterWeightsName)
    const written = await writeSafetensors(weights, tensors, [['format', 'pt']], { sync: true })
    const texts: [string, string][] = [
      [adapterConfigName, `${stringifyJson(adapterConfig)}\n`],
      ['config.json', configText(config)],
      ['README.md', card],
    ]
    return [{ name: adapterWeightsName, ...written }, ...(await writeTexts(temporary, texts))]
  })
}

/**
 * Throws ERR_EXISTS where something stands at `target`, unless it may be overwritten and is an empty folder or a saved model
 * or adapter and nothing else: what a user keeps beside them would be deleted, and is in no new folder.
 */
export async function requireReplaceable(target: string, overwrite: boolean): Promise<void> {
  if (!(await isTaken(target))) return
  if (!overwrite) throw existsError(target)
  const entries = await readdir(target, { withFileTypes: true }).catch(() => undefined)
  const refuse = (reason: string): never => {
    throw new RopewalkError('ERR_EXISTS', `${target}: it ${reason}: choose another folder`)
  }
  if (!entries) return refuse('is a file, and no model that could be overwritten')
  const names = new Set(entries.map(({ name }) => name))
  const adapter = names.has(adapterConfigName)
  if (!adapter && !names.has('config.json')) refuse('is no saved model or adapter, so it is not overwritten')
  const lost = entries.filter((entry) => entry.isDirectory() || !isOwn(entry.name, adapter)).map(({ name }) => name)
  if (lost.length === 0) return
  const some = lost.sort().slice(0, 3).join(', ')
  refuse(`holds ${some}${lost.length > 3 ? ` and ${lost.length - 3} more` : ''}, which overwriting would delete`)
}

/** Whether a save can have written a file of this name. */
const isOwn = (name: string, adapter: boolean): boolean =>
  /\.safetensors(\.index\.json)?$/.test(name) ||
  ['config.json', adapterConfigName, ...companions, ...(adapter ? ['README.md'] : [])].includes(name)

const bytesOf = (tensors: readonly TensorEntry[]): number => tensors.reduce((sum, { bytes }) => sum + bytes, 0)

const configText = (config: Record<string, unknown>): string => `${stringifyJson(config, { floats: floatFields })}\n`

async function saveFolder(
  target: string,
  { needed, overwrite, signal }: { needed: number; overwrite: boolean; signal?: AbortSignal | undefined },
  write: (temporary: string) => Promise<SavedFile[]>,
): Promise<SavedFile[]> {
  const parent = dirname(resolve(target))
  await mkdir(parent, { recursive: true }).catch(async (error) => {
    throw await writeFailure(error, parent, needed)
  })
  await requireSpace(parent, needed)
  const temporary = temporaryName(target)
  try {
    await mkdir(temporary)
    const saved = await write(temporary)
    signal?.throwIfAborted()
    await replaceFolder(temporary, target, { overwrite })
    return saved
  } catch (error) {
    await rm(temporary, { recursive: true, force: true })
    throw await writeFailure(error, target, needed)
  }
}

async function writeTexts(dir: string, texts: readonly [string, string][]): Promise<SavedFile[]> {
  const saved: SavedFile[] = []
  for (const [name, text] of texts) {
    const bytes = Buffer.from(text)
    await writeNewFile(join(dir, name), bytes)
    saved.push({ name, bytes: bytes.length, sha256: sha256(bytes) })
  }
  return saved
}

async function writeWeights(
  dir: string,
  tensors: TensorEntry[],
  metadata: [string, string][],
  maxShardBytes: number,
  signal?: AbortSignal,
): Promise<SavedFile[]> {
  const shards = splitShards(tensors, maxShardBytes)
  const saved: SavedFile[] = []
  const map = new Map<string, string>()
  for (const [i, shard] of shards.entries()) {
    const number = (n: number): string => String(n).padStart(5, '0')
    const name = shards.length === 1 ? singleName : `model-${number(i + 1)}-of-${number(shards.length)}.safetensors`
    for (const tensor of shard) {
      if (map.has(tensor.name)) throw new RangeError(`tensor ${quote(tensor.name)} is given twice`)
      map.set(tensor.name, name)
    }
    saved.push({ name, ...(await writeSafetensors(join(dir, name), shard, metadata, { sync: true, signal })) })
  }
  if (shards.length === 1) return saved
  const weightMap = Object.fromEntries([...map].sort(([a], [b]) => (a < b ? -1 : 1)))
  const total = tensors.reduce((sum, tensor) => sum + tensor.bytes, 0)
  const bytes = Buffer.from(`${stringifyJson({ metadata: { total_size: total }, weight_map: weightMap })}\n`)
  await writeNewFile(join(dir, indexName), bytes)
  saved.push({ name: indexName, bytes: bytes.length, sha256: sha256(bytes) })
  return saved
}

/** In the given order, each shard filled up to the limit; a tensor beyond it has a shard of its own. */
function splitShards(tensors: TensorEntry[], maxShardBytes: number): TensorEntry[][] {
  const shards: TensorEntry[][] = []
  let shard: TensorEntry[] = []
  let size = 0
  for (const tensor of tensors) {
    if (shard.length > 0 && size + tensor.bytes > maxShardBytes) {
      shards.push(shard)
      shard = []
      size = 0
    }
    shard.push(tensor)
    size += tensor.bytes
  }
  return [...shards, shard]
}

async function findCompanions(copyFrom: string): Promise<{ name: string; path: string }[]> {
  const root = await realFolder(copyFrom)
  const names = new Set(await readdir(root))
  const found = companions.filter((name) => names.has(name))
  return Promise.all(found.map(async (name) => ({ name, path: await containedFile(root, name, join(copyFrom, name)) })))
}

async function copyDurable(path: string, dir: string, name: string): Promise<SavedFile> {
  const bytes = await readSmallFile(path, maxCompanionBytes)
  await writeNewFile(join(dir, name), bytes)
  return { name, bytes: bytes.length, sha256: sha256(bytes) }
}

function sha256(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex')
}
