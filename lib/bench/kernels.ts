// Our own side of the cases of single operations: plans that repeat one operation on random data.
import { Device } from '../runtime/device.js'
import * as ops from '../runtime/ops.gen.js'
import { type Plan } from '../runtime/plan.js'
import { Recorder } from '../runtime/recorder.js'
import { DTYPE_BYTES, type PlainDType, Tensor } from '../runtime/tensor.js'
import { integers, random, result } from './data.js'
import type { Side } from './measure.js'

export type Layout = 'nn' | 'nt' | 'tn'
export type Mode = 'fwd' | 'bwd' | 'fwd+bwd'

/** What a case runs on: a device's name and, on the CPU, the number of threads. */
export interface Target {
  device: string
  threads: number
}

export const openTarget = ({ device, threads }: Target): Device => Device.open(device, threads > 0 ? { threads } : {})

/** Records one operation, or a few, on tensors that are there already. */
type Record = (recorder: Recorder) => void

/** Makes a case's tensors on a device, and gives what to record. */
export type Kernel = (device: Device) => Promise<Record>

export interface Repeats {
  /** How often the operation is in the plan; 'measured': as often as it takes for a run of `RUN_SECONDS`. */
  count: number | 'measured'
  /** Sets of tensors that the repeats use in turn, so that none finds its own in a cache. */
  sets?: number
}

/** Seconds of a run to aim at: what it costs to start a plan and to learn of its end is then no part of the figure. */
export const RUN_SECONDS = 0.03
const MOST_REPEATS = 1000

/** A side that runs `kernel` many times in one plan; `work` is that of one time. */
export async function kernelSide(
  kernel: Kernel,
  work: number,
  target: Target,
  { count, sets = 1 }: Repeats,
): Promise<Side & { repeats: number }> {
  const device = openTarget(target)
  try {
    const records: Record[] = []
    while (records.length < sets) records.push(await kernel(device))
    const plan = (repeats: number): Plan => {
      const recorder = new Recorder(device, 'bench')
      for (let i = 0; i < repeats; i++) records[i % sets]!(recorder)
      const plan = recorder.plan()
      plan.load()
      return plan
    }
    const repeats = count === 'measured' ? await repeatsFor(plan) : count
    const whole = plan(repeats)
    const run = (): Promise<number> => seconds(whole)
    return { name: 'ropewalk', work: work * repeats, repeats, run, dispose: () => device.dispose() }
  } catch (error) {
    device.dispose()
    throw error
  }
}

async function repeatsFor(planOf: (repeats: number) => Plan): Promise<number> {
  const once = planOf(1)
  try {
    let best = Infinity
    for (let i = 0; i < 3; i++) best = Math.min(best, await seconds(once))
    return Math.max(1, Math.min(MOST_REPEATS, Math.round(RUN_SECONDS / best)))
  } finally {
    once.dispose()
  }
}

async function seconds(plan: Plan): Promise<number> {
  const start = performance.now()
  await plan.run()
  return (performance.now() - start) / 1000
}

export function matmul(layout: Layout, m: number, n: number, k: number, dtype: PlainDType = 'f32'): Kernel {
  return async (device) => {
    const a = await random(device, dtype, layout === 'tn' ? [k, m] : [m, k])
    const b = await random(device, dtype, layout === 'nt' ? [n, k] : [k, n])
    const c = result(device, dtype, [m, n])
    const emit = { nn: ops.matmulNn, nt: ops.matmulNt, tn: ops.matmulTn }[layout]
    return (recorder) => emit(recorder, { a, b, c })
  }
}

export interface AttentionShape {
  batch: number
  time: number
  heads: number
  kvHeads: number
  headDim: number
}

/** Queries, keys and values of variance 1, positions 0 .. T-1, causal. */
async function attentionInputs(
  device: Device,
  dtype: PlainDType,
  { batch, time, heads, kvHeads, headDim }: AttentionShape,
) {
  const of = (count: number): Promise<Tensor> => random(device, dtype, [batch, time, count, headDim], Math.sqrt(3))
  const angle = (t: number, i: number): number => t * 10000 ** (-i / (headDim / 2))
  const half = headDim / 2
  const table = async (f: (x: number) => number): Promise<Tensor> => {
    const tensor = device.tensor('f32', [time, half], 'rotation table')
    const values = Float32Array.from({ length: time * half }, (_, n) => f(angle(Math.floor(n / half), n % half)))
    await device.upload(tensor, values)
    return tensor
  }
  return {
    ...{ q: await of(heads), k: await of(kvHeads), v: await of(kvHeads), scale: 1 / Math.sqrt(headDim) },
    ...{ cos: await table(Math.cos), sin: await table(Math.sin) },
    pos: await integers(device, [batch, time], (n) => n % time),
    first: await integers(device, [batch, time], () => 0),
  }
}

