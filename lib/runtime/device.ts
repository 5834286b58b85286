import { didYouMean, formatBytes, quote, RopewalkError } from '../errors.js'
import { type DeviceMemory, native } from './native.js'
import { DTYPE_CODE, type DType, type Storage, Tensor, tensorBytes } from './tensor.js'

/** Element types of files; integers stay integers, the others are converted to what the tensor holds. */
export type FileDType = 'F32' | 'BF16' | 'I32' | 'U8' | 'U16' | 'F16' | 'F64'
const FILE_DTYPE_CODE: Readonly<Record<FileDType, number>> = { F32: 0, BF16: 1, I32: 2, U8: 3, U16: 4, F16: 5, F64: 6 }

/** As in csrc/cuda/backend.cu: planning needs it where no GPU's library is. */
const CUDA_WORKSPACE = 32 << 20

/** Bytes in one call across the boundary: bounds the copy that is made on the way. */
const CHUNK = 16 << 20

/**
 * Options of {@link Device.open}.
 *
 * @category Devices and errors
 */
export interface DeviceOptions {
  /** CPU threads, 1 .. 1024; default: one for each core that this process may use. Results do not depend on it. */
  threads?: number
  /**
   * How a CPU keeps activations beside bfloat16 weights: in float32 (default), or in bfloat16 as a GPU does, which is
   * faster where the processor multiplies bfloat16 (AMX).
   */
  activations?: 'float32' | 'bfloat16'
}

/** A block of device memory, or a file that is used in place. `dispose()` frees it once no plan uses it any more. */
export class Buffer implements Storage {
  private alive = true
  private readonly id: number | undefined

  constructor(
    readonly device: Device,
    readonly bytes: number,
    readonly name: string,
    id: number | undefined,
    /** Whether this is a file, which is only read. */
    readonly mapped = false,
    /** Whether it is in the host's memory, not the device's own. */
    readonly host = false,
  ) {
    this.id = id
  }

  get handle(): number {
    if (!this.alive) throw new Error(`${this.name}: this buffer was disposed`)
    if (this.id === undefined) throw new Error(`${this.name}: the dry device plans, it holds no data`)
    return this.id
  }

  dispose(): void {
    if (!this.alive) return
    this.alive = false
    this.device.freed(this, this.id)
  }
}

/**
 * Where plans run: `cpu`; `cuda`, or `cuda:1` for the second GPU; `simt`, the CUDA kernels on the CPU, for tests; `auto`,
 * `cuda` where it can be used and else `cpu`; `dry` and `dry:cuda`, which record and plan as for those two, but allocate
 * and compute nothing.
 *
 * @category Devices and errors
 */
export class Device {
  /** Sum of the bytes allocated now, `workspaceBytes` included; on `dry`, of those that would be. */
  allocatedBytes: number
  /** The largest that `allocatedBytes` has been. */
  peakAllocatedBytes: number
  /** Sum of the bytes of pinned host memory allocated now; on `cpu` too, whose own memory is no other. */
  hostBytes = 0
  /** Bytes of files that are used in place: they are in the system's page cache, and not in `allocatedBytes`. */
  mappedBytes = 0
  private disposed = false

  private constructor(
    /** 'cpu', 'cuda', 'cuda:1', 'simt', 'dry' ... */
    readonly name: string,
    /** One line for people. */
    readonly description: string,
    private readonly id: number | undefined,
    /** CPU threads that were asked for; 0 for one for each core. */
    readonly threads = 0,
    /** Why `auto` is not a GPU. */
    readonly fallback?: string,
    /** Bytes that a GPU's operations share for what they need meanwhile; allocated as long as the device is open. */
    readonly workspaceBytes = 0,
    private readonly activations?: DeviceOptions['activations'],
  ) {
    this.allocatedBytes = this.peakAllocatedBytes = workspaceBytes
  }

  /**
   * @internal Dtype in which activations of a model with such weights are kept: on a GPU theirs, so that bf16 runs on
   * tensor cores; the CPU computes in f32 and stores them so, unless it was opened for bfloat16.
   */
  activationsFor(weights: DType): DType {
    return this.gpu || this.activations === 'bfloat16' ? weights : 'f32'
  }

  /** @internal A device that plans what this one would do. */
  planner(): Device {
    return Device.open(this.gpu ? 'dry:cuda' : 'dry')
  }

  /** @internal Whether it is, or plans for, a GPU. */
  get gpu(): boolean {
    return /^(dry:)?(cuda|simt)/.test(this.name)
  }

  /** Whether it only plans. */
  get dry(): boolean {
    return this.id === undefined
  }

