import { Buffer, type Device } from './device.js'
import { checkLimits } from './limits.js'
import { Plan, type PlanOptions } from './plan.js'
import { checkRule } from './rules.js'
import { type DType, isFloat, isQuantized, Scratch, setPurpose, Tensor, tensorBytes } from './tensor.js'

export type FieldKind = 'IN' | 'OUT' | 'INOUT' | 'OPT' | 'OPT_INOUT' | 'OPT_OUT' | 'TMP' | 'INT' | 'FLT'

export interface OpField {
  readonly kind: FieldKind
  readonly name: string
  /** A dtype or a letter bound by its first use (tensors only). */
  readonly dtype?: string
  /** Symbols, numbers, the name of an INT, or quotients such as D/2 and H/groups (tensors only). */
  readonly dims?: readonly string[]
}

/** A row of csrc/ops.def. */
export interface OpRow {
  readonly name: string
  readonly opcode: number
  readonly fields: readonly OpField[]
  readonly flops: (dims: Record<string, number>) => number
}

/** One recorded operation: its row and, field by field, a tensor, a number, or undefined where an optional is absent. */
export interface Command {
  readonly row: OpRow
  readonly values: readonly (Tensor | number | undefined)[]
  readonly flops: number
  /** Bytes read and written, each tensor counted once for each direction. */
  readonly traffic: number
  readonly place: Place
}

/** Where in a model's pass an operation stands. */
export interface Place {
  /** 'layer 3', 'output'; '' where nobody has said. */
  readonly part: string
  readonly phase: 'forward' | 'backward'
  /** Whether it was computed in the forward pass already. */
  readonly again: boolean
}

type Args = { readonly [name: string]: Tensor | number | undefined }

/** Of i32 tensors: their elements are numbered by 32 bits. */
const MOST_IDS = 2 ** 31 - 1

const READS = new Set<FieldKind>(['IN', 'INOUT', 'OPT', 'OPT_INOUT'])
const WRITES = new Set<FieldKind>(['OUT', 'INOUT', 'OPT_INOUT', 'OPT_OUT'])

/**
 * Writes operations down without running them. The emitters of ops.gen.ts check every operation against the op table
 * here, at record time, and give back its outputs; `plan()` then turns the record into something that runs.
 */
export class Recorder {
  readonly commands: Command[] = []
  /** Of the operations that follow. */
  place: Place = { part: '', phase: 'forward', again: false }
  private readonly written = new Set<Scratch>()

  /** `activations` is the dtype of outputs that no argument determines: Device.activationsFor the model's weights. */
  constructor(
    readonly device: Device,
    readonly name: string,
    readonly activations: DType = 'f32',
  ) {}

  /** A tensor in the plan's arena, or in its arena on the host; it holds garbage until an operation writes it. */
  scratch(dtype: DType, dims: readonly number[], name: string, host = false): Tensor {
    const size = dims.reduce((product, dim) => product * dim, 1)
    if (!Number.isSafeInteger(size) || size < 1 || dims.some((dim) => !Number.isInteger(dim) || dim < 1)) {
      throw new RangeError(`${name}: dims (${dims.join(',')}) must be positive whole numbers`)
    }
    return new Tensor(new Scratch(tensorBytes(dtype, size), name, host), 0, dtype, dims)
  }

  /** Checks and appends one operation; allocates what it writes and was not given. Called by the emitters. */
  emit(row: OpRow, given: object): Record<string, Tensor> {
    const args = given as Args
    const symbols: Record<string, number> = {}
    const dtypes: Record<string, DType> = {}
    for (const field of row.fields) if (field.kind === 'INT') symbols[field.name] = this.integer(row, field, args)

    // First what is given, so that it binds the symbols; then what has to be allocated from them.
    for (const field of row.fields) {
      const tensor = args[field.name]
      if (!field.dims || field.kind === 'TMP') continue
      if (tensor === undefined) {
        if (field.kind === 'IN' || field.kind === 'INOUT') throw new TypeError(`${row.name}: ${field.name} is missing`)
        continue
      }
      if (!(tensor instanceof Tensor)) throw new TypeError(`${row.name}: ${field.name} must be a Tensor`)
      this.unify(row, field, tensor, symbols, dtypes)
    }
    checkRule(row.name, args)
    if (this.device.gpu) checkLimits(row.name, symbols, dtypes['F'])
    const outputs: Record<string, Tensor> = {}
    const values = row.fields.map((field) => {
      if (!field.dims) return field.kind === 'INT' ? symbols[field.name] : this.real(row, field, args)
      let tensor = field.kind === 'TMP' ? undefined : (args[field.name] as Tensor | undefined)
      if (!tensor && (field.kind === 'OUT' || field.kind === 'TMP')) {
        const dims = field.dims.map((dim) => this.resolve(row, field, dim, symbols))
        const dtype = dtypeOf(field.dtype!, dtypes) ?? this.activations
        tensor = this.scratch(dtype, dims, `${row.name}.${field.name}`)
        if (field.name === 'logits') setPurpose(tensor, 'logits')
      }
      if (tensor && field.kind === 'OUT') outputs[field.name] = tensor
      return tensor
    })

    let traffic = 0
    row.fields.forEach((field, i) => {
      const value = values[i]
      if (!(value instanceof Tensor)) return
      if (READS.has(field.kind)) {
        traffic += value.bytes
        if (value.storage instanceof Scratch && !this.written.has(value.storage)) {
          throw new Error(`${row.name}: ${field.name} (${value.describe()}) is read before anything wrote it`)
        }
      }
      if (!WRITES.has(field.kind)) return
      traffic += value.bytes
      if (value.storage instanceof Buffer && value.storage.mapped) {
        throw new TypeError(
          `${row.name}: ${field.name} (${value.describe()}) is a file that is used in place: it is only read`,
        )
      }
    })
    row.fields.forEach((field, i) => {
      const value = values[i]
      if (WRITES.has(field.kind) && value instanceof Tensor && value.storage instanceof Scratch) {
        this.written.add(value.storage)
      }
    })
    this.commands.push({ row, values, flops: row.flops(symbols), traffic, place: this.place })
    return outputs
  }

