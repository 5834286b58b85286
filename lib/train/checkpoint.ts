import { type FileHandle, mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises'
import { basename, dirname, join, resolve } from 'node:path'
import { quote, RopewalkError } from '../errors.js'
import { decodeUtf8, readSmallFile } from '../files/bytes.js'
import {
  fsyncDir,
  replaceFolder,
  requireSpace,
  sha256File,
  temporaryName,
  writeFailure,
  writeNewFile,
} from '../files/durable.js'
import { openAdapterFolder } from '../files/adapter.js'
import { openModelFolder } from '../files/folder.js'
import { isObject, type JsonValue, parseJson } from '../files/json.js'
import { openSafetensors, type TensorEntry, writeSafetensors } from '../files/safetensors.js'
import { saveAdapterFolder, saveModelFolder } from '../files/save.js'
import { writeConfig } from '../model/config.js'
import type { Llama } from '../model/llama.js'
import type { Lora } from '../model/lora.js'
import type { Parameters } from '../model/parameters.js'
import { readAdapterTensors, writeAdapter } from '../model/peft.js'
import type { Device, FileDType } from '../runtime/device.js'
import { type PlainDType, Tensor } from '../runtime/tensor.js'
import type { DataCursor } from './data.js'
import type { AdamW } from './optimizer.js'

/**
 * A checkpoint is a Hugging Face folder `checkpoint-000123` that Llama.load takes as it is (of a run that trains an
 * adapter: the adapter, as PEFT has it), and beside the model
 *
 *   trainer.safetensors   moments and masters as they are kept: m.<parameter>, v.<parameter>, master.<parameter> ...
 *   trainer.json          step, counters, options that decide the run, place in the data
 *   checksums.json        size and SHA-256 of every other file
 *
 * It is written into a temporary folder, every file fsynced, then renamed; an older one is deleted only after the new
 * one has been read back. So at any moment there is a whole one on the disk. An fsync that fails is never tried again.
 */
export interface TrainerRecord {
  version: 1
  step: number
  /** Updates applied: t of the bias corrections. */
  applied: number
  skipped: number
  skippedInARow: number
  tokens: number
  /** What decides the run beside model and data. */
  options: Record<string, JsonValue>
  /** What decides the model beside its weights. */
  model: Record<string, JsonValue>
  data: { hash: string; tokenizer: string; cursor: DataCursor } | null
}

const NAME = /^checkpoint-(\d{6,12})$/
const LEFTOVER = /^checkpoint-\d{6,12}\.(tmp|old)-/
const STATE = 'trainer.safetensors'
const RECORD = 'trainer.json'
const SUMS = 'checksums.json'
const MAX_JSON = 16 << 20

type Sums = Record<string, { bytes: number; sha256: string }>

export const checkpointName = (step: number): string => `checkpoint-${String(step).padStart(6, '0')}`

/** Bytes of a checkpoint, but for headers and the tokenizer. */
export function checkpointBytes(weights: Parameters, lora: Lora | undefined, optimizer: AdamW): number {
  return (lora ? lora.savedBytes : weights.bytes) + optimizer.stateBytes
}

/** Checkpoints in a folder, the newest first; healthy or not. */
export async function listCheckpoints(output: string): Promise<{ path: string; step: number }[]> {
  const names = await readdir(output).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return []
    throw error
  })
  const found = names.flatMap((name) => {
    const step = NAME.exec(name)?.[1]
    return step === undefined ? [] : [{ path: join(output, name), step: Number(step) }]
  })
  return found.sort((a, b) => b.step - a.step)
}

/** Removes what a run that was killed in the middle of a save has left; what cannot be deleted now is left once more. */
export async function removeLeftovers(output: string): Promise<void> {
  const names = await readdir(output).catch(() => [])
  for (const name of names) {
    if (LEFTOVER.test(name)) await rm(join(output, name), { recursive: true, force: true }).catch(() => undefined)
  }
}

/**
 * Writes the checkpoint of `record.step` and reads it back. The model must be at rest. `companions` is the folder with
 * the tokenizer, if there is one. Throws RopewalkError ERR_NOT_FINITE (nothing is written), ERR_NO_SPACE, ERR_WRITE, ERR_CHECKPOINT;
 * earlier checkpoints are then as they were.
 */
