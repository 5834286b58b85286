import { didYouMean, quote } from '../errors.js'

/** hidden_size, intermediate_size, layers, heads, kv heads, vocab_size, max_position_embeddings, the rest */
type Shape = readonly [number, number, number, number, number, number, number, Record<string, unknown>?]

const LLAMA_3 = { rms_norm_eps: 1e-5, rope_theta: 500_000 }
const llama31 = (factor: number): Record<string, unknown> => ({
  ...LLAMA_3,
  rope_scaling: {
    rope_type: 'llama3',
    factor,
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_max_position_embeddings: 8192,
  },
})

/** As in the models' own config.json. 7b to 65b are the first LLaMA, whose context the paper extends. */
const SHAPES: Record<string, Shape> = {
  '7b': [4096, 11008, 32, 32, 32, 32000, 2048],
  '13b': [5120, 13824, 40, 40, 40, 32000, 2048],
  '33b': [6656, 17920, 60, 52, 52, 32000, 2048],
  '65b': [8192, 22016, 80, 64, 64, 32000, 2048],
  'llama2-7b': [4096, 11008, 32, 32, 32, 32000, 4096, { rms_norm_eps: 1e-5 }],
  'llama2-13b': [5120, 13824, 40, 40, 40, 32000, 4096, { rms_norm_eps: 1e-5 }],
  'llama2-70b': [8192, 28672, 80, 64, 8, 32000, 4096, { rms_norm_eps: 1e-5 }],
  'llama3-8b': [4096, 14336, 32, 32, 8, 128256, 8192, LLAMA_3],
  'llama3-70b': [8192, 28672, 80, 64, 8, 128256, 8192, LLAMA_3],
  'llama3.1-8b': [4096, 14336, 32, 32, 8, 128256, 131072, llama31(8)],
  'llama3.2-1b': [2048, 8192, 16, 32, 8, 128256, 131072, { ...llama31(32), tie_word_embeddings: true }],
  'llama3.2-3b': [3072, 8192, 28, 24, 8, 128256, 131072, { ...llama31(32), tie_word_embeddings: true }],
}

/** Names of models whose shapes are known. */
export const modelPresets: readonly string[] = Object.keys(SHAPES)

/** The content of a known model's config.json. Throws RangeError, with what was perhaps meant. */
export function presetConfig(name: string): Record<string, unknown> {
  const shape = Object.hasOwn(SHAPES, name) ? SHAPES[name]! : undefined
  if (!shape) {
    const guess = didYouMean(name, modelPresets)
    throw new RangeError(
      `there is no model ${quote(name)}${guess}${guess ? ' Known' : '; known'} are ${modelPresets.join(', ')}, ` +
        'or the path of a model folder or config.json',
    )
  }
  const [hidden, intermediate, layers, heads, kvHeads, vocabulary, window, more] = shape
  return {
    model_type: 'llama',
    hidden_size: hidden,
    intermediate_size: intermediate,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    vocab_size: vocabulary,
    max_position_embeddings: window,
    ...more,
  }
}