/** Causal, the rotary embedding included. */
export function attention(mode: Mode, shape: AttentionShape, dtype: PlainDType = 'f32'): Kernel {
  return async (device) => {
    const { batch, time, heads } = shape
    const inputs = await attentionInputs(device, dtype, shape)
    const { q, k } = inputs
    const o = result(device, dtype, q.dims)
    const lse = result(device, 'f32', [batch, heads, time])
    const forward: Record = (recorder) => ops.attentionFwd(recorder, { ...inputs, o, lse })
    if (mode === 'fwd') return forward
    const dout = await random(device, dtype, q.dims, Math.sqrt(3))
    const [dq, dk, dv] = [q, k, k].map(({ dims }) => result(device, dtype, dims)) as [Tensor, Tensor, Tensor]
    const delta = result(device, 'f32', lse.dims)
    const backward: Record = (recorder) => {
      ops.attentionDelta(recorder, { o, dout, delta })
      ops.attentionBwd(recorder, { ...inputs, delta, lse, dout, dq, dk, dv, groups: 1 })
    }
    if (mode === 'bwd') {
      const recorder = new Recorder(device, 'what the backward pass needs')
      forward(recorder)
      await recorder.plan().run()
      return backward
    }
    return (recorder) => {
      forward(recorder)
      backward(recorder)
    }
  }
}

const cacheDims = ({ batch, time, kvHeads, headDim }: AttentionShape): number[] => [batch, kvHeads, time, headDim]

/** The forward pass over keys that were rotated before: what is left of attention_fwd without the rotation of its keys. */
export function attentionOfRotated(shape: AttentionShape, dtype: PlainDType = 'f32'): Kernel {
  return async (device) => {
    const { k, v, ...inputs } = await attentionInputs(device, dtype, shape)
    const [k_cache, v_cache] = [k.view(...cacheDims(shape)), v.view(...cacheDims(shape))]
    const o = result(device, dtype, inputs.q.dims)
    const last = await integers(device, [shape.batch, shape.time], (n) => n % shape.time)
    return (recorder) => ops.attentionCached(recorder, { ...inputs, k_cache, v_cache, last, o })
  }
}

/** Rotating keys, and copying values, into a cache. */
export function append(shape: AttentionShape, dtype: PlainDType = 'f32'): Kernel {
  return async (device) => {
    const { k, v, cos, sin, pos } = await attentionInputs(device, dtype, shape)
    const slot = await integers(device, [shape.batch, shape.time], (n) => n % shape.time)
    const [k_cache, v_cache] = [
      await random(device, dtype, cacheDims(shape)),
      await random(device, dtype, cacheDims(shape)),
    ]
    return (recorder) => ops.kvAppend(recorder, { k, v, cos, sin, pos, slot, k_cache, v_cache })
  }
}

export function rmsnorm(mode: Mode, rows: number, channels: number, dtype: PlainDType = 'f32'): Kernel {
  return async (device) => {
    const dims = [rows, channels]
    const [x, dy] = [await random(device, dtype, dims), await random(device, dtype, dims)]
    const w = await random(device, dtype, [channels])
    const rstd = await random(device, 'f32', [rows])
    const y = result(device, dtype, dims)
    const dw = result(device, 'f32', [channels])
    if (mode === 'fwd') return (recorder) => ops.rmsnormFwd(recorder, { x, w, y, rstd, eps: 1e-5 })
    return (recorder) => ops.rmsnormBwd(recorder, { x, w, rstd, dy, dx: y, dw })
  }
}

export function swiglu(mode: Mode, size: number, dtype: PlainDType = 'f32'): Kernel {
  return async (device) => {
    const [gate, up] = [await random(device, dtype, [size]), await random(device, dtype, [size])]
    const dgate = result(device, dtype, [size])
    if (mode === 'fwd') return (recorder) => ops.swigluFwd(recorder, { gate, up, y: dgate })
    const [dy, dup] = [await random(device, dtype, [size]), result(device, dtype, [size])]
    return (recorder) => ops.swigluBwd(recorder, { gate, up, dy, dgate, dup })
  }
}

export function linearCrossEntropy(
  rows: number,
  channels: number,
  vocabulary: number,
  chunk: number,
  dtype: PlainDType = 'f32',
): Kernel {
  return async (device) => {
    const x = await random(device, dtype, [rows, channels], Math.sqrt(3))
    const w = await random(device, dtype, [vocabulary, channels], 0.035)
    const labels = await integers(device, [rows], () => Math.floor(vocabulary * Math.random()))
    const weight = await random(device, 'f32', [rows], 1 / rows)
    const results = {
      nll: result(device, 'f32', [rows]),
      dx: result(device, dtype, [rows, channels]),
      dw: result(device, 'f32', [vocabulary, channels]),
    }
    return (recorder) => ops.linearCrossEntropyBwd(recorder, { x, w, labels, weight, chunk, ...results })
  }
}

