// The models that speed is measured on, as in a config.json.

/** Large enough for its products to be, small enough for two cores. */
export const LLAMA_25M = {
  model_type: 'llama',
  hidden_size: 512,
  intermediate_size: 1376,
  num_hidden_layers: 8,
  num_attention_heads: 8,
  num_key_value_heads: 8,
  head_dim: 64,
  vocab_size: 4096,
  max_position_embeddings: 4096,
  rms_norm_eps: 1e-5,
  tie_word_embeddings: true,
}

export type ModelConfig = typeof LLAMA_25M

/** A model of the size that people watch train in a terminal. */
export const LLAMA_1M: ModelConfig = {
  ...LLAMA_25M,
  hidden_size: 128,
  intermediate_size: 352,
  num_hidden_layers: 4,
  num_attention_heads: 4,
  num_key_value_heads: 4,
  head_dim: 32,
  vocab_size: 768,
}

/** Whatever executes it will soon be done. */
export const LLAMA_TINY: ModelConfig = {
  ...LLAMA_1M,
  hidden_size: 64,
  intermediate_size: 96,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 16,
  vocab_size: 200,
}

/** The shape of TinyLlama 1.1B. */
export const LLAMA_1B: ModelConfig = {
  ...LLAMA_25M,
  hidden_size: 2048,
  intermediate_size: 5632,
  num_hidden_layers: 22,
  num_attention_heads: 32,
  num_key_value_heads: 4,
  vocab_size: 32000,
  max_position_embeddings: 32768,
  tie_word_embeddings: false,
}

/** The shape of LLaMA 7B. */
export const LLAMA_7B: ModelConfig = {
  ...LLAMA_1B,
  hidden_size: 4096,
  intermediate_size: 11008,
  num_hidden_layers: 32,
  num_key_value_heads: 32,
  head_dim: 128,
}
