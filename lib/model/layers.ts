// The layers: each records its forward operations and, on the tape, its backward ones. A pair stands together, so that
// what the backward pass needs is in plain sight. Dims: B batch, T time, N = B T rows, C channels.
import {
  attentionBwd,
  attentionDelta,
  attentionFwd,
  cast,
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
  scale,
  swigluBwd,
  swigluFwd,
} from '../runtime/ops.gen.js'
import type { Tensor } from '../runtime/tensor.js'
import type { LowRank, Parameter } from './parameters.js'
import type { Tape } from './tape.js'

/** ids (N) -> rows of w (V,C): (N,C) */
export function embedding(tape: Tape, ids: Tensor, w: Parameter): Tensor {
  const { y } = embeddingFwd(tape.recorder, { ids, w: w.value })
  tape.backward(y, (dy) => {
    const dw = tape.parameterGradient(w)
    if (dw) embeddingBwd(tape.recorder, { ids, dy, add: dw.add, dw: dw.out })
  })
  return y
}

/** x (N,C), w (C) -> (N,C) */
export function rmsnorm(tape: Tape, x: Tensor, w: Parameter, eps: number): Tensor {
  const { y, rstd } = rmsnormFwd(tape.recorder, { x, w: w.value, eps })
  tape.backward(y, (dy) => {
    const dw = tape.parameterGradient(w)
    const weight = dw && { dw_add: dw.add, dw: dw.out }
    const inputs = { x, w: w.value, rstd, dy, add: tape.gradient(x), dx: tape.place(x) }
    tape.setGradient(x, rmsnormBwd(tape.recorder, { ...inputs, ...weight }).dx)
  })
  return y
}

/** x (N,I), w (O,I) -> x w^T (+ residual), and what w's adapter adds: (N,O), in `out` if that is given */
export function linear(tape: Tape, x: Tensor, w: Parameter, residual?: Tensor, out?: Tensor): Tensor {
  const { c: y } = matmulNt(tape.recorder, { a: x, b: w.value, add: residual, c: out })
  const adapterBackward = w.adapter && adapt(tape, x, w.adapter, y)
  tape.backward(y, (dy) => {
    linearBackward(tape, x, w, dy)
    adapterBackward?.(dy)
    // The gradient passes through the residual as it is; only operations that make a new tensor add to it later.
    if (residual) tape.setGradient(residual, dy)
  })
  return y
}

function linearBackward(tape: Tape, x: Tensor, w: Parameter, dy: Tensor): void {
  const dw = tape.parameterGradient(w)
  if (dw) matmulTn(tape.recorder, { a: dy, b: x, add: dw.add, c: dw.out })
  const add = tape.gradient(x)
  const { c: dx } = matmulNn(tape.recorder, { a: dy, b: w.value, add, c: add })
  tape.setGradient(x, dx)
}

/** y (N,O) += scale (x a^T) b^T, x (N,I), a (r,I), b (O,r). Gives what records the way back from y's gradient. */
function adapt(tape: Tape, x: Tensor, { a, b, scale: factor }: LowRank, y: Tensor): (dy: Tensor) => void {
  const { recorder } = tape
  const [wa, wb] = [narrowed(tape, a), narrowed(tape, b)]
  const { c: low } = matmulNt(recorder, { a: x, b: wa })
  scale(recorder, { x: low, a: factor, y: low })
  matmulNt(recorder, { a: low, b: wb, add: y, c: y })
  return (dy) => {
    const db = tape.parameterGradient(b)
    if (db) matmulTn(recorder, { a: dy, b: low, add: db.add, c: db.out })
    const { c: dlow } = matmulNn(recorder, { a: dy, b: wb })
    scale(recorder, { x: dlow, a: factor, y: dlow })
    const da = tape.parameterGradient(a)
    if (da) matmulTn(recorder, { a: dlow, b: x, add: da.add, c: da.out })
    const dx = tape.gradient(x)!
    matmulNn(recorder, { a: dlow, b: wa, add: dx, c: dx })
  }
}

