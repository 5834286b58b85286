import { type FileHandle, open } from 'node:fs/promises'
import { didYouMean, quote, RopewalkError } from '../errors.js'
import type { FolderTensor, ModelFolder } from '../files/folder.js'
import type { RopeExtension } from '../rope.js'
import { type Buffer, Device, type FileDType } from '../runtime/device.js'
import { DTYPE_BYTES, isQuantized, type QuantizedDType, Tensor } from '../runtime/tensor.js'
import { type LlamaConfig, parameterShapes } from './config.js'
import { notFinite } from './finite.js'
import { Parameters } from './parameters.js'
import { quantizeFrom } from './values.js'

/**
 * Options of {@link Llama.load}.
 *
 * @category Models
 */
export interface LoadOptions {
  /** 'auto' (default), 'cpu', 'cuda', 'cuda:1', 'simt' (tests), or 'dry' and 'dry:cuda' (plans only). */
  device?: string
  /** How weights are kept; default: as in the checkpoint (float16 becomes float32). Arithmetic is float32 on the CPU. */
  dtype?: 'float32' | 'bfloat16'
  /**
   * How a CPU keeps activations beside bfloat16 weights: 'float32' (default), more exact, or 'bfloat16', as a GPU does and
   * transformers everywhere: faster where the processor multiplies bfloat16 (AMX), and for models that are not trained.
   */
  activations?: 'float32' | 'bfloat16'
  /** Stretches the context, relative to what the checkpoint already says; 'none' drops the checkpoint's scaling. */
  rope?: RopeExtension | 'none'
  /** CPU threads; default: one for each core that this process may use. */
  threads?: number
  /**
   * Whether weights may be used in place, in the page cache, where the device can and the files have them as they are
   * kept (default true): loading then copies nothing, and memory is taken when they are first to be changed. The files
   * may be replaced or deleted, but calls reject with ERR_FILE_CHANGED once one is modified in place. false reads them.
   */
  map?: boolean
  /**
   * Folder of a LoRA adapter that PEFT or `saveAdapter` wrote for this model. Where it says which positions it was
   * trained with (its config.json), they hold unless `rope` is given; of another base it is refused with ERR_CONFIG.
   */
  adapter?: string
  /**
   * Keeps the matrices of the blocks (q, k, v, o, gate, up, down) in fewer bits, as the frozen base of an adapter: QLoRA
   * (arXiv 2305.14314). 'nf4': 4.13 bits a weight; 'int8': 8.5. They are rounded one after the other while they are read,
   * from the checkpoint's own values, and dequantised inside of products. The rest is kept as `dtype` says.
   */
  quantize?: 'nf4' | 'int8'
  /** Called while weights are read or checked, with the bytes of the files' tensors. */
  onProgress?: (done: { bytes: number; totalBytes: number }) => void
}

/** Old checkpoints carry the rotation frequencies as tensors; they follow from the config. */
const DERIVED = /\.rotary_emb\.inv_freq$/

export function checkLoadOptions(path: string, options: LoadOptions): void {
  if (typeof path !== 'string' || path === '') throw new TypeError(`path must be a folder's name, is ${quote(path)}`)
  const known = ['device', 'dtype', 'activations', 'rope', 'threads', 'map', 'adapter', 'quantize', 'onProgress']
  for (const key of Object.keys(options)) {
    if (!known.includes(key)) {
      throw new TypeError(`unknown option ${quote(key)}${didYouMean(key, known)}; known are ${known.join(', ')}`)
    }
  }
  const { dtype, map, adapter, quantize } = options
  checkQuantize(quantize)
  if (adapter !== undefined && (typeof adapter !== 'string' || adapter === '')) {
    throw new TypeError(`adapter is ${quote(adapter)}, but must be a folder's name`)
  }
  if (map !== undefined && typeof map !== 'boolean')
    throw new TypeError(`map is ${quote(map)}, but must be true or false`)
  if (dtype !== undefined && dtype !== 'float32' && dtype !== 'bfloat16') {
    throw new RangeError(`dtype is ${quote(dtype)}, but must be "float32" or "bfloat16"`)
  }
}

/** Opens the device of a model whose weights are kept as `dtype`. */
export function openFor(dtype: 'float32' | 'bfloat16', { device: name, threads, activations }: LoadOptions): Device {
  const device = Device.open(name, { ...(threads !== undefined && { threads }), ...(activations && { activations }) })
  if (!activations || (activations === 'float32' ? !device.gpu : dtype === 'bfloat16')) return device
  const why = device.gpu
    ? `a GPU keeps them as weights (${dtype})`
    : 'weights are float32, for which they are too coarse'
  device.dispose()
  throw new RangeError(`activations is "${activations}", but ${why}: leave the option out`)
}

