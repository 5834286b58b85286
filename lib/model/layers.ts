// The layers: each records its forward operations and, on the tape, its backward ones. A pair stands together, so that
// what the backward pass needs is in plain sight. Dims: B batch, T time, N = B T rows, C channels.
import {
  attentionBwd,
  attentionFwd,
  embeddingBwd,
  embeddingFwd,
  linearCrossEntropyBwd,
  linearCrossEntropyFwd,
  matmulNn,
  matmulNt,
  matmulSwiglu,
  matmulTn,
  rmsnormBwd,
  rmsnormFwd,
  swigluBwd,
} from '../runtime/ops.gen.js'
import type { Recorder } from '../runtime/recorder.js'
import type { Tensor } from '../runtime/tensor.js'
import type { Parameter } from './parameters.js'

/**
 * Collects the backward operations while the forward ones are recorded, then records them in reverse order. Gradients
 * are kept by tensor; a second contribution to the same one is added by the operation that computes it (`add`).
 */
export class Tape {
  private readonly steps: (() => void)[] = []
  private readonly gradients = new Map<Tensor, Tensor>()
  private readonly started = new Set<Parameter>()

  /**
   * `training`: whether a backward pass will follow. `accumulate`: whether it adds to the parameters' gradients (all but
   * the first micro-batch of a step) or overwrites them.
   */
  constructor(
    readonly recorder: Recorder,
    readonly training: boolean,
    readonly accumulate = false,
  ) {}

  /** Registers how to get from the gradient of `output` to those of the inputs. */
  backward(output: Tensor, step: (gradient: Tensor) => void): void {
    if (!this.training) return
    this.steps.push(() => {
      const gradient = this.gradients.get(output)
      if (!gradient) return
      step(gradient)
      this.gradients.delete(output)
    })
  }

  /** What has been found of a tensor's gradient so far, to be passed as `add`. */
  gradient(of: Tensor): Tensor | undefined {
    return this.gradients.get(of)
  }

  setGradient(of: Tensor, gradient: Tensor): void {
    this.gradients.set(of, gradient)
  }

  /** What a parameter's gradient is to be added to: nothing for the first use, itself for the others. */
  partial(parameter: Parameter): Tensor | undefined {
    const first = !this.started.has(parameter) && !this.accumulate
    this.started.add(parameter)
    return first ? undefined : parameter.grad
  }

  /** Records the backward pass. */
  rewind(): void {
    while (this.steps.length > 0) this.steps.pop()!()
  }
}

/** ids (N) -> rows of w (V,C): (N,C) */
export function embedding(tape: Tape, ids: Tensor, w: Parameter): Tensor {
  const { y } = embeddingFwd(tape.recorder, { ids, w: w.value })
  tape.backward(y, (dy) => {
    if (w.grad) embeddingBwd(tape.recorder, { ids, dy, add: tape.partial(w), dw: w.grad })
  })
  return y
}

/** x (N,C), w (C) -> (N,C) */
export function rmsnorm(tape: Tape, x: Tensor, w: Parameter, eps: number): Tensor {
  const { y, rstd } = rmsnormFwd(tape.recorder, { x, w: w.value, eps })
  tape.backward(y, (dy) => {
    const dw = w.grad && { dw_add: tape.partial(w), dw: w.grad }
    const { dx } = rmsnormBwd(tape.recorder, { x, w: w.value, rstd, dy, add: tape.gradient(x), ...dw })
    tape.setGradient(x, dx)
  })
  return y
}

/** x (N,I), w (O,I) -> x w^T (+ residual): (N,O) */
export function linear(tape: Tape, x: Tensor, w: Parameter, residual?: Tensor): Tensor {
  const { c: y } = matmulNt(tape.recorder, { a: x, b: w.value, add: residual })
  tape.backward(y, (dy) => {
    linearBackward(tape, x, w, dy)
    // The gradient passes through the residual as it is; only operations that make a new tensor add to it later.
    if (residual) tape.setGradient(residual, dy)
  })
  return y
}

function linearBackward(tape: Tape, x: Tensor, w: Parameter, dy: Tensor): void {
  if (w.grad) matmulTn(tape.recorder, { a: dy, b: x, add: tape.partial(w), c: w.grad })
  const add = tape.gradient(x)
  const { c: dx } = matmulNn(tape.recorder, { a: dy, b: w.value, add, c: add })
  tape.setGradient(x, dx)
}

/** x (N,C), wGate and wUp (I,C) -> silu(x wGate^T) (x wUp^T): (N,I) */
export function gatedLinear(tape: Tape, x: Tensor, wGate: Parameter, wUp: Parameter): Tensor {
  const { recorder } = tape
  const { gate, up, y } = matmulSwiglu(recorder, { a: x, w_gate: wGate.value, w_up: wUp.value })
  tape.backward(y, (dy) => {
    const dgate = recorder.scratch(gate.dtype, gate.dims, 'mlp.dgate')
    const dup = recorder.scratch(up.dtype, up.dims, 'mlp.dup')
    swigluBwd(recorder, { gate, up, dy, dgate, dup })
    linearBackward(tape, x, wUp, dup)
    linearBackward(tape, x, wGate, dgate)
  })
  return y
}

/** Rotation and extent of every token: tables (P,D/2), row of the table and first visible position (B,T). */
export interface Positions {
  cos: Tensor
  sin: Tensor
  pos: Tensor
  first: Tensor
}

/** q (B,T,H,D), k and v (B,T,K,D), all unrotated -> (B,T,H,D); causal from `first` on, RoPE inside. */
export function attention(tape: Tape, q: Tensor, k: Tensor, v: Tensor, { cos, sin, pos, first }: Positions): Tensor {
  const scale = 1 / Math.sqrt(q.dims[3]!)
  const inputs = { q, k, v, cos, sin, pos, first, scale }
  const { o, lse } = attentionFwd(tape.recorder, inputs)
  tape.backward(o, (dout) => {
    const { dq, dk, dv } = attentionBwd(tape.recorder, { ...inputs, o, lse, dout })
    tape.setGradient(q, dq)
    tape.setGradient(k, dk)
    tape.setGradient(v, dv)
  })
  return o
}

/** The same elements under other dims; the gradient is seen through the same change. */
export function view(tape: Tape, x: Tensor, ...dims: number[]): Tensor {
  const y = x.view(...dims)
  tape.backward(y, (dy) => tape.setGradient(x, dy.view(...x.dims)))
  return y
}

/** Bytes of logits that exist at one time. More makes larger products, no faster ones. */
const LOGITS_BYTES = 16 << 20

/**
 * x (N,C), w (V,C), labels (N), -1 where there is none -> negative log-likelihoods (N). While training, the gradients
 * of sum_n weight[n] nll[n] come from the same pass: the logits, never whole, are computed once.
 */
export function crossEntropy(tape: Tape, x: Tensor, w: Parameter, labels: Tensor, weight: Tensor): Tensor {
  const rows = Math.floor(LOGITS_BYTES / (4 * w.value.dims[0]!))
  const chunk = Math.min(x.dims[0]!, Math.max(64, rows))
  if (!tape.training) return linearCrossEntropyFwd(tape.recorder, { x, w: w.value, labels, chunk }).nll
  const dw = w.grad && { dw_add: tape.partial(w), dw: w.grad }
  const { nll, dx } = linearCrossEntropyBwd(tape.recorder, { x, w: w.value, labels, weight, chunk, ...dw })
  tape.setGradient(x, dx)
  return nll
}
