// The whole model, top to bottom. The backward pass is the tape's, in reverse (layers.ts).
import { embeddingFwd, matmulNt } from '../runtime/ops.gen.js'
import type { Tensor } from '../runtime/tensor.js'
import type { LlamaConfig } from './config.js'
import { attention, crossEntropy, embedding, gatedLinear, linear, type Positions, rmsnorm, view } from './layers.js'
import type { Parameter, Parameters } from './parameters.js'
import { gather, scoredAttention, type ScoredTensors } from './scored.js'
import { InputStore, type Tape } from './tape.js'

/** Device tensors of one batch of B rows of T tokens, N = B T. */
export interface BatchTensors extends Positions {
  /** (N) i32 */
  ids: Tensor
  /** (N) i32, -1 where nothing is to be predicted; entry n is the token that follows ids[n]. */
  labels: Tensor
  /** (N) f32: what each prediction counts in the loss whose gradient is taken. */
  weight: Tensor
}

/** How a block's attention is computed: over the batch itself, or over a cache of keys and values. */
export type Attend = (tape: Tape, layer: number, q: Tensor, k: Tensor, v: Tensor) => Tensor

/** Names of a block's weights, in the order of their use. */
const BLOCK = {
  inputNorm: 'input_layernorm',
  q: 'self_attn.q_proj',
  k: 'self_attn.k_proj',
  v: 'self_attn.v_proj',
  o: 'self_attn.o_proj',
  postNorm: 'post_attention_layernorm',
  gate: 'mlp.gate_proj',
  up: 'mlp.up_proj',
  down: 'mlp.down_proj',
} as const

type BlockWeights = Record<keyof typeof BLOCK, Parameter>

/** The positions that are scored, R of each row, and how they attend to all. */
interface Few {
  choose(tape: Tape, x: Tensor): Tensor
  attend: Attend
}

/** x (N,C) -> (N,C): x + attention(norm(x)), then y + mlp(norm(y)); with `few`, only its positions: (B R,C). */
function block(
  tape: Tape,
  config: LlamaConfig,
  layer: number,
  w: BlockWeights,
  x: Tensor,
  batch: number,
  attend: Attend,
  few?: Few,
): Tensor {
  const { heads, kvHeads, headDim, rmsNormEps } = config
  const { checkpointLayers, mlpRows } = tape.options
  const time = x.dims[0]! / batch

  const project = (tape: Tape, x: Tensor): [Tensor, Tensor, Tensor] => {
    const h = rmsnorm(tape, x, w.inputNorm, rmsNormEps)
    return [linear(tape, few?.choose(tape, h) ?? h, w.q), linear(tape, h, w.k), linear(tape, h, w.v)]
  }
  // Where memory counts, the norm is computed once more rather than kept through the backward pass of attention.
  const [q, k, v] = checkpointLayers > 0 ? tape.checkpoint(x, project) : project(tape, x)
  const rows = q.dims[0]!
  const o = (few?.attend ?? attend)(
    tape,
    layer,
    view(tape, q, batch, rows / batch, heads, headDim),
    view(tape, k, batch, time, kvHeads, headDim),
    view(tape, v, batch, time, kvHeads, headDim),
  )
  const y = linear(tape, view(tape, o, rows, heads * headDim), w.o, few?.choose(tape, x) ?? x)

  const mlp = (tape: Tape, y: Tensor, out?: Tensor): Tensor => {
    const m = rmsnorm(tape, y, w.postNorm, rmsNormEps)
    return linear(tape, gatedLinear(tape, m, w.gate, w.up), w.down, y, out)
  }
  return mlpRows > 0 && mlpRows < rows ? tape.tiled(y, mlpRows, mlp) : mlp(tape, y)
}

/** ids (N) -> the last block's output (N,C), or (B R,C) of the positions of `few`, before the final norm. */
export function trunk(
  tape: Tape,
  config: LlamaConfig,
  parameters: Parameters,
  ids: Tensor,
  batch: number,
  attend: Attend,
  few?: Few,
): Tensor {
  const { checkpointLayers, offload } = tape.options
  const store = offload && tape.training ? new InputStore(tape.recorder) : undefined
  const embed = parameters.get('model.embed_tokens.weight')
  tape.part('embedding')
  tape.completes([embed])
  let x = embedding(tape, ids, embed)
  const blocks = (first: number, count: number) => (tape: Tape, x: Tensor) => {
    for (let layer = first; layer < first + count; layer++) {
      const of = (name: string): Parameter => parameters.get(`model.layers.${layer}.${name}.weight`)
      const weights = Object.fromEntries(Object.entries(BLOCK).map(([key, name]) => [key, of(name)])) as BlockWeights
      tape.part(`layer ${layer}`)
      tape.completes(Object.values(weights).flatMap((w) => (w.adapter ? [w, w.adapter.a, w.adapter.b] : [w])))
      const one = (tape: Tape, x: Tensor) =>
        [block(tape, config, layer, weights, x, batch, attend, layer === config.layers - 1 ? few : undefined)] as const
      // Of several layers that are computed again, the inputs are kept then; and each is computed once more on its turn.
      if (checkpointLayers > 1 && count > 1) [x] = tape.checkpoint(x, one)
      else [x] = one(tape, x)
    }
    return [x] as const
  }
  const step = checkpointLayers || config.layers
  for (let layer = 0; layer < config.layers; layer += step) {
    const count = Math.min(step, config.layers - layer)
    const last = layer + count === config.layers
    // The last one's input is needed again at once.
    if (checkpointLayers > 0) [x] = tape.checkpoint(x, blocks(layer, count), last ? undefined : store)
    else [x] = blocks(layer, count)(tape, x)
  }
  store?.settle()
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

/**
 * A batch -> negative log-likelihoods (N); with a training tape, the gradients of sum weight nll follow on rewind. With
 * `scored`, without training only, those of the positions that it names: (B R).
 */
export function losses(
  tape: Tape,
  config: LlamaConfig,
  parameters: Parameters,
  tensors: BatchTensors,
  batch: number,
  scored?: ScoredTensors,
): Tensor {
  const attend: Attend = (tape, _, q, k, v) => attention(tape, q, k, v, tensors)
  const few: Few | undefined = scored && {
    choose: (tape, x) => gather(tape, x, scored),
    attend: (tape, _, q, k, v) => scoredAttention(tape, q, k, v, tensors, scored),
  }
  const x = trunk(tape, config, parameters, tensors.ids, batch, attend, few)
  const norm = parameters.get('model.norm.weight')
  tape.part('output')
  tape.completes([norm])
  const h = rmsnorm(tape, x, norm, config.rmsNormEps)
  const out = head(config, parameters)
  if (!config.tied) tape.completes([out])
  return crossEntropy(tape, h, out, (scored ?? tensors).labels, tensors.weight)
}
