import { quote, RopewalkError } from '../errors.js'
import { extendRope, readRope, type RopeConfig, type RopeExtension, writeRope } from '../rope.js'

/**
 * A LLaMA's dimensions, as its config.json gives them. Lengths in tokens.
 *
 * @category Models
 */
export interface LlamaConfig {
  /** C, channels (hidden_size). */
  hiddenSize: number
  /** Width of the MLP. */
  intermediateSize: number
  /** Number of decoder layers. */
  layers: number
  /** H, query heads */
  heads: number
  /** K, key/value heads; H is a multiple of K. */
  kvHeads: number
  /** D, even */
  headDim: number
  /** V */
  vocabSize: number
  /** Added to the mean square in RMSNorm (arXiv 1910.07467); default 1e-6. */
  rmsNormEps: number
  /** Whether lm_head is the embedding. */
  tied: boolean
  /** The window that the config states: positions 0 .. maxPositionEmbeddings - 1. */
  maxPositionEmbeddings: number
  /** The window that the model was first trained for, before any scaling. */
  originalMaxPositionEmbeddings: number
  /** How positions are scaled. */
  rope: RopeConfig
  /** bos_token_id, beginning of a sequence. */
  bosId: number | undefined
  /** eos_token_id, end of a sequence: none, one or several. */
  eosIds: number[]
  /** config.json as it was read; what is not understood is kept when the model is saved. */
  raw: Record<string, unknown>
}

/** Beyond these no checkpoint exists; a damaged config must not ask for terabytes. */
const LIMIT = 1 << 24

/**
 * Reads a config.json. Throws RopewalkError, naming the field, its value and the rule, for another architecture, for
 * what would be ignored (attention_bias, mlp_bias, other activations), and for values that contradict each other.
 */
export function readConfig(raw: Record<string, unknown>, path: string): LlamaConfig {
  const fail = (message: string): never => {
    throw new RopewalkError('ERR_CONFIG', `${path}: ${message}`)
  }
  const architectures = raw.architectures
  const named = Array.isArray(architectures) ? architectures : []
  if (raw.model_type !== 'llama' && !named.includes('LlamaForCausalLM')) {
    fail(
      `model_type is ${quote(raw.model_type)}, architectures ${quote(architectures)}: ropewalk supports the LLaMA ` +
        'architecture (LlamaForCausalLM: LLaMA, Llama 2, Llama 3.x, TinyLlama)',
    )
  }
  if (named.length > 0 && !named.includes('LlamaForCausalLM')) {
    fail(`architectures is ${quote(architectures)}, expected LlamaForCausalLM (a language model with its lm_head)`)
  }
  const whole = (field: string, fallback?: number): number => {
    const value = raw[field] ?? fallback
    if (typeof value !== 'number' || !Number.isInteger(value) || value < 1 || value > LIMIT) {
      return fail(`${field} is ${quote(value)}, but must be a whole number from 1 to ${LIMIT}`)
    }
    return value
  }
  const hiddenSize = whole('hidden_size')
  const heads = whole('num_attention_heads')
  const kvHeads = whole('num_key_value_heads', heads)
  const headDim = whole('head_dim', hiddenSize / heads)
  if (headDim % 2 !== 0) fail(`head_dim is ${headDim}, but rotary embeddings need an even one`)
  if (headDim > 512) fail(`head_dim is ${headDim}, but at most 512 is supported`)
  if (heads % kvHeads !== 0) {
    fail(`num_attention_heads (${heads}) is not a multiple of num_key_value_heads (${kvHeads})`)
  }
  for (const bias of ['attention_bias', 'mlp_bias']) {
    if (raw[bias])
      fail(`${bias} is ${quote(raw[bias])}: models with biases are not supported, and would be wrong without`)
  }
  if (raw.hidden_act !== undefined && raw.hidden_act !== 'silu' && raw.hidden_act !== 'swish') {
    fail(`hidden_act is ${quote(raw.hidden_act)}, but LLaMA's MLP is computed with silu only`)
  }
  if (raw.quantization_config) {
    fail('quantization_config is set: quantized checkpoints are not supported, use the original weights')
  }
  if (typeof raw.pretraining_tp === 'number' && raw.pretraining_tp < 1) fail(`pretraining_tp is ${raw.pretraining_tp}`)
  const eps = raw.rms_norm_eps ?? 1e-6
  if (typeof eps !== 'number' || !(eps > 0 && eps < 1)) fail(`rms_norm_eps is ${quote(eps)}, but must lie in (0, 1)`)
  let rope: RopeConfig
  try {
    rope = readRope(raw)
    writeRope(rope, 1)
  } catch (error) {
    return fail((error as Error).message)
  }
  const maxPositionEmbeddings = whole('max_position_embeddings', 2048)
  return {
    hiddenSize,
    intermediateSize: whole('intermediate_size'),
    layers: whole('num_hidden_layers'),
    heads,
    kvHeads,
    headDim,
    vocabSize: whole('vocab_size'),
    rmsNormEps: eps as number,
    tied: raw.tie_word_embeddings === true,
    maxPositionEmbeddings,
    originalMaxPositionEmbeddings: rope.originalMaxPositionEmbeddings ?? originalOf(rope, maxPositionEmbeddings),
    rope,
    bosId: ids(raw.bos_token_id, 'bos_token_id', fail)[0],
    eosIds: ids(raw.eos_token_id, 'eos_token_id', fail),
    raw,
  }
}

