// How the CUDA kernels go about memory, on whole tiles and aligned tensors: no line of theirs takes more wavefronts of
// shared memory than its bytes need (ldmatrix: one for each matrix), and every sector of device memory is used whole.
// What does not is listed here, with the reason. Runs on the race flavour of the emulator, from scripts/test.js.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { Device } from '../../lib/runtime/device.js'
import { type EveryCase, everyCase, WHOLE } from '../ops/every.js'

interface Line {
  kernel: string
  /** "attention.h:303 from attention.cu:148": what was inlined there has several. */
  place: string
  memory: 'shared' | 'device'
  kind: 'load' | 'store'
  requests: number
  /** Wavefronts or sectors of a request, on average. */
  needed: number
  actual: number
}

/** A line of a kernel that takes up to `ratio` times what it needs. `text` is a part of the line. */
interface Exception {
  kernel: string
  access: `${Line['memory']} ${Line['kind']}`
  text: string
  ratio: number
  reason: string
}

const halves = 'eight f32 are two requests of every other 16 bytes: one that follows finds the sectors in a cache'
const once = 'once a block, after its loop'
const scattered = 'where a token goes is up to the data'
const filled = 'once a block, before its loop'
const looked = 'which entry a lane looks up is up to the data'
const before = 'a token starts where the one before it ends: one number off its sector'
const oneOfRow = 'one number of a row of products'
const cached = 'a tile has a part of a sector of each row; those after it find the rest in a cache'
const lookedUp = 'absmax that differ are looked up at once: one for every 32 elements or more, but in f32'
const EXCEPTIONS: Exception[] = [
  ...['rmsnorm_fwd_kernel', 'rmsnorm_bwd_kernel', 'adamw_8bit_kernel'].map((kernel): Exception => ({
    kernel,
    access: 'device load',
    text: 'uint4*>(p)[i / 4]',
    ratio: 2,
    reason: halves,
  })),
  { kernel: 'adamw_8bit_kernel', access: 'device store', text: 'uint4*>(p)[i / 4]', ratio: 2, reason: halves },
  { kernel: 'adamw_8bit_kernel', access: 'shared store', text: 'map.piece[place] =', ratio: 4, reason: filled },
  { kernel: 'adamw_8bit_kernel', access: 'shared load', text: 'maps.m.value[', ratio: 4, reason: looked },
  { kernel: 'adamw_8bit_kernel', access: 'shared load', text: 'maps.v.value[', ratio: 4, reason: looked },
  { kernel: 'adamw_8bit_kernel', access: 'shared load', text: 'map.piece[carried', ratio: 2, reason: looked },
  ...['attention_rotate_kernel', 'attention_fwd_kernel', 'attention_bwd_kernel'].map((kernel): Exception => ({
    kernel,
    access: 'device load',
    text: 'float4 low = ',
    ratio: 2,
    reason: halves,
  })),
  ...['attention_fwd_kernel', 'attention_bwd_kernel'].flatMap((kernel): Exception[] => [
    {
      kernel,
      access: 'shared store',
      text: 'float2*>(own + element_at<float, kStride>(',
      ratio: 2,
      reason: 'f32 only: one store for a whole tile of products without tensor cores',
    },
    {
      kernel,
      access: 'shared store',
      text: '*reinterpret_cast<float2*>(p) = make_float2(x, y)',
      ratio: 2,
      reason: once,
    },
  ]),
  { kernel: 'attention_bwd_kernel', access: 'shared load', text: 'x[i] = sums[', ratio: 4, reason: once },
  { kernel: 'attention_bwd_kernel', access: 'shared load', text: 'y[i] = sums[', ratio: 4, reason: once },
  {
    kernel: 'attention_bwd_kernel',
    access: 'device load',
    text: 'if (firsts[tile].x < row0 + kRows)',
    ratio: 2,
    reason: 'once a block, before its loop: half of each pair',
  },
  {
    kernel: 'attention_fwd_kernel',
    access: 'shared store',
    text: '*reinterpret_cast<uint4*>(p) = make_uint4(',
    ratio: 1.5,
    reason: 'once a block, before its loop: queries as they are rotated',
  },
  { kernel: 'few_rows_kernel', access: 'device load', text: 'uint4*>(p)', ratio: 2, reason: halves },
  { kernel: 'few_rows_kernel', access: 'device load', text: 'static_cast<C*>(p.c)', ratio: 4, reason: oneOfRow },
  { kernel: 'few_rows_kernel', access: 'device store', text: 'static_cast<C*>(p.c)', ratio: 4, reason: oneOfRow },
  { kernel: 'ffma_kernel', access: 'device load', text: 'const Codes*>(from)', ratio: 2, reason: cached },
  { kernel: 'ffma_kernel', access: 'device load', text: 'return q.scales[block];', ratio: 3, reason: cached },
  { kernel: 'ffma_kernel', access: 'device load', text: 'return kept_absmax(', ratio: 1.5, reason: cached },
  { kernel: 'mma_kernel', access: 'device load', text: 'inside ? q.scales[at] : ', ratio: 5, reason: cached },
  { kernel: 'mma_kernel', access: 'device load', text: 'inside ? q.absmax[at] : ', ratio: 4, reason: cached },
  ...['ffma_kernel', 'few_rows_kernel', 'mma_kernel'].map((kernel): Exception => ({
    kernel,
    access: 'shared load',
    text: 'kept_absmax(',
    ratio: 2,
    reason: lookedUp,
  })),
  {
    kernel: 'nf4_kernel',
    access: 'shared load',
    text: 'if (x > halfway(map[middle], map[middle + 1]))',
    ratio: 2,
    reason: 'a search in the map, of one absmax for 64 elements, when a model is loaded',
  },
  { kernel: 'attention_fwd_kernel', access: 'device store', text: 'a.partial.top[', ratio: 4, reason: oneOfRow },
  { kernel: 'attention_fwd_kernel', access: 'device store', text: 'a.partial.total[', ratio: 4, reason: oneOfRow },
  { kernel: 'attention_fwd_kernel', access: 'device store', text: 'a.lse[', ratio: 2, reason: oneOfRow },
  { kernel: 'attention_delta_kernel', access: 'device store', text: 'delta[(b * heads', ratio: 4, reason: oneOfRow },
  { kernel: 'embedding_bwd_count_kernel', access: 'device store', text: 'atomicAdd(', ratio: 8, reason: scattered },
  { kernel: 'embedding_bwd_order_kernel', access: 'device store', text: 'order[to', ratio: 4, reason: scattered },
  { kernel: 'embedding_bwd_order_kernel', access: 'device load', text: 'int32_t start_of(', ratio: 2, reason: before },
]