  /**
   * Opens a device: one of the names above, `auto` by default. `Llama.load` does so itself; this is for asking what
   * there is.
   *
   * Throws RangeError for an unknown name, RopewalkError ERR_DEVICE_UNAVAILABLE with the reason and the remedy where it
   * cannot be opened, ERR_NO_ADDON, ERR_BAD_ADDON or ERR_STALE_ADDON where the native part cannot be loaded.
   */
  static open(name = 'auto', options: DeviceOptions = {}): Device {
    if (typeof name !== 'string') throw new TypeError(`device must be a string, is ${typeof name}`)
    const { threads = 0, activations } = options
    if (!Number.isInteger(threads) || threads < 0 || threads > 1024) {
      throw new RangeError(`threads is ${String(threads)}, but must be a whole number from 1 to 1024`)
    }
    if (activations !== undefined && activations !== 'float32' && activations !== 'bfloat16') {
      throw new RangeError(`activations is ${quote(activations)}, but must be "float32" or "bfloat16"`)
    }
    if (/^dry(:cuda)?$/.test(name)) {
      const workspace = name === 'dry' ? 0 : CUDA_WORKSPACE
      return new Device(name, 'records and plans, allocates nothing', undefined, 0, undefined, workspace, activations)
    }
    const [, backend, index = '0'] = /^(auto|cpu|cuda|simt)(?::(\d{1,3}))?$/.exec(name) ?? []
    if (!backend || (backend === 'auto' && name !== 'auto')) {
      const known = ['auto', 'cpu', 'cuda', 'cuda:1', 'simt', 'dry', 'dry:cuda']
      throw new RangeError(`unknown device "${name}"${didYouMean(name, known)}; known are ${known.join(', ')}`)
    }
    const addon = native()
    const open = (chosen: string, fallback?: string): Device => {
      const id = addon.openDevice(chosen, Number(index), threads)
      const own = Number(index) > 0 ? name : chosen
      const { description, workspaceBytes } = addon.describe(id)
      return new Device(own, description, id, threads, fallback, workspaceBytes, activations)
    }
    try {
      if (backend !== 'auto') return open(backend)
      let reason: string
      try {
        return open('cuda')
      } catch (error) {
        reason = (error as Error).message
      }
      return open('cpu', reason)
    } catch (error) {
      throw new RopewalkError('ERR_DEVICE_UNAVAILABLE', `device "${name}": ${(error as Error).message}`)
    }
  }

  /** Free and total memory of a GPU; undefined for a device that uses the host's. */
  memory(): DeviceMemory | undefined {
    this.check()
    return this.id === undefined ? undefined : native().memory(this.id)
  }

  /**
   * @internal Pinned memory of the host, which operations can use as they use the device's, but slowly. Where the system
   * does not give it, memory of the device, and `onRefused` is told.
   */
  allocHost(bytes: number, name: string, onRefused: (message: string) => void): Buffer {
    this.check()
    let id: number | undefined
    if (this.id !== undefined) {
      try {
        id = native().alloc(this.id, bytes, true)
      } catch (error) {
        onRefused(
          `${name}: ${(error as Error).message}: they stay on the device, which needs ${formatBytes(bytes)} more`,
        )
        return this.alloc(bytes, name)
      }
    }
    this.hostBytes += bytes
    return new Buffer(this, bytes, name, id, false, true)
  }

  /** @internal A block of memory; throws ERR_OUT_OF_MEMORY, with what would help. */
  alloc(bytes: number, name: string, remedy = 'Use a shorter context, fewer rows, or dtype bfloat16'): Buffer {
    this.check()
    if (!Number.isSafeInteger(bytes) || bytes < 1) throw new RangeError(`${name}: cannot allocate ${bytes} bytes`)
    let id: number | undefined
    if (this.id !== undefined) {
      try {
        id = native().alloc(this.id, bytes, false)
      } catch (error) {
        throw new RopewalkError(
          'ERR_OUT_OF_MEMORY',
          `${name}: ${this.name} could not allocate ${formatBytes(bytes)} (${formatBytes(this.allocatedBytes)} are ` +
            `in use by this model): ${(error as Error).message}. ${remedy}`,
        )
      }
    }
    this.allocatedBytes += bytes
    this.peakAllocatedBytes = Math.max(this.peakAllocatedBytes, this.allocatedBytes)
    return new Buffer(this, bytes, name, id)
  }

  /**
   * @internal An open file to be used in place, read-only; undefined where that cannot be done. Its handle may be closed
   * afterwards. What uses a file that changes meanwhile rejects with ERR_FILE_CHANGED.
   */
  map(fd: number, path: string): Buffer | undefined {
    this.check()
    const file = this.id === undefined ? undefined : native().mapFile(this.id, fd, path)
    if (!file) return undefined
    this.mappedBytes += file.bytes
    return new Buffer(this, file.bytes, path, file.buffer, true)
  }