// A linear factor has raised the window (contextWindow()), whether or not the config says what it was.
const originalOf = ({ type, factor = 1 }: RopeConfig, window: number): number =>
  type === 'linear' ? Math.max(1, Math.round(window / factor)) : window

function ids(value: unknown, field: string, fail: (message: string) => never): number[] {
  if (value === undefined || value === null) return []
  const list: unknown[] = Array.isArray(value) ? value : [value]
  for (const id of list) {
    if (typeof id !== 'number' || !Number.isInteger(id)) fail(`${field} is ${quote(value)}, but must be a token id`)
  }
  return list as number[]
}

/**
 * The config with its context stretched. Types whose window is fixed by the factor (linear, ntk, yarn, llama3, longrope)
 * raise max_position_embeddings; dynamic NTK is defined relative to the unraised one and leaves it.
 */
export function extendConfig(config: LlamaConfig, extension: RopeExtension): LlamaConfig {
  const rope = extendRope(config.rope, { headDim: config.headDim, ...extension }, config.maxPositionEmbeddings)
  const factor = extension.factor ?? 1
  const window = extension.type === 'dynamic' ? config.maxPositionEmbeddings : config.maxPositionEmbeddings * factor
  return {
    ...config,
    rope,
    maxPositionEmbeddings: Math.round(window),
    originalMaxPositionEmbeddings: rope.originalMaxPositionEmbeddings ?? config.originalMaxPositionEmbeddings,
  }
}

/** The config without any scaling: the plain baseline of an evaluation. Its window is the original one. */
export function unscaled(config: LlamaConfig): LlamaConfig {
  const { rope, originalMaxPositionEmbeddings } = config
  return {
    ...config,
    rope: { type: 'default', theta: rope.theta, originalMaxPositionEmbeddings },
    maxPositionEmbeddings: originalMaxPositionEmbeddings,
  }
}

/** The longest context that the config promises, in tokens. */
export function contextWindow(config: LlamaConfig): number {
  const { rope, maxPositionEmbeddings } = config
  return rope.type === 'dynamic' ? Math.floor(maxPositionEmbeddings * (rope.factor ?? 1)) : maxPositionEmbeddings
}

/** config.json to save: the one that was read, with the positions in every spelling that loaders know. */
export function writeConfig(config: LlamaConfig, dtype: 'float32' | 'bfloat16'): Record<string, unknown> {
  const positions = writeRope(config.rope, config.originalMaxPositionEmbeddings)
  const raw: Record<string, unknown> = {
    ...config.raw,
    ...positions,
    max_position_embeddings: config.maxPositionEmbeddings,
  }
  // Both names of the weights' dtype: transformers 4.x reads torch_dtype, 5.x writes dtype.
  raw.torch_dtype = dtype
  if ('dtype' in config.raw || !('torch_dtype' in config.raw)) raw.dtype = dtype
  for (const [key, value] of Object.entries(raw)) if (value === undefined) delete raw[key]
  return raw
}

/** Name and dims of every parameter, in Hugging Face's names and in the order of the model. */
export function parameterShapes(config: LlamaConfig): { name: string; dims: number[] }[] {
  const { hiddenSize: c, intermediateSize: i, vocabSize: v, headDim: d } = config
  const shapes = [{ name: 'model.embed_tokens.weight', dims: [v, c] }]
  for (let layer = 0; layer < config.layers; layer++) {
    const prefix = `model.layers.${layer}.`
    shapes.push(
      { name: `${prefix}self_attn.q_proj.weight`, dims: [config.heads * d, c] },
      { name: `${prefix}self_attn.k_proj.weight`, dims: [config.kvHeads * d, c] },
      { name: `${prefix}self_attn.v_proj.weight`, dims: [config.kvHeads * d, c] },
      { name: `${prefix}self_attn.o_proj.weight`, dims: [c, config.heads * d] },
      { name: `${prefix}mlp.gate_proj.weight`, dims: [i, c] },
      { name: `${prefix}mlp.up_proj.weight`, dims: [i, c] },
      { name: `${prefix}mlp.down_proj.weight`, dims: [c, i] },
      { name: `${prefix}input_layernorm.weight`, dims: [c] },
      { name: `${prefix}post_attention_layernorm.weight`, dims: [c] },
    )
  }
  shapes.push({ name: 'model.norm.weight', dims: [c] })
  if (!config.tied) shapes.push({ name: 'lm_head.weight', dims: [v, c] })
  return shapes
}