export async function writeCheckpoint(
  output: string,
  model: Llama,
  optimizer: AdamW,
  record: TrainerRecord,
  companions: string | undefined,
): Promise<string> {
  const target = join(output, checkpointName(record.step))
  await model.requireFinite()
  const needed = checkpointBytes(model.weights, model.lora, optimizer)
  await makeFolder(output, needed)
  await removeLeftovers(output)
  await requireSpace(output, needed)
  const temporary = temporaryName(target)
  const { device, weights, config, dtype, lora } = model
  const sums: Sums = {}
  try {
    const saved = lora
      ? await saveAdapterFolder(temporary, writeAdapter(lora, config, dtype, model.path))
      : await saveModelFolder(temporary, {
          config: writeConfig(config, dtype),
          tensors: Array.from(weights, ({ name, value }) => ({
            name,
            dtype: dtype === 'float32' ? 'F32' : 'BF16',
            dims: [...value.dims],
            bytes: value.bytes,
            data: () => device.downloadChunks(value),
          })),
          ...(companions !== undefined && { copyFrom: companions }),
        })
    for (const { name, bytes, sha256 } of saved) sums[name] = { bytes, sha256 }
    const entries: TensorEntry[] = Array.from(optimizer.entries(), ({ name, tensor }) => {
      const { bytes, dims, dtype } = tensor
      return {
        name,
        dtype: FILE_DTYPE[dtype as PlainDType],
        dims: [...dims],
        bytes,
        data: () => device.downloadChunks(tensor),
      }
    })
    sums[STATE] = await writeSafetensors(join(temporary, STATE), entries, [], { sync: true })
    const text = Buffer.from(`${JSON.stringify(record, undefined, 2)}\n`)
    await writeNewFile(join(temporary, RECORD), text)
    sums[RECORD] = { bytes: text.length, sha256: await sha256File(join(temporary, RECORD)) }
    await writeNewFile(join(temporary, SUMS), Buffer.from(sumsText(sums)))
    await replaceFolder(temporary, target, { overwrite: true })
  } catch (error) {
    await rm(temporary, { recursive: true, force: true })
    throw await writeFailure(error, target, needed)
  }
  await verifyCheckpoint(target)
  return target
}

/** Makes the folder of checkpoints, durably, and says whether it was not there; `needed` bytes are for the message. */
export async function makeFolder(output: string, needed: number): Promise<boolean> {
  try {
    const made = await mkdir(output, { recursive: true })
    if (made !== undefined) await fsyncDir(dirname(resolve(output)))
    return made !== undefined
  } catch (error) {
    throw await writeFailure(error, output, needed)
  }
}

const FILE_DTYPE: Readonly<Record<PlainDType, TensorEntry['dtype']>> = {
  f32: 'F32',
  bf16: 'BF16',
  i32: 'I32',
  u8: 'U8',
  u16: 'U16',
}

/** Fills a tensor with the bytes of a file as they are. */
async function readBytes(device: Device, file: FileHandle, offset: number, tensor: Tensor): Promise<void> {
  const chunk = new Uint8Array(Math.min(tensor.bytes, 16 << 20))
  for (let at = 0; at < tensor.bytes; at += chunk.length) {
    const length = Math.min(chunk.length, tensor.bytes - at)
    const { bytesRead } = await file.read(chunk, 0, length, offset + at)
    if (bytesRead !== length)
      throw new RopewalkError('ERR_CHECKPOINT', `${STATE} ends early: it changed while it was read`)
    await device.upload(new Tensor(tensor.storage, tensor.offset + at, 'u8', [length]), chunk.subarray(0, length))
  }
}

/** The one text that these sums have: any other spelling is damage. */
function sumsText(files: Sums): string {
  return `${JSON.stringify({ version: 1, files }, undefined, 2)}\n`
}

/**
 * Deletes checkpoints beyond the newest `keep` healthy ones. `healthy` remembers those that were read back, so that
 * each is read once; damaged ones do not count and go when they are older than all that stay. A deletion that fails is a
 * warning: the new checkpoint is safe, and the next save tries again.
 */
export async function pruneCheckpoints(
  output: string,
  keep: number,
  healthy: Set<string>,
  warn: (message: string) => void,
): Promise<void> {
  let kept = 0
  for (const { path } of await listCheckpoints(output)) {
    if (kept >= keep) {
      // Out of sight first: a deletion that is cut short must not look like a damaged checkpoint.
      const aside = temporaryName(path, 'old')
      healthy.delete(path)
      try {
        await rename(path, aside)
        await rm(aside, { recursive: true, force: true })
      } catch (error) {
        warn(`${path}: this old checkpoint could not be deleted (${(error as Error).message})`)
      }
      continue
    }
    if (!healthy.has(path) && !(await damage(path))) healthy.add(path)
    if (healthy.has(path)) kept++
  }
}

