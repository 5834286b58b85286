// Runs one op as a plan of its own, on every instruction set and several numbers of threads, and compares it with a
// reference that each test writes once:
//
//   reference(p) in exact mode (p.r = identity) is the truth in float64; with p.r = Math.fround it is the naive
//   computation in the op's own precision. The op must not be further from the truth than 1.5 x the naive one (plus two
//   units in the last place of the largest result): a better order of summation passes, a lost term or a dropped bit of
//   precision does not.
//
// Around every tensor lie guard bytes, each a NaN of its own kind, so that reading beyond an end shows in the result and
// writing beyond it shows in the guards. Outputs and scratch hold such NaN before the run; inputs must not change.
import type { Test } from 'tap'
import { Device } from '../../lib/runtime/device.js'
import * as emitters from '../../lib/runtime/ops.gen.js'
import { type OpRow, Recorder, reads, writes } from '../../lib/runtime/recorder.js'
import { DTYPE_BYTES, type DType, isQuantized, Tensor, tensorBytes } from '../../lib/runtime/tensor.js'
import { decode, encode, EXACT, type HostTensor, NAIVE, type Precision, Random, rounding } from './values.js'

export * from './values.js'

export interface OpCase {
  /** Name of the op's row. */
  op: string
  label: string
  args: Record<string, HostTensor | number | undefined>
  /** Optional inputs that are the output itself: { add: 'c' }. */
  alias?: Record<string, string>
  /** The values of everything that the op writes. */
  reference: (p: Precision) => Record<string, ArrayLike<number>>
  /**
   * Size of the numbers that were added up, where it is not the largest result: rounding of a sum is proportional to
   * its terms, and where few results are compared they may be small by chance.
   */
  scale?: Record<string, number>
  /** Elements by which tensors start off their alignment; drawn at random where it is not given. */
  shift?: number
  /** The result has exactly one right value: that of the naive computation. */
  bitwise?: boolean
  /** f32 in the pieces that AMX multiplies turns an infinity into NaN (csrc/cpu/tiles.h). */
  infinityMayBeNaN?: boolean
}

export interface Variant {
  name: string
  isa: string
  device: Device
  /** ROPEWALK_SIMT_ORDER of its runs, which other devices take no notice of. */
  order?: string
}

const wanted = process.env['ROPEWALK_TEST_DEVICE'] ?? 'cpu'
let opened: Variant[] | undefined
let unavailable = ''

/** The devices that every case runs on: those of one instruction set follow each other and must give the same bits. */
export function variants(): Variant[] {
  if (opened) return opened
  opened = []
  if (wanted !== 'cpu') {
    try {
      const device = Device.open(wanted)
      // The emulator's second run takes blocks and lanes the other way round: a sum in the order of arrival shows.
      const order = process.env['ROPEWALK_SIMT_ORDER'] ?? 'forward'
      const other = order === 'reverse' ? 'forward' : 'reverse'
      opened.push({ name: `${wanted}, first run`, isa: wanted, device, order })
      opened.push({ name: `${wanted}, second run`, isa: wanted, device, order: other })
    } catch (error) {
      unavailable = (error as Error).message
    }
    // Two runs must give the same bits. The slow flavours of the emulator look for other things, and once is enough.
    if (process.env['ROPEWALK_TEST_RUNS'] === '1') opened.splice(1)
    return opened
  }
  const before = process.env['ROPEWALK_ISA']
  for (const isa of before ? [before] : ['baseline', 'avx2', 'avx512', 'amx']) {
    process.env['ROPEWALK_ISA'] = isa
    try {
      for (const threads of [1, 2, 3]) {
        const device = Device.open('cpu', { threads })
        opened.push({ name: `${isa}, ${threads} threads`, isa, device })
        if (threads === 3) opened.push({ name: `${isa}, ${threads} threads again`, isa, device })
      }
    } catch (error) {
      // a machine without the wider instructions tests the narrower ones; anything else is a failure
      if (!/this processor has no|is not an x86-64/.test((error as Error).message)) throw error
    }
  }
  if (before === undefined) {
    // what is chosen without a wish: as the widest of these, with AVX512_VBMI where it is there
    delete process.env['ROPEWALK_ISA']
    opened.push({ name: 'as chosen', isa: 'as chosen', device: Device.open('cpu', { threads: 2 }) })
  } else process.env['ROPEWALK_ISA'] = before
  return opened
}

/** `{ skip }` for t.test: why the device under test is not there, or false. */
export function availability(): { skip: string | false } {
  return { skip: variants().length > 0 ? false : `skipped: ${unavailable}` }
}