export function checkQuantize(quantize: unknown): asserts quantize is QuantizedDType | undefined {
  if (quantize === undefined || isQuantized(quantize as QuantizedDType)) return
  throw new RangeError(`quantize is ${quote(quantize)}, but must be "nf4" or "int8"`)
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

/** Where a parameter is. */
type Place = FolderTensor & { name: string }

const FILE_DTYPE = { f32: 'F32', bf16: 'BF16' } as const

/** Bytes of a mapped file that one call checks; a call for each tensor would take longer. */
const CHECKED = 64 << 20

/** The model's weights on a device: used in place where that can be done, else read. Refuses NaN and infinity. */
export async function loadWeights(
  folder: ModelFolder,
  config: LlamaConfig,
  device: Device,
  dtype: 'f32' | 'bf16',
  { map = true, quantize: quantization, onProgress }: LoadOptions,
): Promise<Parameters> {
  const shapes = parameterShapes(config)
  if (device.dry) return new Parameters(device, dtype, shapes, { quantization })
  const places = shapes.map(({ name }) => ({ name, ...folder.tensors.get(name)! }))
  const totalBytes = places.reduce((sum, place) => sum + place.bytes, 0)
  let bytes = 0
  const progress = (more: number): void => onProgress?.({ bytes: (bytes += more), totalBytes })
  const files = map ? await mapTensors(places, device, dtype) : undefined
  const weights = new Parameters(device, dtype, shapes, { files, quantization })
  if (!files) await readWeights(places, weights, progress)
  else {
    await checkMapped(places, files, weights, progress)
    for (const { name, value } of weights) {
      if (isQuantized(value.dtype)) await quantizeFrom(device, files.get(name)!, value)
    }
  }
  return weights
}

/** The parameters as they lie in their files; undefined where not all of them can be used there. */
async function mapTensors(places: Place[], device: Device, dtype: 'f32' | 'bf16') {
  const files = new Map<string, Buffer>()
  const tensors = new Map<string, Tensor>()
  for (const { name, path, dtype: fileDtype, offset, bytes, dims } of places) {
    const usable = fileDtype === FILE_DTYPE[dtype] && offset % DTYPE_BYTES[dtype] === 0
    const file = usable ? (files.get(path) ?? (await mapFile(device, path))) : undefined
    if (file) files.set(path, file)
    // Also where the file is shorter by now, or gone: reading it says so.
    if (!file || file.bytes < offset + bytes) {
      for (const mapped of files.values()) mapped.dispose()
      return undefined
    }
    tensors.set(name, new Tensor(file, offset, dtype, dims))
  }
  return tensors
}

async function mapFile(device: Device, path: string): Promise<Buffer | undefined> {
  const file = await open(path).catch(() => undefined)
  try {
    return file && device.map(file.fd, path)
  } finally {
    await file?.close()
  }
}

/** Looks through mapped weights for NaN and infinity, many tensors at a time: those that follow each other in a file. */
async function checkMapped(
  places: Place[],
  files: ReadonlyMap<string, Tensor>,
  weights: Parameters,
  progress: (bytes: number) => void,
): Promise<void> {
  const { device, dtype } = weights
  const order = (a: Place, b: Place): number => (a.path === b.path ? a.offset - b.offset : a.path < b.path ? -1 : 1)
  const pieces: { path: string; from: number; to: number; places: Place[] }[] = []
  for (const place of places.toSorted(order)) {
    const { path, offset, bytes } = place
    const piece = pieces.at(-1)
    if (piece?.path === path && piece.to === offset && piece.to - piece.from < CHECKED) {
      piece.to += bytes
      piece.places.push(place)
    } else pieces.push({ path, from: offset, to: offset + bytes, places: [place] })
  }
  for (const { path, from, to, places: inside } of pieces) {
    const { storage } = files.get(inside[0]!.name)!
    const bad = await device.findNotFinite(new Tensor(storage, from, dtype, [(to - from) / DTYPE_BYTES[dtype]]))
    if (bad >= 0) {
      const at = from + bad * DTYPE_BYTES[dtype]
      const { name, offset } = inside.findLast((place) => place.offset <= at)!
      throw await notFinite(path, name, files.get(name)!, (at - offset) / DTYPE_BYTES[dtype], device)
    }
    progress(to - from)
  }
}

/** Reads the weights straight into device memory; those that are to be quantised by way of a place for the largest. */
async function readWeights(places: Place[], weights: Parameters, progress: (bytes: number) => void): Promise<void> {
  const { device } = weights
  const files = new Map<string, FileHandle>()
  const stageDtype = (of: string): 'f32' | 'bf16' => (of === 'BF16' ? 'bf16' : 'f32')
  const staged = places.filter(({ name }) => isQuantized(weights.get(name).value.dtype))
  const stageBytes = staged.map(({ name, dtype }) => weights.get(name).value.size * DTYPE_BYTES[stageDtype(dtype)])
  const stage = staged.length > 0 ? device.alloc(Math.max(...stageBytes), 'a matrix to be quantised') : undefined
  try {
    for (const { name, path, dtype, offset, bytes } of places) {
      const { value: own } = weights.get(name)
      const isStaged = isQuantized(own.dtype)
      const value = isStaged ? new Tensor(stage!, 0, stageDtype(dtype), own.dims) : own
      try {
        let file = files.get(path)
        if (!file) files.set(path, (file = await open(path)))
        const bad = await device.read(value, file.fd, offset, dtype as FileDType)
        if (bad >= 0) throw await notFinite(path, name, value, bad, device)
        if (isStaged) await quantizeFrom(device, value, own)
      } catch (error) {
        if (error instanceof RopewalkError) throw error
        throw new RopewalkError('ERR_READ', `${path}: ${name}: ${(error as Error).message}`)
      }
      progress(bytes)
    }
  } finally {
    stage?.dispose()
    for (const file of files.values()) await file.close()
  }
  await weights.clearPadding()
}
