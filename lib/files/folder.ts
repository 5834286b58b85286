import { lstat, readdir, realpath, stat } from 'node:fs/promises'
import { basename, dirname, join, sep } from 'node:path'
import { didYouMean, quote, RopewalkError } from '../errors.js'
import { leftAside } from './durable.js'
import { isObject, type JsonObject, readJsonObject } from './json.js'
import { type Dtype, openSafetensors, pickleError, type SafetensorsFile, type TensorInfo } from './safetensors.js'

/** Hugging Face model folders, read: config.json, one safetensors file or shards with an index, a tokenizer. */

export type FolderTensor = { path: string; dtype: Dtype; dims: number[]; offset: number; bytes: number }

export type ModelFolder = {
  dir: string
  /** config.json as parsed, keys in their order, numbers with their spelling. */
  config: JsonObject
  /** Where each tensor lies: `path` of the real file, `offset` and `bytes` absolute in bytes. */
  tensors: Map<string, FolderTensor>
  /** safetensors metadata of the first file. */
  metadata: Map<string, string>
  generationConfig?: JsonObject
  tokenizerPath?: string
  hasChatTemplate: boolean
  warnings: string[]
  /** The bytes of one tensor, copied out of its file. */
  read(name: string): Promise<Uint8Array>
  close(): Promise<void>
}

const maxConfigBytes = 16 << 20
const maxIndexBytes = 100_000_000
export const indexName = 'model.safetensors.index.json'
export const singleName = 'model.safetensors'
export const pickleNames = /\.(bin|pt|pth|ckpt|pkl|pickle)$/i

/** Opens a folder and checks everything that can be checked without reading a weight. Throws RopewalkError. */
export async function openModelFolder(dir: string): Promise<ModelFolder> {
  const root = await realFolder(dir)
  const names = new Set(await readdir(root))
  if (!names.has('config.json')) {
    throw new RopewalkError(
      'ERR_NOT_FOUND',
      `${dir}: no config.json${didYouMean('config.json', names)}: a Hugging Face model folder is expected ` +
        '(config.json, model.safetensors, tokenizer.json)',
    )
  }
  const config = await readConfig(dir, root, 'config.json')
  const generationConfig = names.has('generation_config.json')
    ? await readConfig(dir, root, 'generation_config.json')
    : undefined
  const files: SafetensorsFile[] = []
  const close = async (): Promise<void> => {
    await Promise.all(files.map((file) => file.close()))
  }
  try {
    const warnings: string[] = []
    const tensors = new Map<string, FolderTensor>()
    const owners = new Map<string, SafetensorsFile>()
    const add = (file: SafetensorsFile, { name, dtype, dims, offset, bytes }: TensorInfo): void => {
      tensors.set(name, { path: file.path, dtype, dims, offset, bytes })
      owners.set(name, file)
    }
    if (names.has(singleName)) {
      if (names.has(indexName)) warnings.push(`${dir}: both ${singleName} and ${indexName}: the single file is used`)
      const path = join(dir, singleName)
      files.push(await openSafetensors(await containedFile(root, singleName, path), path))
      for (const tensor of files[0].tensors.values()) add(files[0], tensor)
    } else if (names.has(indexName)) {
      await openShards(dir, root, files, add)
    } else throw noWeights(dir, names)
    const pickles = [...names].filter((name) => pickleNames.test(name))
    if (pickles.length > 0) warnings.push(`${dir}: ${pickles.join(', ')}: pickle files are never read`)
    const tokenizerPath = names.has('tokenizer.json')
      ? await containedFile(root, 'tokenizer.json', join(dir, 'tokenizer.json'))
      : undefined
    const hasChatTemplate = await findChatTemplate(dir, root, names)
    const read = async (name: string): Promise<Uint8Array> => {
      const owner = owners.get(name)
      if (owner === undefined)
        throw new RangeError(`${dir}: no tensor ${quote(name)}${didYouMean(name, owners.keys())}`)
      return owner.read(name)
    }
    const metadata = files[0]?.metadata ?? new Map<string, string>()
    return { dir, config, tensors, metadata, generationConfig, tokenizerPath, hasChatTemplate, warnings, read, close }
  } catch (error) {
    await close()
    throw error
  }
}

/** The folder's real path; a missing one, or a file in its place, is an error that says what to do. */
export async function realFolder(dir: string): Promise<string> {
  const info = await stat(dir).catch((cause: NodeJS.ErrnoException) => {
    if (cause.code !== 'ENOENT')
      throw new RopewalkError('ERR_READ', `${dir}: cannot be read (${cause.message})`, { cause })
    return undefined
  })
  if (info === undefined) {
    const aside = await leftAside(dir)
    const hint =
      aside.length > 0
        ? `a save was interrupted and the model stands complete in ${aside.join(', ')}: rename it back`
        : 'check the path, or download the model first'
    throw new RopewalkError('ERR_NOT_FOUND', `${dir}: no such folder: ${hint}`)
  }
  if (!info.isDirectory()) {
    throw new RopewalkError('ERR_NOT_A_FOLDER', `${dir}: a file, but a model folder is expected: give ${dirname(dir)}`)
  }
  return realpath(dir)
}

/**
 * The real path of `name` in the folder `root`. A link may lead to a regular file inside the folder, or, where the
 * folder is a snapshot of the Hugging Face cache (models--*\/snapshots/<revision>), to a blob of that model
 * (models--*\/blobs/<hash>), which is how that cache is laid out. Every other way out of the folder is refused.
 */
