import { type Arena, planArena } from './arena.js'
import { Buffer, type Device } from './device.js'
import { type Command, reads, writes } from './recorder.js'
import { DTYPE_CODE, type Purpose, Scratch, type Storage, Tensor } from './tensor.js'

export interface PlanOptions {
  /** Tensors that the caller reads after a run. */
  keep?: readonly Tensor[]
  /** Leaves out operations whose results neither another one nor the caller reads. */
  prune?: boolean
  /** As `lend`. */
  arena?: Buffer | undefined
  hostArena?: Buffer | undefined
  /** Told where pinned memory of the host was refused. */
  onRefused?: (message: string) => void
}

/** A scratch tensor's place: when it is alive (operation numbers) and where in the arena. */
export interface Placement {
  name: string
  purpose: Purpose
  /** Whether it is in the arena on the host. */
  host: boolean
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
  readonly commands: readonly Command[]
  /** Exact bytes of the arena. */
  readonly peakBytes: number
  /** Exact bytes of the arena on the host. */
  readonly hostBytes: number
  /** Counted floating-point operations of a run. */
  readonly flops: number
  /** Bytes that the operations read and write. */
  readonly traffic: number
  readonly placements: readonly Placement[]
  /** Number of the operation at which most scratch memory is alive. */
  readonly peakAt: number

  private readonly scratch = new Map<Scratch, number>()
  private arena: Buffer | undefined
  private hostArena: Buffer | undefined
  private readonly lent: Pick<PlanOptions, 'arena' | 'hostArena'> = {}
  private handle: number | undefined
  private disposed = false

  constructor(
    readonly device: Device,
    readonly name: string,
    commands: readonly Command[],
    private readonly options: PlanOptions = {},
  ) {
    const { keep = [], arena, hostArena, prune } = options
    this.commands = prune ? needed(commands, keep) : commands
    const { placements, device: own, host } = place(this.commands, keep, this.scratch)
    this.placements = placements
    this.peakBytes = own.bytes
    this.hostBytes = host.bytes
    this.peakAt = own.peakAt
    this.flops = this.commands.reduce((sum, command) => sum + command.flops, 0)
    this.traffic = this.commands.reduce((sum, command) => sum + command.traffic, 0)
    this.lend(arena, hostArena)
  }

  /**
   * Before the first run: memory to share with other plans that never run at the same time, of at least `peakBytes` and
   * `hostBytes`. Whoever lends it frees it.
   */
  lend(arena: Buffer | undefined, hostArena: Buffer | undefined): void {
    for (const [lent, bytes] of [
      [arena, this.peakBytes],
      [hostArena, this.hostBytes],
    ] as const) {
      if (lent && lent.bytes < bytes) {
        throw new RangeError(`plan "${this.name}" needs an arena of ${bytes} bytes, was given ${lent.bytes}`)
      }
    }
    this.arena = this.lent.arena = arena
    this.hostArena = this.lent.hostArena = hostArena
  }

  /** Allocates the arena and hands the record to the device; `run()` does it on first use. */
  load(): void {
    if (this.disposed) throw new Error(`plan "${this.name}" was disposed`)
    if (this.handle !== undefined) return
    const { onRefused = () => undefined } = this.options
    if (this.peakBytes > 0) this.arena ??= this.device.alloc(this.peakBytes, `arena of plan "${this.name}"`)
    if (this.hostBytes > 0) {
      this.hostArena ??= this.device.allocHost(this.hostBytes, `host arena of plan "${this.name}"`, onRefused)
    }
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
    const arena = tensor.storage.host ? this.hostArena : this.arena
    if (!arena) throw new Error(`plan "${this.name}" is not loaded: its tensors have no place yet`)
    return new Tensor(arena, this.placements[index]!.offset + tensor.offset, tensor.dtype, tensor.dims)
  }

  /** The memory that runs use; another plan of the same device may share it if they never run at the same time. */
  get memory(): Buffer | undefined {
    return this.arena
  }

  dispose(): void {
    if (this.disposed) return
    this.disposed = true
    if (this.handle !== undefined) this.device.freePlan(this.handle)
    if (!this.lent.arena) this.arena?.dispose()
    if (!this.lent.hostArena) this.hostArena?.dispose()
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

/**
 * The operations that change a buffer, and those whose results one of these reads, or the caller. A checkpoint's layers
 * are recorded once more for the backward pass; what that does not read is thus not computed twice.
 */
function needed(commands: readonly Command[], keep: readonly Tensor[]): Command[] {
  const read = new Set<Storage>(keep.map(({ storage }) => storage))
  const reversed = [...commands].reverse().filter(({ row, values }) => {
    const isNeeded = row.fields.some(({ kind }, i) => {
      const value = values[i]
      return writes(kind) && value instanceof Tensor && (!(value.storage instanceof Scratch) || read.has(value.storage))
    })
    if (!isNeeded) return false
    row.fields.forEach(({ kind }, i) => {
      const value = values[i]
      if (reads(kind) && value instanceof Tensor) read.add(value.storage)
    })
    return true
  })
  return reversed.reverse()
}

/** Both arenas, with the offset of every scratch tensor in the one that it is in. */
function place(
  commands: readonly Command[],
  keep: readonly Tensor[],
  index: Map<Scratch, number>,
): { placements: Placement[]; device: Arena; host: Arena } {
  const placements: Placement[] = []
  commands.forEach(({ values }, at) => {
    for (const value of values) {
      if (!(value instanceof Tensor) || !(value.storage instanceof Scratch)) continue
      const known = index.get(value.storage)
      if (known !== undefined) placements[known]!.last = at
      else {
        index.set(value.storage, placements.length)
        const { name, purpose, bytes, host } = value.storage
        placements.push({ name, purpose, bytes, host, offset: 0, first: at, last: at })
      }
    }
  })
  for (const { storage } of keep) {
    const known = storage instanceof Scratch ? index.get(storage) : undefined
    if (known !== undefined) placements[known]!.last = commands.length
  }
  const [device, host] = [false, true].map((onHost) => {
    const own = placements.filter((placement) => placement.host === onHost)
    const arena = planArena(own)
    own.forEach((placement, i) => (placement.offset = arena.offsets[i]!))
    return arena
  }) as [Arena, Arena]
  return { placements, device, host }
}