/** An adapter's matrix as the activations are: tensor cores take no float32 beside bfloat16. */
function narrowed({ recorder }: Tape, { name, value }: Parameter): Tensor {
  if (value.dtype === recorder.activations) return value
  return cast(recorder, { x: value, y: recorder.scratch(recorder.activations, value.dims, name) }).y
}

/** gate and up (N,I) -> silu(gate) up: (N,I) */
function swiglu(tape: Tape, gate: Tensor, up: Tensor): Tensor {
  const { recorder } = tape
  const { y } = swigluFwd(recorder, { gate, up, y: recorder.scratch(gate.dtype, gate.dims, 'mlp.y') })
  tape.backward(y, (dy) => {
    const { dgate, dup } = swigluBackward(tape, gate, up, dy)
    tape.setGradient(gate, dgate)
    tape.setGradient(up, dup)
  })
  return y
}

function swigluBackward({ recorder }: Tape, gate: Tensor, up: Tensor, dy: Tensor): { dgate: Tensor; dup: Tensor } {
  const dgate = recorder.scratch(gate.dtype, gate.dims, 'mlp.dgate')
  const dup = recorder.scratch(up.dtype, up.dims, 'mlp.dup')
  return swigluBwd(recorder, { gate, up, dy, dgate, dup })
}

/** x (N,C), wGate and wUp (I,C) -> silu(x wGate^T) (x wUp^T): (N,I) */
export function gatedLinear(tape: Tape, x: Tensor, wGate: Parameter, wUp: Parameter): Tensor {
  if (wGate.adapter || wUp.adapter) return swiglu(tape, linear(tape, x, wGate), linear(tape, x, wUp))
  const { gate, up, y } = matmulSwiglu(tape.recorder, { a: x, w_gate: wGate.value, w_up: wUp.value })
  tape.backward(y, (dy) => {
    const { dgate, dup } = swigluBackward(tape, gate, up, dy)
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
  const compute = () => attentionFwd(tape.recorder, inputs)
  const { o, lse } = tape.options.keepAttention ? tape.keep(compute) : compute()
  tape.backward(o, (dout) => {
    const groups = tape.options.attentionGroups
    const { delta } = attentionDelta(tape.recorder, { o, dout })
    const { dq, dk, dv } = attentionBwd(tape.recorder, { ...inputs, delta, lse, dout, groups })
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

/** Rows of logits that exist at one time: where more would make larger products, no faster ones. */
function logitsRows(tape: Tape, rows: number, vocabulary: number): number {
  // A GPU adds to all of dw once for every part; the CPU likes what fits its caches.
  const many = tape.recorder.device.gpu ? 2048 : Math.max(64, Math.floor((16 << 20) / (4 * vocabulary)))
  // Numbers of scored positions are multiples of 64: no part is so small that its products are summed in another order.
  return Math.min(rows, tape.options.logitsRows || (tape.training ? many : many - (many % 64)))
}

/**
 * x (N,C), w (V,C), labels (N), -1 where there is none -> negative log-likelihoods (N). While training, the gradients
 * of sum_n weight[n] nll[n] come from the same pass: the logits, never whole, are computed once.
 */
export function crossEntropy(tape: Tape, x: Tensor, w: Parameter, labels: Tensor, weight: Tensor): Tensor {
  const chunk = logitsRows(tape, x.dims[0]!, w.value.dims[0]!)
  if (!tape.training) return linearCrossEntropyFwd(tape.recorder, { x, w: w.value, labels, chunk }).nll
  const dw = tape.parameterGradient(w)
  const gradient = dw && { dw_add: dw.add, dw: dw.out }
  const { nll, dx } = linearCrossEntropyBwd(tape.recorder, { x, w: w.value, labels, weight, chunk, ...gradient })
  tape.setGradient(x, dx)
  return nll
}