export async function containedFile(root: string, name: string, shownPath: string): Promise<string> {
  const path = join(root, name)
  const real = await realpath(path).catch((cause: NodeJS.ErrnoException) => {
    const what = cause.code === 'ENOENT' ? 'does not exist, or is a link to nothing: download it again' : cause.message
    throw new RopewalkError('ERR_NOT_FOUND', `${shownPath}: ${what}`, { cause })
  })
  if (!real.startsWith(root + sep) && dirname(real) !== blobsOf(root)) {
    throw new RopewalkError(
      'ERR_PATH',
      `${shownPath}: a link to ${real}, outside the model folder: copy the file into the folder`,
    )
  }
  const info = await lstat(real)
  if (!info.isFile()) throw new RopewalkError('ERR_NOT_A_FILE', `${shownPath}: not a regular file`)
  return real
}

function blobsOf(root: string): string | undefined {
  const snapshots = dirname(root)
  const model = dirname(snapshots)
  if (basename(snapshots) !== 'snapshots' || !basename(model).startsWith('models--')) return undefined
  return join(model, 'blobs')
}

export async function readConfig(dir: string, root: string, name: string): Promise<JsonObject> {
  const shownPath = join(dir, name)
  const path = await containedFile(root, name, shownPath)
  return readJsonObject(path, { python: true, maxBytes: maxConfigBytes, shownPath })
}

async function openShards(
  dir: string,
  root: string,
  files: SafetensorsFile[],
  add: (file: SafetensorsFile, tensor: TensorInfo) => void,
): Promise<void> {
  const indexPath = join(dir, indexName)
  const index = await readJsonObject(await containedFile(root, indexName, indexPath), {
    maxBytes: maxIndexBytes,
    shownPath: indexPath,
    python: true,
  })
  const map = index.weight_map
  if (!isObject(map)) {
    throw new RopewalkError('ERR_INDEX', `${indexPath}: weight_map: ${quote(map)}, but it must map tensors to files`)
  }
  const shards = new Map<string, Set<string>>()
  for (const [tensor, file] of Object.entries(map)) {
    const shard = shardName(file, tensor, indexPath)
    const members = shards.get(shard)
    if (members === undefined) shards.set(shard, new Set([tensor]))
    else members.add(tensor)
  }
  for (const [shard, members] of shards) {
    const path = join(dir, shard)
    const real = await containedFile(root, shard, path).catch((cause) => {
      if (cause.code !== 'ERR_NOT_FOUND') throw cause
      throw new RopewalkError('ERR_NOT_FOUND', `${path}: missing, but ${indexName} names it: download the shard`, {
        cause,
      })
    })
    const file = await openSafetensors(real, path)
    files.push(file)
    for (const tensor of file.tensors.values()) {
      if (!members.has(tensor.name)) {
        const where =
          typeof map[tensor.name] === 'string' ? `puts it in ${quote(map[tensor.name])}` : 'does not list it'
        throw new RopewalkError(
          'ERR_INDEX',
          `${path}: holds tensor ${quote(tensor.name)}, but ${indexName} ${where}: the files are of different models`,
        )
      }
      add(file, tensor)
    }
    for (const name of members) {
      if (!file.tensors.has(name)) {
        throw new RopewalkError(
          'ERR_INDEX',
          `${path}: tensor ${quote(name)} is missing, but ${indexName} puts it there: the files are of different models`,
        )
      }
    }
  }
}

/** A shard is a plain file name: with a path in it an index could name any file of the machine. */
function shardName(value: unknown, tensor: string, indexPath: string): string {
  const at = `${indexPath}: weight_map: ${quote(tensor)}: ${quote(value)}`
  if (typeof value !== 'string') throw new RopewalkError('ERR_INDEX', `${at}, but it must be a file name`)

  if (value === '' || value === '.' || value === '..' || /[/\\:\0]/.test(value)) {
    throw new RopewalkError('ERR_PATH', `${at} is not a plain file name: shards lie in the model folder itself`)
  }
  if (pickleNames.test(value)) throw pickleError(at)
  if (!value.endsWith('.safetensors')) {
    throw new RopewalkError('ERR_INDEX', `${at} does not end in .safetensors: shards are safetensors files`)
  }
  return value
}

function noWeights(dir: string, names: Set<string>): RopewalkError {
  if (names.has('adapter_config.json')) {
    return new RopewalkError(
      'ERR_NOT_FOUND',
      `${dir}: an adapter, not a model: give the model that it was trained for, and this folder as its adapter`,
    )
  }
  const pickles = [...names].filter((name) => pickleNames.test(name) || name.endsWith('.bin.index.json'))
  if (pickles.length > 0) return pickleError(join(dir, pickles[0]))
  const others = [...names].filter((name) => name.endsWith('.safetensors') || name.endsWith('.gguf'))
  const found = others.length > 0 ? `; it has ${others.slice(0, 3).join(', ')}` : ''
  return new RopewalkError(
    'ERR_NOT_FOUND',
    `${dir}: neither ${singleName} nor ${indexName}${found}: download the weights, or rename the single file`,
  )
}

async function findChatTemplate(dir: string, root: string, names: Set<string>): Promise<boolean> {
  if (names.has('chat_template.jinja') || names.has('chat_template.json')) return true
  if (!names.has('tokenizer_config.json')) return false
  const config = await readConfig(dir, root, 'tokenizer_config.json')
  return config.chat_template !== undefined && config.chat_template !== null
}
