// Our own side of the cases of single operations: plans that repeat one operation on random data.
import { Device } from '../runtime/device.js'
import * as ops from '../runtime/ops.gen.js'
import { Recorder } from '../runtime/recorder.js'
import type { Tensor } from '../runtime/tensor.js'
import type { Side } from './measure.js'

export type Layout = 'nn' | 'nt' | 'tn'
export type Mode = 'fwd' | 'bwd' | 'fwd+bwd'

/** Records one operation, or a few, on tensors that are there already. */
type Record = (recorder: Recorder) => void

/** Makes a case's tensors on a device, and gives what to record. */
export type Kernel = (device: Device) => Promise<Record>

/** A side that runs `kernel` `repeats` times in one plan, so that what a single call costs does not count. */
export async function kernelSide(kernel: Kernel, work: number, repeats: number, threads: number): Promise<Side> {
  const device = Device.open('cpu', { threads })
  try {
    const recorder = new Recorder(device, 'bench')
    const record = await kernel(device)
    for (let i = 0; i < repeats; i++) record(recorder)
    const plan = recorder.plan()
    plan.load()
    const run = async (): Promise<number> => {
      const start = performance.now()
      await plan.run()
      return (performance.now() - start) / 1000
    }
    return { name: 'ropewalk', work: work * repeats, run, dispose: () => device.dispose() }
  } catch (error) {
    device.dispose()
    throw error
  }
}

/** Uniform numbers in (-scale, scale). */
export async function random(device: Device, dims: number[], scale = 1): Promise<Tensor> {
  const tensor = device.tensor('f32', dims, 'random numbers')
  const data = new Float32Array(tensor.size)
  for (let i = 0; i < data.length; i++) data[i] = scale * (2 * Math.random() - 1)
  await device.upload(tensor, data)
  return tensor
}

async function integers(device: Device, dims: number[], of: (i: number) => number): Promise<Tensor> {
  const tensor = device.tensor('i32', dims, 'integers')
  await device.upload(
    tensor,
    Int32Array.from({ length: tensor.size }, (_, i) => of(i)),
  )
  return tensor
}

const output = (device: Device, dims: number[]): Tensor => device.tensor('f32', dims, 'results')

export function matmul(layout: Layout, m: number, n: number, k: number): Kernel {
  return async (device) => {
    const a = await random(device, layout === 'tn' ? [k, m] : [m, k])
    const b = await random(device, layout === 'nt' ? [n, k] : [k, n])
    const c = output(device, [m, n])
    const emit = { nn: ops.matmulNn, nt: ops.matmulNt, tn: ops.matmulTn }[layout]
    return (recorder) => emit(recorder, { a, b, c })
  }
}

/** Causal, the rotary embedding included. */
export function attention(mode: Mode, time: number, heads: number, headDim: number): Kernel {
  return async (device) => {
    const dims = [1, time, heads, headDim]
    const unit = Math.sqrt(3) // of variance 1
    const [q, k, v, dout] = await Promise.all([1, 2, 3, 4].map(() => random(device, dims, unit)))
    const inputs = {
      ...{ q: q!, k: k!, v: v!, scale: 1 / Math.sqrt(headDim) },
      cos: await random(device, [time, headDim / 2]),
      sin: await random(device, [time, headDim / 2]),
      pos: await integers(device, [1, time], (t) => t),
      first: await integers(device, [1, time], () => 0),
    }
    const o = output(device, dims)
    const lse = output(device, [1, heads, time])
    const gradients = { dq: output(device, dims), dk: output(device, dims), dv: output(device, dims) }
    const forward: Record = (recorder) => ops.attentionFwd(recorder, { ...inputs, o, lse })
    const backward: Record = (recorder) => ops.attentionBwd(recorder, { ...inputs, o, lse, dout: dout!, ...gradients })
    if (mode === 'fwd') return forward
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

export function rmsnorm(mode: Mode, rows: number, channels: number): Kernel {
  return async (device) => {
    const dims = [rows, channels]
    const [x, dy] = await Promise.all([random(device, dims), random(device, dims)])
    const w = await random(device, [channels])
    const rstd = await random(device, [rows])
    const y = output(device, dims)
    const dw = output(device, [channels])
    if (mode === 'fwd') return (recorder) => ops.rmsnormFwd(recorder, { x, w, y, rstd, eps: 1e-5 })
    return (recorder) => ops.rmsnormBwd(recorder, { x, w, rstd, dy, dx: y, dw })
  }
}

export function swiglu(mode: Mode, size: number): Kernel {
  return async (device) => {
    const [gate, up, dy] = await Promise.all([1, 2, 3].map(() => random(device, [size])))
    const [dgate, dup] = [output(device, [size]), output(device, [size])]
    if (mode === 'fwd') return (recorder) => ops.swigluFwd(recorder, { gate: gate!, up: up!, y: dgate })
    return (recorder) => ops.swigluBwd(recorder, { gate: gate!, up: up!, dy: dy!, dgate, dup })
  }
}

export function linearCrossEntropy(rows: number, channels: number, vocabulary: number, chunk: number): Kernel {
  return async (device) => {
    const x = await random(device, [rows, channels], Math.sqrt(3))
    const w = await random(device, [vocabulary, channels], 0.035)
    const labels = await integers(device, [rows], () => Math.floor(vocabulary * Math.random()))
    const weight = await random(device, [rows], 1 / rows)
    const results = {
      nll: output(device, [rows]),
      dx: output(device, [rows, channels]),
      dw: output(device, [vocabulary, channels]),
    }
    return (recorder) => ops.linearCrossEntropyBwd(recorder, { x, w, labels, weight, chunk, ...results })
  }
}

export function adamw(size: number): Kernel {
  return async (device) => {
    const p = await random(device, [size], 0.02)
    const g = await random(device, [size], 0.01)
    const [m, v] = [output(device, [size]), output(device, [size])]
    const zeros = new Recorder(device, 'optimizer start')
    for (const y of [m, v]) ops.fill(zeros, { y, value: 0 })
    await zeros.plan().run()
    // learning rate, bias corrections of a later step, no clipping, scale 1, the norm, apply
    const hyper = device.tensor('f32', [8], 'hyper')
    await device.upload(hyper, Float32Array.of(1e-5, 0.9, 0.5, 0, 1, 1, 1, 0))
    const rest = { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0 }
    return (recorder) => ops.adamw(recorder, { p, g, m, v, hyper, ...rest })
  }
}