// NaN in bf16 and in f32 alike, and hardly two of them the same: a copy of one guard over another one shows.
const PERIOD = 65521
const poison = new Uint16Array(PERIOD)
const poisonRandom = new Random(0x5eed)
for (let i = 0; i < PERIOD; i++)
  poison[i] = 0x7f81 + poisonRandom.int(0, 126) + (poisonRandom.next() < 0.5 ? 0x8000 : 0)

export function poisoned(bytes: number): Uint8Array {
  const words = new Uint16Array(Math.ceil(bytes / 2))
  for (let at = 0; at < words.length; at += PERIOD)
    words.set(poison.subarray(0, Math.min(PERIOD, words.length - at)), at)
  return new Uint8Array(words.buffer, 0, bytes)
}

const GUARD = 256
const align = (n: number, to: number): number => Math.ceil(n / to) * to

interface Region {
  field: string
  offset: number
  bytes: number
  dtype: DType
  dims: number[]
  written: boolean
}

export type Results = Record<string, HostTensor>

interface Outcome {
  problems: string[]
  bytes: Map<string, Uint8Array>
}

export const rowOf = (op: string): OpRow => {
  const row = (emitters.OPS as readonly OpRow[]).find(({ name }) => name === op)
  if (!row) throw new Error(`no op is called ${op}`)
  return row
}

const camel = (name: string): string => name.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase())

/** Lays the tensors out in one buffer with guards between them, each `shift` elements off its alignment. */
function layOut(c: OpCase, row: OpRow, shift: number): { regions: Region[]; total: number } {
  const regions: Region[] = []
  let total = GUARD
  for (const { name, kind, dims } of row.fields) {
    const value = c.args[name]
    if (!dims || typeof value !== 'object' || c.alias?.[name]) continue
    const bytes = tensorBytes(value.dtype, value.size)
    // a view of rows starts anywhere
    const offset = align(total, 64) + shift * (isQuantized(value.dtype) ? 16 : DTYPE_BYTES[value.dtype])
    regions.push({ field: name, offset, bytes, dtype: value.dtype, dims: value.dims, written: writes(kind) })
    total = offset + bytes + GUARD
  }
  return { regions, total: align(total, 4) }
}

/** What each op was given so far, by its name: sizes, dtypes, which optional ones, what is the output itself. */
const shapes = new Map<string, Set<string>>()

const share = process.env['ROPEWALK_TEST_SHARE']

/**
 * The numbers of `count` seeded shapes. The slow flavours of the emulator find accesses and races, for which the same
 * paths of a kernel are enough, and not numbers: ROPEWALK_TEST_SHARE, 'i/n', is the i-th of n shares. What takes turns by
 * the number meets in each.
 */
export function seeds(count: number): number[] {
  const all = Array.from({ length: count }, (_, i) => i)
  if (!share) return all
  const [which, of] = share.split('/').map(Number) as [number, number]
  return all.filter((i) => (Math.imul(i, 0x9e3779b1) >>> 16) % of === which)
}

/** Each of these ops was given at least 200 different shapes by this file; the last test of every file. */
export function checkShapes(t: Test, ...ops: string[]): void {
  if (share) return t.comment('a share of the shapes: see ROPEWALK_TEST_SHARE')
  for (const op of ops) {
    const count = shapes.get(op)?.size ?? 0
    t.ok(count >= 200, `${op}: ${count} shapes`)
  }
}

function countShape({ op, args, alias = {} }: OpCase, row: OpRow): void {
  const given = row.fields.map(({ kind, name }) => {
    const value = args[name]
    return typeof value === 'object' ? [value.dtype, ...value.dims, alias[name]] : kind === 'INT' ? value : null
  })
  shapes.set(op, (shapes.get(op) ?? new Set()).add(JSON.stringify(given)))
}