  /** @internal A tensor in a buffer of its own. */
  tensor(dtype: DType, dims: readonly number[], name: string): Tensor {
    const size = dims.reduce((product, dim) => product * dim, 1)
    return new Tensor(this.alloc(tensorBytes(dtype, size), name), 0, dtype, dims)
  }

  /** @internal Copies host data to a tensor; the array may be reused as soon as this returns its promise. */
  async upload(tensor: Tensor, data: ArrayBufferView): Promise<void> {
    this.check()
    if (data.byteLength !== tensor.bytes) {
      throw new RangeError(`${tensor.describe()}: ${data.byteLength} bytes were given, expected ${tensor.bytes}`)
    }
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
    const { handle } = tensor.storage as Buffer
    const parts: Promise<void>[] = []
    for (let at = 0; at < bytes.length; at += CHUNK) {
      parts.push(native().upload(handle, tensor.offset + at, bytes.subarray(at, at + CHUNK)))
    }
    await Promise.all(parts)
  }

  /** @internal The tensor's bytes, in pieces of at most 16 MB. */
  async *downloadChunks(tensor: Tensor): AsyncGenerator<Uint8Array> {
    this.check()
    const { handle } = tensor.storage as Buffer
    for (let at = 0; at < tensor.bytes; at += CHUNK) {
      yield await typed(native().download(handle, tensor.offset + at, Math.min(CHUNK, tensor.bytes - at)))
    }
  }

  /** @internal The tensor's bytes in one array. */
  async download(tensor: Tensor): Promise<Uint8Array> {
    const result = new Uint8Array(tensor.bytes)
    let at = 0
    for await (const chunk of this.downloadChunks(tensor)) {
      result.set(chunk, at)
      at += chunk.length
    }
    return result
  }

  /** @internal An f32 tensor's values. */
  async downloadFloats(tensor: Tensor): Promise<Float32Array> {
    if (tensor.dtype !== 'f32') throw new TypeError(`${tensor.describe()} is not f32`)
    return new Float32Array((await this.download(tensor)).buffer)
  }

  /**
   * Reads a tensor from an open file straight into device memory, converting its dtype where it differs. Gives the index
   * of the first element that is NaN or infinite, -1 where there is none. @internal
   */
  async read(tensor: Tensor, fd: number, fileOffset: number, fileDtype: FileDType): Promise<number> {
    this.check()
    const { handle } = tensor.storage as Buffer
    const code = FILE_DTYPE_CODE[fileDtype]
    return native().read(handle, tensor.offset, DTYPE_CODE[tensor.dtype], fd, fileOffset, code, tensor.size)
  }

  /** @internal The index of the first element of a mapped tensor that is NaN or infinite, -1 where there is none. */
  async findNotFinite(tensor: Tensor): Promise<number> {
    this.check()
    const { handle } = tensor.storage as Buffer
    return typed(native().findNotFinite(handle, tensor.offset, DTYPE_CODE[tensor.dtype], tensor.size))
  }

  /** Ends the call that is running between two of its operations; it rejects with an Error of code `ERR_CANCELLED`. */
  cancel(): void {
    if (this.id !== undefined && !this.disposed) native().cancel(this.id)
  }

  /** Stops the device's thread and frees its memory. All of its promises must have settled. */
  dispose(): void {
    if (this.disposed) return
    if (this.id !== undefined) native().closeDevice(this.id)
    this.disposed = true
  }

  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose()
  }

  /** @internal */
  loadPlan(name: string, words: Float64Array, buffers: Uint32Array): number {
    this.check()
    if (this.id === undefined) throw new Error(`plan "${name}": the dry device plans, it does not run`)
    return native().loadPlan(this.id, name, words, buffers)
  }

  /** @internal What the addon knows it by. */
  get handle(): number {
    this.check()
    if (this.id === undefined) throw new Error('the dry device plans, it does not run')
    return this.id
  }

  /** @internal */
  async runPlan(handle: number): Promise<void> {
    this.check()
    await typed(native().run(handle))
  }

  /** @internal */
  freePlan(handle: number): void {
    if (!this.disposed) native().freePlan(handle)
  }

  /** @internal */
  freed(buffer: Buffer, id: number | undefined): void {
    if (buffer.mapped) this.mappedBytes -= buffer.bytes
    else if (buffer.host) this.hostBytes -= buffer.bytes
    else this.allocatedBytes -= buffer.bytes
    if (id !== undefined && !this.disposed) native().free(id)
  }

  private check(): void {
    if (this.disposed) throw new Error(`device ${this.name} was disposed`)
  }
}

/** What fails on the device or in a file is no fault of the caller. */
async function typed<T>(work: Promise<T>): Promise<T> {
  try {
    return await work
  } catch (cause) {
    const { code = '', message } = cause as NodeJS.ErrnoException
    throw /^ERR_(FILE_CHANGED|DEVICE)$/.test(code) ? new RopewalkError(code, message, { cause }) : cause
  }
}