/** Whole tiles of every kind. Flat tensors are multiples of what a block takes. */
function wholeCases(): EveryCase[] {
  const of = (ops: string[], dims: Record<string, number>) => everyCase(ops, [{ dims, shift: 0 }])
  const flat = ['swiglu_fwd', 'swiglu_bwd', 'dot', 'sum_squares', 'adamw', 'add', 'cast', 'fill']
  const matmul = ['matmul_nn', 'matmul_nt', 'matmul_tn']
  return [
    ...everyCase([], [WHOLE]).filter(({ op }) => !flat.includes(op)),
    ...of(flat, { N: 24576 }),
    ...of(['rmsnorm_fwd', 'rmsnorm_bwd'], { N: 8, C: 2048 }),
    ...of(matmul, { M: 256, N: 512, K: 192 }), // the large tiles
    ...of(matmul, { M: 64, N: 64, K: 2048 }), // a sum in parts
    ...of(['matmul_nt'], { M: 4, N: 64, K: 1024 }), // few rows
    ...of(['attention_fwd', 'attention_bwd'], { B: 1, T: 128, H: 2, D: 128, P: 128, groups: 1 }),
  ]
}

const self = fileURLToPath(import.meta.url)
const sources = fileURLToPath(new URL('../../csrc/cuda', import.meta.url))

/** The text of "gemm_mma.h:186", or of what both backends include. */
function textOf(place: string): string {
  const [name, line] = place.split(':') as [string, string]
  const own = join(sources, name)
  return readFileSync(existsSync(own) ? own : join(sources, '..', name), 'utf8')
    .split('\n')
    [Number(line) - 1]!.trim()
}

/** What the emulator has seen, which it writes at the end of a process. */
function report(): Line[] {
  const folder = mkdtempSync(join(tmpdir(), 'ropewalk-accesses-'))
  try {
    const path = join(folder, 'lint.json')
    const env = { ...process.env, ROPEWALK_SIMT_LINT: path }
    const { status, stderr } = spawnSync(process.execPath, [...process.execArgv, self, 'run'], {
      env,
      encoding: 'utf8',
    })
    if (status !== 0) throw new Error(`the run of all ops ended with ${status}: ${stderr}`)
    return JSON.parse(readFileSync(path, 'utf8')) as Line[]
  } finally {
    rmSync(folder, { recursive: true })
  }
}

/** Lines by kernel, kind of access and text: a helper that is inlined twice is one line. */
function byText(lines: Line[]): Map<string, { access: string; text: string; kernel: string; ratio: number }> {
  const sums = new Map<string, { line: Line; text: string; needed: number; actual: number }>()
  for (const line of lines) {
    const text = textOf(line.place.split(' from ')[0]!)
    const key = [line.kernel, line.memory, line.kind, text].join()
    const sum = sums.get(key) ?? { line, text, needed: 0, actual: 0 }
    sum.needed += line.requests * line.needed
    sum.actual += line.requests * line.actual
    sums.set(key, sum)
  }
  return new Map(
    [...sums].map(([key, { line, text, needed, actual }]) => [
      key,
      { access: `${line.memory} ${line.kind}`, text, kernel: line.kernel, ratio: actual / needed },
    ]),
  )
}

if (process.argv[2] === 'run') {
  const device = Device.open('simt')
  for (const { run } of wholeCases()) await run(device)
  device.dispose()
} else {
  t.test('memory is used whole', async (t) => {
    const lines = report()
    const kernels = readdirSync(sources).flatMap((name) =>
      [...readFileSync(join(sources, name), 'utf8').matchAll(/__global__[^;{]*?\b(\w+_kernel)\(/g)].map(([, k]) => k!),
    )
    const seen = new Set(lines.map(({ kernel }) => kernel))
    t.strictSame(new Set(kernels), seen, 'every kernel was seen')
    const used = new Set<Exception>()
    for (const { access, text, kernel, ratio } of byText(lines).values()) {
      const exception = EXCEPTIONS.find((e) => e.kernel === kernel && e.access === access && text.includes(e.text))
      const shown = `${kernel}, ${access}, ${ratio.toFixed(2)} times what it needs: ${text}`
      if (exception && ratio > 1.001) used.add(exception)
      t.ok(ratio <= (exception?.ratio ?? 1) + 0.001, shown)
    }
    for (const exception of EXCEPTIONS)
      t.ok(used.has(exception), `the exception for ${exception.kernel}, ${exception.text}, is still needed`)
  })
}
