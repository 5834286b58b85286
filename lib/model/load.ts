import { type FileHandle, open } from 'node:fs/promises'
import { didYouMean, quote, RopewalkError } from '../errors.js'
import type { ModelFolder } from '../files/folder.js'
import type { RopeExtension } from '../rope.js'
import type { FileDType } from '../runtime/device.js'
import { type LlamaConfig, parameterShapes } from './config.js'
import { notFinite } from './finite.js'
import type { Parameters } from './parameters.js'

export interface LoadOptions {
  /** 'auto' (default), 'cpu', 'cuda', 'cuda:1', 'simt' (tests) or 'dry' (plans only). */
  device?: string
  /** How weights are kept; default: as in the checkpoint (float16 becomes float32). Arithmetic is float32 on the CPU. */
  dtype?: 'float32' | 'bfloat16'
  /** Stretches the context, relative to what the checkpoint already says; 'none' drops the checkpoint's scaling. */
  rope?: RopeExtension | 'none'
  /** CPU threads; default: one for each core that this process may use. */
  threads?: number
  /** Called while weights are read. */
  onProgress?: (done: { bytes: number; totalBytes: number }) => void
}

/** Old checkpoints carry the rotation frequencies as tensors; they follow from the config. */
const DERIVED = /\.rotary_emb\.inv_freq$/

export function checkLoadOptions(path: string, options: LoadOptions): void {
  if (typeof path !== 'string' || path === '') throw new TypeError(`path must be a folder's name, is ${quote(path)}`)
  const known = ['device', 'dtype', 'rope', 'threads', 'onProgress']
  for (const key of Object.keys(options)) {
    if (!known.includes(key)) {
      throw new TypeError(`unknown option ${quote(key)}${didYouMean(key, known)}; known are ${known.join(', ')}`)
    }
  }
  const { dtype } = options
  if (dtype !== undefined && dtype !== 'float32' && dtype !== 'bfloat16') {
    throw new RangeError(`dtype is ${quote(dtype)}, but must be "float32" or "bfloat16"`)
  }
}

/** Every parameter is there with its dims, and nothing is that would be ignored. */
export function checkTensors(folder: ModelFolder, config: LlamaConfig, path: string, warnings: string[]): void {
  const fail = (message: string): never => {
    throw new RopewalkError('ERR_TENSORS', message)
  }
  const shapes = parameterShapes(config)
  for (const { name, dims } of shapes) {
    const tensor = folder.tensors.get(name)
    if (!tensor)
      fail(
        `${path}: ${name} (${dims.join(',')}) is missing: the checkpoint is incomplete, or config.json is another model's`,
      )
    else if (tensor.dims.join() !== dims.join()) {
      fail(`${tensor.path}: ${name} is (${tensor.dims.join(',')}), but config.json makes it (${dims.join(',')})`)
    } else if (!['F32', 'BF16', 'F16', 'F64'].includes(tensor.dtype)) {
      fail(`${tensor.path}: ${name} has dtype ${tensor.dtype}; weights must be F32, BF16, F16 or F64`)
    }
  }
  const expected = new Set(shapes.map(({ name }) => name))
  for (const [name, tensor] of folder.tensors) {
    if (expected.has(name) || DERIVED.test(name)) continue
    if (config.tied && name === 'lm_head.weight') {
      warnings.push('lm_head.weight is in the file although tie_word_embeddings is true; the embedding is used instead')
      continue
    }
    fail(`${tensor.path}: ${name} is no parameter of this model: ignoring it would change what the model computes`)
  }
}

/** What the weights are kept as unless the caller says otherwise; float16 has no storage here and is widened. */
export function checkpointDtype(folder: ModelFolder): 'float32' | 'bfloat16' {
  for (const tensor of folder.tensors.values()) if (tensor.dtype !== 'BF16') return 'float32'
  return 'bfloat16'
}

/** Reads every parameter of the model from the folder's files straight into device memory; refuses NaN and infinity. */
export async function readWeights(
  folder: ModelFolder,
  weights: Parameters,
  onProgress: LoadOptions['onProgress'],
): Promise<void> {
  const { device } = weights
  const wanted = [...weights]
  const totalBytes = wanted.reduce((sum, { name }) => sum + folder.tensors.get(name)!.bytes, 0)
  let bytes = 0
  const files = new Map<string, FileHandle>()
  try {
    for (const { name, value } of wanted) {
      const tensor = folder.tensors.get(name)!
      try {
        let file = files.get(tensor.path)
        if (!file) files.set(tensor.path, (file = await open(tensor.path)))
        const bad = await device.read(value, file.fd, tensor.offset, tensor.dtype as FileDType)
        if (bad >= 0) throw await notFinite(tensor.path, name, value, bad, device)
      } catch (error) {
        if (error instanceof RopewalkError) throw error
        throw new RopewalkError('ERR_READ', `${tensor.path}: ${name}: ${(error as Error).message}`)
      }
      bytes += tensor.bytes
      onProgress?.({ bytes, totalBytes })
    }
  } finally {
    for (const file of files.values()) await file.close()
  }
  await weights.clearPadding()
}
