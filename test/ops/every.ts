// Every op of the table, a few times each, for whoever looks at what kernels do rather than at what they give: every dtype
// combination in some sizes.
import { Device } from '../../lib/runtime/device.js'
import * as emitters from '../../lib/runtime/ops.gen.js'
import { type OpField, type OpRow, Recorder, reads, writes } from '../../lib/runtime/recorder.js'
import { DTYPE_BYTES, type DType, isQuantized, Tensor, tensorBytes } from '../../lib/runtime/tensor.js'
import { encode, FLOATS, Random, rowOf, tensor } from './harness.js'
import { FORMATS, quantizedTensor } from './quantized-reference.js'

type Shape = Record<string, number>

/** Sizes by the letters of the table, and by how many elements tensors start off their alignment. */
export interface Sizes {
  dims: Shape
  shift: number
}

/** Whole tiles, several of them, on aligned tensors. */
export const WHOLE: Sizes = {
  dims: { N: 256, M: 192, K: 256, C: 256, V: 320, B: 1, T: 192, H: 4, D: 64, S: 192, P: 192, chunk: 128, groups: 2 },
  shift: 0,
}
/** Rows of more channels than a warp holds, for ops on rows. */
export const WIDE: Sizes = { dims: { N: 9, C: 2100 }, shift: 0 }
/** Sizes that fill no tile, one element off. */
export const ODD_SIZES: Sizes = {
  dims: { N: 133, M: 67, K: 45, C: 77, V: 103, B: 2, T: 71, H: 6, D: 22, S: 83, P: 90, chunk: 50, groups: 1 },
  shift: 1,
}

/** What a letter may stand for. */
const dtypesOf = (row: OpRow, letter: string): readonly DType[] =>
  letter !== 'Q' ? FLOATS : /quantize/.test(row.name) ? FORMATS : [...FLOATS, ...FORMATS]

/** Letters that stand for a dtype, and every way to bind them. */
function bindings(row: OpRow): Record<string, DType>[] {
  const letters = [...new Set(row.fields.flatMap(({ dtype = '' }) => (/^[A-Z]$/.test(dtype) ? [dtype] : [])))]
  return letters.reduce<Record<string, DType>[]>(
    (all, letter) => all.flatMap((one) => dtypesOf(row, letter).map((dtype) => ({ ...one, [letter]: dtype }))),
    [{}],
  )
}

/** Integers that an op may use as indices, floats that are small or, where they are divisors, positive. */
function value(row: OpRow, name: string, dims: Shape, random: Random): (i: number) => number {
  const { T, S, P, V } = dims as { T: number; S: number; P: number; V: number }
  switch (name) {
    case 'ids':
      return () => random.int(0, V - 1)
    case 'labels':
      return () => random.int(-1, V - 1)
    case 'pos':
      return () => random.int(0, P - 1)
    case 'first':
      return (i) => random.int(0, i % T)
    case 'last':
      return (i) => S - T + (i % T)
    case 'slot':
      return (i) => i % T
    case 'hyper':
      return (i) => [1e-3, 0.1, 0.05, 1, 1, 1, 1, 1][i]!
    case 'v':
    case 'rstd':
    case 'sum_squares':
    case 'lse':
      return row.name.startsWith('attention') && name === 'v' ? () => random.normal() : () => 1 + random.next()
    default:
      return () => random.normal()
  }
}

/** What may hold weights more exactly: masters, their lower halves, or nothing, as with weights in f32. */
const besides = (row: OpRow, types: Record<string, DType>): (string | undefined)[] => [
  undefined,
  ...row.fields.flatMap(({ kind, name }) =>
    kind === 'OPT_INOUT' && /^(master|low)$/.test(name) && types['W'] === 'bf16' ? [name] : [],
  ),
]

/** K is the depth of a product, but in attention the number of kv heads; N may have to be whole blocks of 8-bit states. */
function dimsOf(row: OpRow, dims: Shape): Shape {
  const names = new Set(row.fields.flatMap((field) => field.dims ?? []))
  if (names.has('N/256')) return { ...dims, N: 256 * Math.ceil(dims['N']! / 256) }
  return names.has('H') || names.has('S') ? { ...dims, K: dims['H']! / 2 } : dims
}

const camel = (name: string): string => name.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase())

async function runOp(
  device: Device,
  row: OpRow,
  types: Record<string, DType>,
  dims: Shape,
  shift: number,
  times: number,
  beside: string | undefined,
): Promise<Uint8Array[]> {
  const random = new Random(7)
  const args: Record<string, Tensor | number> = {}
  const owned = []
  const written: Tensor[] = []
  for (const field of row.fields) {
    const { kind, name } = field
    if (kind === 'INT') args[name] = dims[name]!
    if (kind === 'FLT') args[name] = name === 'seed' || name === 'first' ? 3 : 0.5
    if (!field.dims || kind === 'TMP') continue
    // What may be absent is there, but for what holds weights more exactly.
    if (kind === 'OPT_INOUT' && name !== beside) continue
    const shape = field.dims.map((dim) => sizeOf(dim, dims))
    const dtype = dtypeOf(field, types)
    const size = shape.reduce((product, dim) => product * dim, 1)
    const offset = shift * (isQuantized(dtype) ? 16 : DTYPE_BYTES[dtype])
    const buffer = device.alloc(tensorBytes(dtype, size) + offset, name)
    owned.push(buffer)
    const placed = new Tensor(buffer, offset, dtype, shape)
    const make = dtype === 'u8' || dtype === 'u16' ? () => random.int(0, 255) : value(row, name, dims, random)
    const host = isQuantized(dtype) ? quantizedTensor(dtype, shape, make, 'f32').b : tensor(dtype, shape, make)
    if (reads(kind)) await device.upload(placed, encode(host))
    if (writes(kind)) written.push(placed)
    args[name] = placed
  }
  const recorder = new Recorder(device, row.name)
  const emit = (emitters as unknown as Record<string, (recorder: Recorder, args: object) => unknown>)[camel(row.name)]!
  emit(recorder, args)
  const plan = recorder.plan()
  try {
    for (let i = 0; i < times; i++) await plan.run()
    return await Promise.all(written.map((tensor) => device.download(tensor)))
  } finally {
    plan.dispose()
    for (const buffer of owned) buffer.dispose()
  }
}

function sizeOf(dim: string, dims: Shape): number {
  if (/^\d+$/.test(dim)) return Number(dim)
  const [name, divisor = '1'] = dim.split('/') as [string, string?]
  return dims[name]! / Number(divisor)
}

const dtypeOf = ({ dtype }: OpField, types: Record<string, DType>): DType => types[dtype!] ?? (dtype as DType)

export interface EveryCase {
  op: string
  label: string
  /** Runs the op's plan; gives the bytes of all that it writes. */
  run: (device: Device, times?: number) => Promise<Uint8Array[]>
}

/** The cases of these ops, or of all. */
export function everyCase(chosen: readonly string[], sizes: readonly Sizes[]): EveryCase[] {
  const rows = chosen.length > 0 ? chosen.map(rowOf) : (emitters.OPS as readonly OpRow[])
  return rows.flatMap((row) =>
    bindings(row).flatMap((types) =>
      sizes.flatMap(({ dims, shift }) =>
        besides(row, types).map((beside) => ({
          op: row.name,
          label: `${row.name} ${JSON.stringify(types)} ${beside ?? ''} shift ${shift}`,
          run: (device: Device, times = 1) => runOp(device, row, types, dimsOf(row, dims), shift, times, beside),
        })),
      ),
    ),
  )
}