  /**
   * Ends the record. Tensors in `keep` stay valid after a run (they are read back by the caller); all other scratch
   * tensors share memory as their lifetimes allow.
   */
  plan(options: PlanOptions = {}): Plan {
    return new Plan(this.device, this.name, this.commands, options)
  }

  private integer(row: OpRow, field: OpField, args: Args): number {
    const value = args[field.name]
    if (typeof value !== 'number' || !Number.isInteger(value) || value < 1) {
      throw new RangeError(`${row.name}: ${field.name} is ${String(value)}, but must be a whole number >= 1`)
    }
    return value
  }

  private real(row: OpRow, field: OpField, args: Args): number {
    const value = args[field.name]
    if (typeof value !== 'number' || Number.isNaN(value)) {
      throw new TypeError(`${row.name}: ${field.name} is ${String(value)}, but must be a number`)
    }
    return value
  }

  /** Binds the symbols of a field's dims and dtype to those of the tensor, or checks them. */
  private unify(
    row: OpRow,
    field: OpField,
    tensor: Tensor,
    symbols: Record<string, number>,
    dtypes: Record<string, DType>,
  ) {
    const dims = field.dims!
    const flat = dims.length === 1 && dims[0] === 'N' && tensor.dims.length !== 1
    const actual = flat ? [tensor.size] : tensor.dims
    const where = `${row.name}: ${field.name} [${dims.join(' ')}]`
    const expected = dtypeOf(field.dtype!, dtypes)
    if (expected && expected !== tensor.dtype) {
      throw new TypeError(`${where}: dtype is ${tensor.dtype}, expected ${expected} (${tensor.describe()})`)
    }
    if (tensor.dtype === 'i32' && tensor.size > MOST_IDS) {
      throw new RangeError(`${where}: has ${tensor.size} elements, the limit is ${MOST_IDS} (${tensor.describe()})`)
    }
    if (/^[A-Z]$/.test(field.dtype!)) {
      const quantized = field.dtype === 'Q'
      if (!isFloat(tensor.dtype) && !(quantized && isQuantized(tensor.dtype))) {
        const known = quantized ? 'f32, bf16, nf4 or int8' : 'f32 or bf16'
        throw new TypeError(`${where}: dtype is ${tensor.dtype}, expected ${known}`)
      }
      dtypes[field.dtype!] = tensor.dtype
    }
    if (actual.length !== dims.length) {
      throw new RangeError(`${where}: has ${actual.length} dims, expected ${dims.length} (${tensor.describe()})`)
    }
    dims.forEach((dim, i) => {
      const size = actual[i]!
      if (/^[A-Z]$/.test(dim) && !(dim in symbols)) {
        symbols[dim] = size
        return
      }
      const wanted = this.resolve(row, field, dim, symbols)
      if (wanted !== size)
        throw new RangeError(`${where}: ${dim} is ${size}, expected ${wanted} (${tensor.describe()})`)
    })
  }

  private resolve(row: OpRow, field: OpField, dim: string, symbols: Record<string, number>): number {
    if (/^\d+$/.test(dim)) return Number(dim)
    const [symbol, divisor = '1'] = dim.split('/') as [string, string?]
    const value = symbols[symbol]
    if (value === undefined) throw new Error(`${row.name}: ${field.name} [${dim}] is not determined by any argument`)
    const by = symbols[divisor] ?? Number(divisor)
    if (value % by !== 0) {
      const named = divisor in symbols ? `${divisor} (${by})` : divisor
      throw new RangeError(`${row.name}: ${symbol} is ${value}, but must be divisible by ${named}`)
    }
    return value / by
  }
}

function dtypeOf(name: string, bound: Record<string, DType>): DType | undefined {
  return /^[A-Z]$/.test(name) ? bound[name] : (name as DType)
}

/** Whether a field of this kind is read, and whether it is written. */
export const reads = (kind: FieldKind): boolean => READS.has(kind)
export const writes = (kind: FieldKind): boolean => WRITES.has(kind)