async function runOnce(c: OpCase, { device, order }: Variant, shift: number): Promise<Outcome> {
  const row = rowOf(c.op)
  countShape(c, row)
  const problems: string[] = []
  const { regions, total } = layOut(c, row, shift)
  const before = poisoned(total)
  for (const { field, offset, bytes } of regions) {
    const shared = Object.entries(c.alias ?? {}).find(([, to]) => to === field)?.[0]
    const value = c.args[shared ?? field] as HostTensor
    if (!value.poisoned) before.set(encode(value).subarray(0, bytes), offset)
  }

  const buffer = device.alloc(total, `${c.op} test`)
  const whole = new Tensor(buffer, 0, 'i32', [total / 4])
  const at = (region: Region): Tensor => new Tensor(buffer, region.offset, region.dtype, region.dims)
  const args: Record<string, Tensor | number | undefined> = {}
  for (const { name, dims } of row.fields) {
    const value = c.args[name]
    if (!dims) args[name] = value as number | undefined
    else {
      const region = regions.find(({ field }) => field === (c.alias?.[name] ?? name))
      if (value && region) args[name] = at(region)
    }
  }
  const recorder = new Recorder(device, c.label)
  const emit = (emitters as unknown as Record<string, (recorder: Recorder, args: object) => unknown>)[camel(c.op)]!
  emit(recorder, args)

  // The scratch of the op in an arena with a guard behind it.
  const { peakBytes, placements } = recorder.plan()
  const arena = device.alloc(peakBytes + GUARD, 'arena')
  const arenaTensor = new Tensor(arena, 0, 'i32', [(peakBytes + GUARD) / 4])
  const arenaBefore = poisoned(peakBytes + GUARD)
  const plan = recorder.plan({ arena })
  plan.load()
  await Promise.all([device.upload(whole, before), device.upload(arenaTensor, arenaBefore)])
  if (order) process.env['ROPEWALK_SIMT_ORDER'] = order
  await plan.run()
  const [after, arenaAfter] = await Promise.all([device.download(whole), device.download(arenaTensor)])
  plan.dispose()
  buffer.dispose()
  arena.dispose()

  const unchanged = (a: Uint8Array, b: Uint8Array, start: number, end: number, what: string): void => {
    if (Buffer.compare(a.subarray(start, end), b.subarray(start, end)) === 0) return
    let first = start
    while (a[first] === b[first]) first++
    problems.push(`${what} changed at byte ${first - start} of ${end - start}`)
  }
  let end = 0
  const result = new Map<string, Uint8Array>()
  for (const region of regions) {
    unchanged(before, after, end, region.offset, `guard before ${region.field}`)
    end = region.offset + region.bytes
    if (region.written) result.set(region.field, after.slice(region.offset, end))
    else unchanged(before, after, region.offset, end, `input ${region.field}`)
  }
  unchanged(before, after, end, total, 'guard at the end')
  end = 0
  for (const { name, offset, bytes } of [...placements].sort((a, b) => a.offset - b.offset)) {
    unchanged(arenaBefore, arenaAfter, end, offset, `gap before scratch ${name}`)
    end = offset + bytes
  }
  unchanged(arenaBefore, arenaAfter, end, peakBytes + GUARD, 'guard after the scratch')
  return { problems, bytes: result }
}

/** Largest |error| of an f32 result divided by what it may be, over all cases of this file so far. */
export const worst = { ratio: 0, label: 'none' }

const show = (x: number): string => (Object.is(x, -0) ? '-0' : String(x))

/** How far `got` is from the truth, against how far the naive computation is; undefined where that is well. */
function compare(c: OpCase, field: string, got: HostTensor, exact: ArrayLike<number>, naive: ArrayLike<number>) {
  const size = got.values.length
  if (exact.length !== size || naive.length !== size) {
    return `${field}: the reference has ${exact.length} values, expected ${size}`
  }
  const round = rounding(got.dtype)
  let largest = c.scale?.[field] ?? 0
  let naiveError = 0
  let error = 0
  let at = 0
  for (let i = 0; i < size; i++) {
    const rounded = round(naive[i]!)
    const value = got.values[i]!
    if (c.bitwise || !Number.isFinite(rounded)) {
      if (c.infinityMayBeNaN && Math.abs(rounded) === Infinity && Number.isNaN(value)) continue
      if (!Object.is(value, rounded)) return `${field}[${i}] is ${show(value)}, expected ${show(rounded)}`
      continue
    }
    if (!Number.isFinite(value)) return `${field}[${i}] is ${value}, expected ${exact[i]}`
    largest = Math.max(largest, Math.abs(exact[i]!))
    naiveError = Math.max(naiveError, Math.abs(rounded - exact[i]!))
    if (Math.abs(value - exact[i]!) > error) {
      error = Math.abs(value - exact[i]!)
      at = i
    }
  }
  // Two units of f32, for bf16 results too: those are rounded from f32 once, and both sides round to the same
  // neighbour unless they lie at a tie, where the naive error is as large as the other one.
  const limit = 1.5 * naiveError + 2 * 2 ** -23 * largest
  if (got.dtype === 'f32' && limit > 0 && error / limit > worst.ratio)
    Object.assign(worst, { ratio: error / limit, label: `${c.op} ${c.label} ${field}` })
  if (error <= limit) return undefined
  return (
    `${field}[${at}] is ${got.values[at]}, expected ${exact[at]}: error ${error.toExponential(2)}, ` +
    `allowed ${limit.toExponential(2)} (naive ${naiveError.toExponential(2)}, largest ${largest.toExponential(2)})`
  )
}

// Half of the cases start off their alignment, at random: no alternation of dtypes or options in a test then falls
// together with it, and each combination of them meets both.
const shifts = new Random(0x0ff)

