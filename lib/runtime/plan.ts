import { type Arena, planArena } from './arena.js'
import { Buffer, type Device } from './device.js'
import type { Command } from './recorder.js'
import { DTYPE_CODE, Scratch, type Storage, Tensor } from './tensor.js'

/** A scratch tensor's place: when it is alive (operation numbers) and where in the arena. */
export interface Placement {
  name: string
  bytes: number
  offset: number
  first: number
  last: number
}

/**
 * A record that can run: every scratch tensor has its place in one arena, so the memory of a run is known to the byte
 * before anything is allocated. `run()` is one call into native code and never blocks the event loop.
 */
export class Plan {
  /** Exact bytes of the arena. */
  readonly peakBytes: number
  /** Counted floating-point operations of a run. */
  readonly flops: number
  /** Bytes that the operations read and write. */
  readonly traffic: number
  readonly placements: readonly Placement[]
  /** Number of the operation at which most scratch memory is alive. */
  readonly peakAt: number

  private readonly scratch = new Map<Scratch, number>()
  private arena: Buffer | undefined
  private readonly ownsArena: boolean
  private handle: number | undefined
  private disposed = false

  constructor(
    readonly device: Device,
    readonly name: string,
    readonly commands: readonly Command[],
    options: { keep?: readonly Tensor[]; arena?: Buffer } = {},
  ) {
    const { placements, arena } = place(commands, options.keep ?? [], this.scratch)
    this.placements = placements
    this.peakBytes = arena.bytes
    this.peakAt = arena.peakAt
    this.flops = commands.reduce((sum, command) => sum + command.flops, 0)
    this.traffic = commands.reduce((sum, command) => sum + command.traffic, 0)
    this.arena = options.arena
    this.ownsArena = options.arena === undefined
    if (options.arena && options.arena.bytes < arena.bytes) {
      throw new RangeError(`plan "${name}" needs an arena of ${arena.bytes} bytes, was given ${options.arena.bytes}`)
    }
  }

  /** Allocates the arena and hands the record to the device; `run()` does it on first use. */
  load(): void {
    if (this.disposed) throw new Error(`plan "${this.name}" was disposed`)
    if (this.handle !== undefined) return
    if (this.peakBytes > 0) this.arena ??= this.device.alloc(this.peakBytes, `arena of plan "${this.name}"`)
    const { words, buffers } = this.encode()
    this.handle = this.device.loadPlan(this.name, words, buffers)
  }

  /** Runs the record; resolves when it is done. Runs of one device happen in the order of their calls. */
  async run(): Promise<void> {
    this.load()
    await this.device.runPlan(this.handle!)
  }

  /** Where a scratch tensor that was kept lies, so that it can be downloaded. */
  located(tensor: Tensor): Tensor {
    if (!(tensor.storage instanceof Scratch)) return tensor
    const index = this.scratch.get(tensor.storage)
    if (index === undefined) throw new Error(`${tensor.describe()} is not part of plan "${this.name}"`)
    if (!this.arena) throw new Error(`plan "${this.name}" is not loaded: its tensors have no place yet`)
    return new Tensor(this.arena, this.placements[index]!.offset + tensor.offset, tensor.dtype, tensor.dims)
  }

  /** The memory that runs use; another plan of the same device may share it if they never run at the same time. */
  get memory(): Buffer | undefined {
    return this.arena
  }

  dispose(): void {
    if (this.disposed) return
    this.disposed = true
    if (this.handle !== undefined) this.device.freePlan(this.handle)
    if (this.ownsArena) this.arena?.dispose()
  }

  private encode(): { words: Float64Array; buffers: Uint32Array } {
    const words: number[] = []
    const index = new Map<Storage, number>()
    const buffers: number[] = []
    const indexOf = (buffer: Buffer): number => {
      let at = index.get(buffer)
      if (at === undefined) {
        index.set(buffer, (at = buffers.length))
        buffers.push(buffer.handle)
      }
      return at
    }
    for (const { row, values } of this.commands) {
      words.push(row.opcode)
      row.fields.forEach((field, i) => {
        const value = values[i]
        if (!field.dims) words.push(value as number)
        else if (!(value instanceof Tensor)) words.push(-1)
        else {
          const { storage, offset, dtype, dims } = this.located(value)
          words.push(indexOf(storage as Buffer), offset, DTYPE_CODE[dtype], dims.length, ...dims)
        }
      })
    }
    return { words: Float64Array.from(words), buffers: Uint32Array.from(buffers) }
  }
}

function place(
  commands: readonly Command[],
  keep: readonly Tensor[],
  index: Map<Scratch, number>,
): { placements: Placement[]; arena: Arena } {
  const placements: Placement[] = []
  commands.forEach(({ values }, at) => {
    for (const value of values) {
      if (!(value instanceof Tensor) || !(value.storage instanceof Scratch)) continue
      const known = index.get(value.storage)
      if (known !== undefined) placements[known]!.last = at
      else {
        index.set(value.storage, placements.length)
        const { name, bytes } = value.storage
        placements.push({ name, bytes, offset: 0, first: at, last: at })
      }
    }
  })
  for (const { storage } of keep) {
    const known = storage instanceof Scratch ? index.get(storage) : undefined
    if (known !== undefined) placements[known]!.last = commands.length
  }
  const arena = planArena(placements)
  placements.forEach((placement, i) => (placement.offset = arena.offsets[i]!))
  return { placements, arena }
}
