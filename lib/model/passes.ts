import type { Buffer, Device } from '../runtime/device.js'
import type { Plan } from '../runtime/plan.js'
import { Recorder } from '../runtime/recorder.js'
import type { Tensor } from '../runtime/tensor.js'
import { allocBatch, type Batch, freeTensors, type HostTensor, rotationRows, uploadBatch } from './batch.js'
import type { LlamaConfig } from './config.js'
import { type Attend, type BatchTensors, logits, losses, trunk } from './forward.js'
import { attention } from './layers.js'
import type { Parameter, Parameters } from './parameters.js'
import { allocScored, type Scored, scatter, type ScoredTensors, uploadScored } from './scored.js'
import { type ActivationOptions, type Gradients, Tape } from './tape.js'

export type PassKind = 'logits' | 'loss' | 'gradients' | 'accumulate'

/** What a pass computes for batches of `rows` x `time` tokens, recorded once. */
export interface Pass {
  kind: PassKind
  rows: number
  time: number
  plan: Plan
  tensors: BatchTensors
  /** Of a pass that gives the losses of some positions only. */
  scored?: ScoredTensors
  /** Logits (N,V), or negative log-likelihoods (N), or (B R) of scored positions; valid after a run. */
  output: Tensor
  /** What the rotation tables hold now. */
  tables: { key?: string }
}

export interface PassOptions {
  /** Of `loss`: how many positions of each row are scored; default: all. */
  scored?: number
  /** Batch tensors of another pass of the same shape, with what its rotation tables hold. */
  share?: Pick<Pass, 'tensors' | 'tables'>
  /** Memory of other passes that never run at the same time; at least the plan's `peakBytes`. */
  arena?: Buffer
  /** Where the gradients of `gradients` and `accumulate` go. */
  gradients?: Gradients
  /** What is kept for the backward pass; default: everything. */
  activations?: ActivationOptions
  /** Called once the forward pass is recorded, before the backward one. */
  onLosses?: (recorder: Recorder, losses: Tensor, tensors: BatchTensors) => void
  hostArena?: Buffer
  onRefused?: (message: string) => void
}

/**
 * Records a pass over batches of `rows` x `time` tokens. `gradients` also writes the parameters' gradients, of the sum
 * of weight times negative log-likelihood; `accumulate` adds to them.
 */
export function recordPass(
  device: Device,
  config: LlamaConfig,
  parameters: Parameters,
  kind: PassKind,
  rows: number,
  time: number,
  { scored: count, share, gradients, activations, onLosses, ...memory }: PassOptions = {},
): Pass {
  const tensors = share?.tensors ?? allocBatch(device, config, rows, time)
  const scored = count === undefined ? undefined : allocScored(device, rows, time, count)
  const recorder = new Recorder(device, `${kind} of ${rows} x ${time} tokens`, device.activationsFor(parameters.dtype))
  const training = kind === 'gradients' || kind === 'accumulate'
  const tape = training
    ? Tape.training(recorder, gradients ?? { of: () => undefined }, kind === 'accumulate', activations)
    : Tape.forward(recorder, activations)
  let output: Tensor
  if (kind === 'logits') {
    const attend: Attend = (tape, _, q, k, v) => attention(tape, q, k, v, tensors)
    output = logits(tape, config, parameters, trunk(tape, config, parameters, tensors.ids, rows, attend))
  } else {
    if (training) gradients?.begin?.(recorder)
    output = losses(tape, config, parameters, tensors, rows, scored)
    onLosses?.(recorder, output, tensors)
    tape.rewind()
    if (training) gradients?.end?.(recorder)
  }
  const plan = recorder.plan({ keep: [output], prune: true, ...memory })
  return { kind, rows, time, plan, tensors, ...(scored && { scored }), output, tables: share?.tables ?? {} }
}

/** Uploads a batch and runs a pass over it; gives the output's values. */
export async function runPass(
  device: Device,
  config: LlamaConfig,
  pass: Pass,
  batch: Batch,
  weight?: Float32Array,
): Promise<Float32Array> {
  pass.plan.load()
  await uploadBatch(device, config, pass.tensors, batch, pass.tables, weight)
  await pass.plan.run()
  return device.downloadFloats(pass.plan.located(pass.output))
}

/** The same of a pass that scores some positions: gives the losses of all (N), 0 of the others. */
export async function runScored(
  device: Device,
  config: LlamaConfig,
  pass: Pass,
  batch: Batch,
  scored: Scored,
): Promise<Float32Array> {
  const { index } = rotationRows(config, batch.positions)
  await uploadScored(device, pass.scored!, scored, batch, index)
  return scatter(await runPass(device, config, pass, batch), scored, batch.rows * batch.time)
}

export function disposePass(pass: Pass): void {
  pass.plan.dispose()
  freeTensors(pass.tensors)
  if (pass.scored) freeTensors(pass.scored)
}

/** Gradients of the mean loss of a batch in float32, for all parameters of the groups, the first of which is the model. */
export async function gradientsOf(
  device: Device,
  config: LlamaConfig,
  groups: readonly Parameters[],
  batch: Batch,
): Promise<Map<string, HostTensor<Float32Array>>> {
  const buffers = new Map<Parameters, Buffer>()
  let pass: Pass | undefined
  try {
    for (const group of groups) buffers.set(group, device.alloc(group.elements * 4, 'gradients (f32)'))
    const of = ({ name }: Parameter): Tensor => {
      const group = groups.find((one) => one.has(name))!
      return group.in(buffers.get(group)!, 'f32', name)
    }
    pass = recordPass(device, config, groups[0]!, 'gradients', batch.rows, batch.time, { gradients: { of } })
    await runPass(device, config, pass, batch)
    const result = new Map<string, HostTensor<Float32Array>>()
    for (const parameter of groups.flatMap((group) => [...group])) {
      const gradient = of(parameter)
      result.set(parameter.name, {
        type: 'float32',
        dims: gradient.dims,
        data: await device.downloadFloats(gradient),
      })
    }
    return result
  } finally {
    if (pass) disposePass(pass)
    for (const buffer of buffers.values()) buffer.dispose()
  }
}

/** How many passes are kept for calls of the same shape, and the bytes of all but the newest. */
const KEPT = 8
const KEPT_BYTES = 256 << 20

/** The passes used last, so that calls of the same shape record and allocate only once. */
export class PassCache {
  private readonly passes = new Map<string, Pass>()

  get(kind: PassKind, rows: number, time: number, scored: number | undefined, record: () => Pass): Pass {
    const key = `${kind} ${rows} ${time} ${scored ?? 'all'}`
    const known = this.passes.get(key)
    this.passes.delete(key)
    // Before a new one is allocated, the oldest go: memory for two large shapes may not be there.
    let bytes = 0
    let count = 1
    for (const [name, pass] of [...this.passes].reverse()) {
      bytes += pass.plan.peakBytes + Object.values(pass.tensors).reduce((sum, tensor) => sum + tensor.bytes, 0)
      if (bytes <= KEPT_BYTES && ++count <= KEPT) continue
      this.passes.delete(name)
      disposePass(pass)
    }
    const pass = known ?? record()
    this.passes.set(key, pass)
    return pass
  }

  clear(): void {
    for (const pass of this.passes.values()) disposePass(pass)
    this.passes.clear()
  }
}