/** Runs a case on all variants: one assertion. Gives the results of the last variant, decoded. */
export async function check(t: Test, c: OpCase): Promise<Results> {
  const problems: string[] = []
  const row = rowOf(c.op)
  const exact = c.reference(EXACT)
  const naive = c.reference(NAIVE)
  const shift = c.shift ?? (shifts.next() < 0.5 ? 0 : shifts.int(1, 3))
  let first: { isa: string; name: string; bytes: Map<string, Uint8Array> } | undefined
  let results: Results = {}
  for (const variant of variants()) {
    const outcome = await runOnce(c, variant, shift)
    problems.push(...outcome.problems.map((problem) => `${variant.name}: ${problem}`))
    if (first?.isa === variant.isa) {
      for (const [field, bytes] of outcome.bytes) {
        if (Buffer.compare(bytes, first.bytes.get(field)!) === 0) continue
        problems.push(`${field} differs in its bits between ${first.name} and ${variant.name}`)
      }
      continue
    }
    first = { isa: variant.isa, name: variant.name, bytes: outcome.bytes }
    results = {}
    for (const [field, bytes] of outcome.bytes) {
      const { dtype, dims, size } = c.args[field] as HostTensor
      results[field] = { dtype, dims, size, values: decode(dtype, bytes), poisoned: false }
      if (!(field in exact)) {
        problems.push(`the reference does not give ${field}`)
        continue
      }
      const inTiles = variant.isa === 'amx' || variant.isa === 'as chosen'
      const problem = compare(
        inTiles ? c : { ...c, infinityMayBeNaN: false },
        field,
        results[field],
        exact[field]!,
        naive[field]!,
      )
      if (problem) problems.push(`${variant.name}: ${problem}`)
    }
  }
  for (const field of row.fields) {
    const given = c.args[field.name]
    const needed = writes(field.kind) || field.kind === 'FLT' || field.kind === 'INT' || field.kind === 'IN'
    if (needed && !field.kind.startsWith('OPT') && given === undefined) problems.push(`the case gives no ${field.name}`)
    if (typeof given === 'object' && given.poisoned && reads(field.kind)) problems.push(`${field.name} has no values`)
  }
  t.strictSame(problems, [], `${c.op} ${c.label}`)
  return results
}

/** Runs a case on every variant and gives the bytes of its results by variant; what is wrong becomes a failure. */
export async function runAll(t: Test, c: Omit<OpCase, 'reference'>): Promise<Map<string, Map<string, Uint8Array>>> {
  const all = new Map<string, Map<string, Uint8Array>>()
  for (const variant of variants()) {
    const { problems, bytes } = await runOnce({ ...c, reference: () => ({}) }, variant, 0)
    if (problems.length > 0) t.fail(`${c.op} ${c.label}, ${variant.name}: ${problems.join('; ')}`)
    all.set(variant.name, bytes)
  }
  return all
}

/** `add` absent, a tensor of its own, or the output itself. */
export type Addend = 'absent' | 'separate' | 'aliased'
export const ADDENDS: readonly Addend[] = ['absent', 'separate', 'aliased']
export const FLOATS: readonly DType[] = ['f32', 'bf16']

/**
 * The i-th combination of one element of each list, all of them within the product of the lengths: seeded shapes walk
 * through all combinations of dtypes and options.
 */
export function combination<T extends readonly (readonly unknown[])[]>(
  i: number,
  ...lists: T
): { [k in keyof T]: T[k][number] } {
  let rest = i
  return lists.map((list) => {
    const value = list[rest % list.length]
    rest = Math.floor(rest / list.length)
    return value
  }) as { [k in keyof T]: T[k][number] }
}

/** Compares a float64 gradient with central differences of f in some of the directions of x, in place. */
export function checkGradient(
  t: Test,
  label: string,
  f: () => number,
  x: Float64Array,
  gradient: ArrayLike<number>,
  random: Random,
): void {
  let largest = 1e-3
  for (let i = 0; i < x.length; i++) largest = Math.max(largest, Math.abs(gradient[i]!))
  let error = 0
  const step = 1e-5
  const samples = Math.min(x.length, 40)
  for (let s = 0; s < samples; s++) {
    const i = samples === x.length ? s : random.int(0, x.length - 1)
    const kept = x[i]!
    x[i] = kept + step
    const up = f()
    x[i] = kept - step
    const down = f()
    x[i] = kept
    error = Math.max(error, Math.abs((up - down) / (2 * step) - gradient[i]!))
  }
  t.ok(error <= 1e-7 * largest + 1e-9, `${label}: off by ${error.toExponential(1)} of ${largest.toExponential(1)}`)
}
