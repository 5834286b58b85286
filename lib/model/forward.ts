// The whole model, top to bottom. The backward pass is the tape's, in reverse (layers.ts).
import { embeddingFwd, matmulNt } from '../runtime/ops.gen.js'
import type { Tensor } from '../runtime/tensor.js'
import type { LlamaConfig } from './config.js'
import {
  attention,
  crossEntropy,
  embedding,
  gatedLinear,
  linear,
  type Positions,
  rmsnorm,
  type Tape,
  view,
} from './layers.js'
import type { Parameter, Parameters } from './parameters.js'

/** Device tensors of one batch of B rows of T tokens, N = B T. */
export interface BatchTensors extends Positions {
  /** (N) i32 */
  ids: Tensor
  /** (N) i32, -1 where nothing is to be predicted; entry n is the token that follows ids[n]. */
  labels: Tensor
  /** (N) f32: what each prediction counts in the loss whose gradient is taken. */
  weight: Tensor
}

interface BlockWeights {
  inputNorm: Parameter
  q: Parameter
  k: Parameter
  v: Parameter
  o: Parameter
  postNorm: Parameter
  gate: Parameter
  up: Parameter
  down: Parameter
}

/** How a block's attention is computed: over the batch itself, or over a cache of keys and values. */
export type Attend = (layer: number, q: Tensor, k: Tensor, v: Tensor) => Tensor

/** x (N,C) -> (N,C): x + attention(norm(x)), then y + mlp(norm(y)). */
function block(
  tape: Tape,
  config: LlamaConfig,
  layer: number,
  w: BlockWeights,
  x: Tensor,
  batch: number,
  attend: Attend,
) {
  const { heads, kvHeads, headDim, rmsNormEps } = config
  const time = x.dims[0]! / batch

  const h = rmsnorm(tape, x, w.inputNorm, rmsNormEps)
  const q = view(tape, linear(tape, h, w.q), batch, time, heads, headDim)
  const k = view(tape, linear(tape, h, w.k), batch, time, kvHeads, headDim)
  const v = view(tape, linear(tape, h, w.v), batch, time, kvHeads, headDim)
  const o = view(tape, attend(layer, q, k, v), batch * time, heads * headDim)
  const y = linear(tape, o, w.o, x)

  const m = rmsnorm(tape, y, w.postNorm, rmsNormEps)
  return linear(tape, gatedLinear(tape, m, w.gate, w.up), w.down, y)
}

/** ids (N) -> the last block's output (N,C), before the final norm. */
export function trunk(
  tape: Tape,
  config: LlamaConfig,
  parameters: Parameters,
  ids: Tensor,
  batch: number,
  attend: Attend,
): Tensor {
  let x = embedding(tape, ids, parameters.get('model.embed_tokens.weight'))
  for (let layer = 0; layer < config.layers; layer++) {
    const of = (name: string): Parameter => parameters.get(`model.layers.${layer}.${name}.weight`)
    const weights: BlockWeights = {
      inputNorm: of('input_layernorm'),
      q: of('self_attn.q_proj'),
      k: of('self_attn.k_proj'),
      v: of('self_attn.v_proj'),
      o: of('self_attn.o_proj'),
      postNorm: of('post_attention_layernorm'),
      gate: of('mlp.gate_proj'),
      up: of('mlp.up_proj'),
      down: of('mlp.down_proj'),
    }
    x = block(tape, config, layer, weights, x, batch, attend)
  }
  return x
}

/** The output matrix (V,C): lm_head, or the embedding where they are tied. */
export function head(config: LlamaConfig, parameters: Parameters): Parameter {
  return parameters.get(config.tied ? 'model.embed_tokens.weight' : 'lm_head.weight')
}

/** Final norm, and logits (R,V) in f32 of all rows or of those listed in `rows` (R). */
export function logits(tape: Tape, config: LlamaConfig, parameters: Parameters, x: Tensor, rows?: Tensor): Tensor {
  const chosen = rows ? embeddingFwd(tape.recorder, { ids: rows, w: x }).y : x
  const h = rmsnorm(tape, chosen, parameters.get('model.norm.weight'), config.rmsNormEps)
  const w = head(config, parameters)
  const c = tape.recorder.scratch('f32', [h.dims[0]!, w.value.dims[0]!], 'logits')
  return matmulNt(tape.recorder, { a: h, b: w.value, c }).c
}

/** A batch -> negative log-likelihoods (N); with a training tape, the gradients of sum weight nll follow on rewind. */
export function losses(
  tape: Tape,
  config: LlamaConfig,
  parameters: Parameters,
  tensors: BatchTensors,
  batch: number,
): Tensor {
  const attend: Attend = (_, q, k, v) => attention(tape, q, k, v, tensors)
  const x = trunk(tape, config, parameters, tensors.ids, batch, attend)
  const h = rmsnorm(tape, x, parameters.get('model.norm.weight'), config.rmsNormEps)
  return crossEntropy(tape, h, head(config, parameters), tensors.labels, tensors.weight)
}