/** Reads every file of a checkpoint. Throws RopewalkError ERR_CHECKPOINT that names the one that is not as written. */
export async function verifyCheckpoint(path: string): Promise<TrainerRecord> {
  const fail = (name: string, what: string): never => {
    throw new RopewalkError('ERR_CHECKPOINT', `${join(path, name)}: ${what}: this checkpoint is damaged`)
  }
  const readJson = async (name: string): Promise<{ text: string; value: JsonValue }> => {
    try {
      const text = decodeUtf8(await readSmallFile(join(path, name), MAX_JSON), join(path, name))
      return { text, value: parseJson(text, join(path, name)) }
    } catch (error) {
      return fail(name, missing(error) ? 'is missing' : (error as Error).message)
    }
  }
  const { text, value } = await readJson(SUMS)
  const files = isObject(value) ? (value.files as Sums | undefined) : undefined
  if (typeof files !== 'object' || text !== sumsText(files)) return fail(SUMS, 'is not what was written')
  for (const name of ['config.json', STATE, RECORD])
    if (!Object.hasOwn(files, name)) fail(SUMS, `does not list ${name}`)
  for (const [name, { bytes, sha256 }] of Object.entries(files)) {
    if (!/^[\w.-]+$/.test(name)) fail(SUMS, `lists ${quote(name)}`)
    const file = join(path, name)
    const size = await stat(file).then(
      (info) => info.size,
      (error: unknown) => fail(name, missing(error) ? 'is missing' : (error as Error).message),
    )
    if (size !== bytes) fail(name, `has ${size} bytes, but ${bytes} were written`)
    // a disk that cannot give the bytes back has lost them
    const found = await sha256File(file).catch((error: Error) => fail(name, error.message))
    if (found !== sha256)
      fail(name, `its SHA-256 is ${found.slice(0, 16)}..., but ${String(sha256).slice(0, 16)}... was written`)
  }
  const record = (await readJson(RECORD)).value as unknown as TrainerRecord
  if (record.version !== 1)
    fail(RECORD, `format version ${quote(record.version)} is not one that this release reads (1)`)
  return record
}

const missing = (error: unknown): boolean => (error as NodeJS.ErrnoException).code === 'ENOENT'

/** Why a checkpoint cannot be used; undefined for a healthy one. */
async function damage(path: string): Promise<string | undefined> {
  try {
    await verifyCheckpoint(path)
    return undefined
  } catch (error) {
    return (error as Error).message
  }
}

/**
 * The checkpoint to go on from: `path` itself, or the newest healthy one in the folder `path`; undefined where a folder
 * has none at all. Damaged ones are passed over with a warning; if no healthy one is left, that is an error.
 */
export async function findCheckpoint(
  path: string,
  warn: (message: string) => void,
): Promise<{ path: string; record: TrainerRecord } | undefined> {
  if (NAME.test(basename(resolve(path)))) return { path, record: await verifyCheckpoint(path) }
  const reasons: string[] = []
  for (const checkpoint of await listCheckpoints(path)) {
    try {
      const record = await verifyCheckpoint(checkpoint.path)
      for (const reason of reasons) warn(`${reason}; going on from ${checkpoint.path} instead`)
      return { path: checkpoint.path, record }
    } catch (error) {
      if (!(error instanceof RopewalkError)) throw error
      reasons.push(error.message)
    }
  }
  if (reasons.length === 0) return undefined
  throw new RopewalkError('ERR_CHECKPOINT', `${path}: no healthy checkpoint is left. ${reasons.join('. ')}`)
}

/** Reads weights, moments and masters of a verified checkpoint into a model and an optimizer of the same layout. */
export async function readCheckpoint(path: string, model: Llama, optimizer: AdamW): Promise<void> {
  const { device } = model
  if (model.lora) await readAdapterTensors(await openAdapterFolder(path), model.lora, model.config.tied)
  else await readModel(path, model)
  const state = await openSafetensors(join(path, STATE))
  const file = await open(join(path, STATE))
  try {
    for (const { name, tensor } of optimizer.entries()) {
      const saved = state.tensors.get(name)
      if (!saved) throw new RopewalkError('ERR_CHECKPOINT', `${join(path, STATE)}: there is no ${name}`)
      await readBytes(device, file, saved.offset, tensor)
    }
  } finally {
    await file.close()
    await state.close()
  }
}

async function readModel(path: string, { device, weights }: Llama): Promise<void> {
  const folder = await openModelFolder(path)
  try {
    for (const { name, value } of weights) {
      const tensor = folder.tensors.get(name)
      if (!tensor) throw new RopewalkError('ERR_CHECKPOINT', `${path}: there is no ${name}`)
      const file = await open(tensor.path)
      try {
        await device.read(value, file.fd, tensor.offset, tensor.dtype as FileDType)
      } finally {
        await file.close()
      }
    }
  } finally {
    await folder.close()
  }
}