export function embedding(
  mode: Mode,
  rows: number,
  channels: number,
  vocabulary: number,
  dtype: PlainDType = 'f32',
): Kernel {
  return async (device) => {
    const ids = await integers(device, [rows], () => Math.floor(vocabulary * Math.random()))
    const x = await random(device, dtype, [mode === 'fwd' ? vocabulary : rows, channels])
    if (mode === 'fwd') {
      const y = result(device, dtype, [rows, channels])
      return (recorder) => ops.embeddingFwd(recorder, { ids, w: x, y })
    }
    const dw = result(device, 'f32', [vocabulary, channels])
    return (recorder) => ops.embeddingBwd(recorder, { ids, dy: x, dw })
  }
}

/** How an update keeps things; gradients are bf16 where all else is. */
export interface Optimizer {
  weights: 'f32' | 'master' | 'low' | 'stochastic'
  states: 'f32' | 'bf16' | 'u8'
}

/** What is measured, and the part of the copy's rate that it is to reach. */
export const OPTIMIZERS: readonly (readonly [name: string, optimizer: Optimizer, least: number])[] = [
  ['f32', { weights: 'f32', states: 'f32' }, 0.8],
  ['bf16 with f32 masters', { weights: 'master', states: 'f32' }, 0.8],
  ['bf16, stochastic, bf16 states', { weights: 'stochastic', states: 'bf16' }, 0.8],
  ['f32, 8-bit states', { weights: 'f32', states: 'u8' }, 0.85],
  ['bf16 with remainders, 8-bit states', { weights: 'low', states: 'u8' }, 0.85],
  ['bf16, stochastic, 8-bit states', { weights: 'stochastic', states: 'u8' }, 0.85],
]

const WEIGHT_BYTES = { f32: 8, master: 10, low: 8, stochastic: 4 }
const STATE_BYTES = { f32: 16, bf16: 8, u8: 4 + 16 / 256 }
const gradientsOf = ({ weights, states }: Optimizer): PlainDType =>
  states === 'f32' || weights === 'f32' ? 'f32' : 'bf16'

/** Bytes that an update reads and writes for an element. f32 masters are read and written, their p is written. */
export const adamwBytes = (optimizer: Optimizer): number =>
  WEIGHT_BYTES[optimizer.weights] + STATE_BYTES[optimizer.states] + DTYPE_BYTES[gradientsOf(optimizer)]

/** Of a case; with the bytes of an element where these are not plain from the dtypes. */
export const adamwName = (name: string, optimizer: Optimizer, size: number): string =>
  `${name}${optimizer.states === 'u8' ? ` (${adamwBytes(optimizer).toFixed(2)} bytes each)` : ''} ${size}`

export function adamw(size: number, optimizer: Optimizer = { weights: 'f32', states: 'f32' }): Kernel {
  const { weights, states } = optimizer
  return async (device) => {
    const p = await random(device, weights === 'f32' ? 'f32' : 'bf16', [size], 0.02)
    const master = weights === 'master' ? await random(device, 'f32', [size], 0.02) : undefined
    const g = await random(device, gradientsOf(optimizer), [size], 0.01)
    const zeros = new Recorder(device, 'optimizer start')
    // zero bytes are 0 in every dtype
    const zero = (dtype: PlainDType, elements: number): Tensor => {
      const to = result(device, dtype, [elements])
      ops.fill(zeros, { y: new Tensor(to.storage, 0, 'f32', [to.bytes / 4]), value: 0 })
      return to
    }
    const low = weights === 'low' ? zero('u16', size) : undefined
    const [m, v] = [zero(states, size), zero(states, size)]
    const scales = states === 'u8' && { m_scale: zero('f32', size / 256), v_scale: zero('f32', size / 256) }
    await zeros.plan().run()
    // learning rate, bias corrections of a later step, no clipping, scale 1, the norm, apply
    const hyper = device.tensor('f32', [8], 'hyper')
    await device.upload(hyper, Float32Array.of(1e-5, 0.9, 0.5, 0, 1, 1, 1, 1))
    const rest = { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0, seed: 0, first: 0 }
    const args = { p, master, low, g, m, v, hyper, ...rest }
    return (recorder) => (scales ? ops.adamw8bit(recorder, { ...args, ...scales }) : ops.adamw(recorder, args))
  }
}

/** Our own copy, element by element. */
export function copy(size: number, dtype: PlainDType = 'f32'): Kernel {
  return async (device) => {
    const x = await random(device, dtype, [size])
    const y = result(device, dtype, [size])
    return (recorder) => ops.cast(recorder, { x, y })
  }
}
