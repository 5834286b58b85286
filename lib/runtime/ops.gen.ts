// Generated from csrc/ops.def by scripts/ops.js (`npm run build:ops`). Edit the table, not this file.
import type { OpRow, Recorder } from './recorder.js'
import type { Tensor } from './tensor.js'

export const OPS = [
  {
    name: 'embedding_fwd',
    opcode: 0,
    fields: [
      { kind: 'IN', name: 'ids', dtype: 'i32', dims: ['N'] },
      { kind: 'IN', name: 'w', dtype: 'W', dims: ['V', 'C'] },
      { kind: 'OUT', name: 'y', dtype: 'F', dims: ['N', 'C'] },
    ],
    flops: () => 0,
  },
  {
    name: 'embedding_bwd',
    opcode: 1,
    fields: [
      { kind: 'IN', name: 'ids', dtype: 'i32', dims: ['N'] },
      { kind: 'IN', name: 'dy', dtype: 'F', dims: ['N', 'C'] },
      { kind: 'OPT', name: 'add', dtype: 'G', dims: ['V', 'C'] },
      { kind: 'OUT', name: 'dw', dtype: 'G', dims: ['V', 'C'] },
      { kind: 'TMP', name: 'ends', dtype: 'i32', dims: ['V'] },
      { kind: 'TMP', name: 'order', dtype: 'i32', dims: ['N'] },
    ],
    flops: ({ N, C }) => N * C,
  },
  {
    name: 'rmsnorm_fwd',
    opcode: 2,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'F', dims: ['N', 'C'] },
      { kind: 'IN', name: 'w', dtype: 'W', dims: ['C'] },
      { kind: 'OUT', name: 'y', dtype: 'F', dims: ['N', 'C'] },
      { kind: 'OUT', name: 'rstd', dtype: 'f32', dims: ['N'] },
      { kind: 'FLT', name: 'eps' },
    ],
    flops: ({ N, C }) => 4 * N * C,
  },
  {
    name: 'rmsnorm_bwd',
    opcode: 3,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'F', dims: ['N', 'C'] },
      { kind: 'IN', name: 'w', dtype: 'W', dims: ['C'] },
      { kind: 'IN', name: 'rstd', dtype: 'f32', dims: ['N'] },
      { kind: 'IN', name: 'dy', dtype: 'F', dims: ['N', 'C'] },
      { kind: 'OPT', name: 'add', dtype: 'F', dims: ['N', 'C'] },
      { kind: 'OPT', name: 'dw_add', dtype: 'G', dims: ['C'] },
      { kind: 'OUT', name: 'dx', dtype: 'F', dims: ['N', 'C'] },
      { kind: 'OUT', name: 'dw', dtype: 'G', dims: ['C'] },
      { kind: 'TMP', name: 'partial', dtype: 'f32', dims: ['64', 'C'] },
    ],
    flops: ({ N, C }) => 9 * N * C,
  },
  {
    name: 'matmul_nn',
    opcode: 4,
    fields: [
      { kind: 'IN', name: 'a', dtype: 'F', dims: ['M', 'K'] },
      { kind: 'IN', name: 'b', dtype: 'Q', dims: ['K', 'N'] },
      { kind: 'OPT', name: 'add', dtype: 'G', dims: ['M', 'N'] },
      { kind: 'OUT', name: 'c', dtype: 'G', dims: ['M', 'N'] },
    ],
    flops: ({ M, N, K }) => 2 * M * N * K,
  },
  {
    name: 'matmul_nt',
    opcode: 5,
    fields: [
      { kind: 'IN', name: 'a', dtype: 'F', dims: ['M', 'K'] },
      { kind: 'IN', name: 'b', dtype: 'Q', dims: ['N', 'K'] },
      { kind: 'OPT', name: 'add', dtype: 'G', dims: ['M', 'N'] },
      { kind: 'OUT', name: 'c', dtype: 'G', dims: ['M', 'N'] },
    ],
    flops: ({ M, N, K }) => 2 * M * N * K,
  },
  {
    name: 'matmul_tn',
    opcode: 6,
    fields: [
      { kind: 'IN', name: 'a', dtype: 'F', dims: ['K', 'M'] },
      { kind: 'IN', name: 'b', dtype: 'W', dims: ['K', 'N'] },
      { kind: 'OPT', name: 'add', dtype: 'G', dims: ['M', 'N'] },
      { kind: 'OUT', name: 'c', dtype: 'G', dims: ['M', 'N'] },
    ],
    flops: ({ M, N, K }) => 2 * M * N * K,
  },
  {
    name: 'matmul_swiglu',
    opcode: 7,
    fields: [
      { kind: 'IN', name: 'a', dtype: 'F', dims: ['M', 'K'] },
      { kind: 'IN', name: 'w_gate', dtype: 'Q', dims: ['N', 'K'] },
      { kind: 'IN', name: 'w_up', dtype: 'Q', dims: ['N', 'K'] },
      { kind: 'OUT', name: 'gate', dtype: 'F', dims: ['M', 'N'] },
      { kind: 'OUT', name: 'up', dtype: 'F', dims: ['M', 'N'] },
      { kind: 'OUT', name: 'y', dtype: 'F', dims: ['M', 'N'] },
    ],
    flops: ({ M, N, K }) => 4 * M * N * K + 5 * M * N,
  },
  {
    name: 'attention_fwd',
    opcode: 8,
    fields: [
      { kind: 'IN', name: 'q', dtype: 'F', dims: ['B', 'T', 'H', 'D'] },
      { kind: 'IN', name: 'k', dtype: 'F', dims: ['B', 'T', 'K', 'D'] },
      { kind: 'IN', name: 'v', dtype: 'F', dims: ['B', 'T', 'K', 'D'] },
      { kind: 'IN', name: 'cos', dtype: 'f32', dims: ['P', 'D/2'] },
      { kind: 'IN', name: 'sin', dtype: 'f32', dims: ['P', 'D/2'] },
      { kind: 'IN', name: 'pos', dtype: 'i32', dims: ['B', 'T'] },
      { kind: 'IN', name: 'first', dtype: 'i32', dims: ['B', 'T'] },
      { kind: 'OUT', name: 'o', dtype: 'F', dims: ['B', 'T', 'H', 'D'] },
      { kind: 'OUT', name: 'lse', dtype: 'f32', dims: ['B', 'H', 'T'] },
      { kind: 'TMP', name: 'kr', dtype: 'F', dims: ['B', 'T', 'K', 'D'] },
      { kind: 'FLT', name: 'scale' },
    ],
    flops: ({ B, H, D, T }) => 2 * B * H * D * T * (T + 1),
  },
  {
    name: 'attention_delta',
    opcode: 9,
    fields: [
      { kind: 'IN', name: 'o', dtype: 'F', dims: ['B', 'T', 'H', 'D'] },
      { kind: 'IN', name: 'dout', dtype: 'F', dims: ['B', 'T', 'H', 'D'] },
      { kind: 'OUT', name: 'delta', dtype: 'f32', dims: ['B', 'H', 'T'] },
    ],
    flops: ({ B, H, T, D }) => 2 * B * H * T * D,
  },
  {
    name: 'attention_bwd',
    opcode: 10,
    fields: [
      { kind: 'IN', name: 'q', dtype: 'F', dims: ['B', 'T', 'H', 'D'] },
      { kind: 'IN', name: 'k', dtype: 'F', dims: ['B', 'T', 'K', 'D'] },
      { kind: 'IN', name: 'v', dtype: 'F', dims: ['B', 'T', 'K', 'D'] },
      { kind: 'IN', name: 'cos', dtype: 'f32', dims: ['P', 'D/2'] },
      { kind: 'IN', name: 'sin', dtype: 'f32', dims: ['P', 'D/2'] },
      { kind: 'IN', name: 'pos', dtype: 'i32', dims: ['B', 'T'] },
      { kind: 'IN', name: 'first', dtype: 'i32', dims: ['B', 'T'] },
      { kind: 'IN', name: 'delta', dtype: 'f32', dims: ['B', 'H', 'T'] },
      { kind: 'IN', name: 'lse', dtype: 'f32', dims: ['B', 'H', 'T'] },
      { kind: 'IN', name: 'dout', dtype: 'F', dims: ['B', 'T', 'H', 'D'] },
      { kind: 'OUT', name: 'dq', dtype: 'F', dims: ['B', 'T', 'H', 'D'] },
      { kind: 'OUT', name: 'dk', dtype: 'F', dims: ['B', 'T', 'K', 'D'] },
      { kind: 'OUT', name: 'dv', dtype: 'F', dims: ['B', 'T', 'K', 'D'] },
      { kind: 'TMP', name: 'qr', dtype: 'F', dims: ['B', 'T', 'H/groups', 'D'] },
      { kind: 'TMP', name: 'kr', dtype: 'F', dims: ['B', 'T', 'K/groups', 'D'] },
      { kind: 'INT', name: 'groups' },
      { kind: 'FLT', name: 'scale' },
    ],
    flops: ({ B, H, D, T }) => 5 * B * H * D * T * (T + 1),
  },
  {
    name: 'kv_append',
    opcode: 11,
    fields: [
      { kind: 'IN', name: 'k', dtype: 'F', dims: ['B', 'T', 'K', 'D'] },
      { kind: 'IN', name: 'v', dtype: 'F', dims: ['B', 'T', 'K', 'D'] },
      { kind: 'IN', name: 'cos', dtype: 'f32', dims: ['P', 'D/2'] },
      { kind: 'IN', name: 'sin', dtype: 'f32', dims: ['P', 'D/2'] },
      { kind: 'IN', name: 'pos', dtype: 'i32', dims: ['B', 'T'] },
      { kind: 'IN', name: 'slot', dtype: 'i32', dims: ['B', 'T'] },
      { kind: 'INOUT', name: 'k_cache', dtype: 'F', dims: ['B', 'K', 'S', 'D'] },
      { kind: 'INOUT', name: 'v_cache', dtype: 'F', dims: ['B', 'K', 'S', 'D'] },
    ],
    flops: ({ B, T, K, D }) => 3 * B * T * K * D,
  },
  {
    name: 'attention_cached',
    opcode: 12,
    fields: [
      { kind: 'IN', name: 'q', dtype: 'F', dims: ['B', 'T', 'H', 'D'] },
      { kind: 'IN', name: 'k_cache', dtype: 'F', dims: ['B', 'K', 'S', 'D'] },
      { kind: 'IN', name: 'v_cache', dtype: 'F', dims: ['B', 'K', 'S', 'D'] },
      { kind: 'IN', name: 'cos', dtype: 'f32', dims: ['P', 'D/2'] },
      { kind: 'IN', name: 'sin', dtype: 'f32', dims: ['P', 'D/2'] },
      { kind: 'IN', name: 'pos', dtype: 'i32', dims: ['B', 'T'] },
      { kind: 'IN', name: 'first', dtype: 'i32', dims: ['B', 'T'] },
      { kind: 'IN', name: 'last', dtype: 'i32', dims: ['B', 'T'] },
      { kind: 'OUT', name: 'o', dtype: 'F', dims: ['B', 'T', 'H', 'D'] },
      { kind: 'FLT', name: 'scale' },
    ],
    flops: ({ B, H, D, T, S }) => 4 * B * H * D * T * S,
  },
  {
    name: 'swiglu_fwd',
    opcode: 13,
    fields: [
      { kind: 'IN', name: 'gate', dtype: 'F', dims: ['N'] },
      { kind: 'IN', name: 'up', dtype: 'F', dims: ['N'] },
      { kind: 'OUT', name: 'y', dtype: 'F', dims: ['N'] },
    ],
    flops: ({ N }) => 5 * N,
  },
  {
    name: 'swiglu_bwd',
    opcode: 14,
    fields: [
      { kind: 'IN', name: 'gate', dtype: 'F', dims: ['N'] },
      { kind: 'IN', name: 'up', dtype: 'F', dims: ['N'] },
      { kind: 'IN', name: 'dy', dtype: 'F', dims: ['N'] },
      { kind: 'OUT', name: 'dgate', dtype: 'F', dims: ['N'] },
      { kind: 'OUT', name: 'dup', dtype: 'F', dims: ['N'] },
    ],
    flops: ({ N }) => 12 * N,
  },
  {
    name: 'linear_cross_entropy_fwd',
    opcode: 15,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'F', dims: ['N', 'C'] },
      { kind: 'IN', name: 'w', dtype: 'W', dims: ['V', 'C'] },
      { kind: 'IN', name: 'labels', dtype: 'i32', dims: ['N'] },
      { kind: 'OUT', name: 'nll', dtype: 'f32', dims: ['N'] },
      { kind: 'TMP', name: 'logits', dtype: 'f32', dims: ['chunk', 'V'] },
      { kind: 'INT', name: 'chunk' },
    ],
    flops: ({ N, C, V }) => 2 * N * C * V,
  },
  {
    name: 'linear_cross_entropy_bwd',
    opcode: 16,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'F', dims: ['N', 'C'] },
      { kind: 'IN', name: 'w', dtype: 'W', dims: ['V', 'C'] },
      { kind: 'IN', name: 'labels', dtype: 'i32', dims: ['N'] },
      { kind: 'IN', name: 'weight', dtype: 'f32', dims: ['N'] },
      { kind: 'OPT', name: 'dw_add', dtype: 'f32', dims: ['V', 'C'] },
      { kind: 'OUT', name: 'nll', dtype: 'f32', dims: ['N'] },
      { kind: 'OUT', name: 'dx', dtype: 'F', dims: ['N', 'C'] },
      { kind: 'OPT_OUT', name: 'dw', dtype: 'f32', dims: ['V', 'C'] },
      { kind: 'TMP', name: 'logits', dtype: 'f32', dims: ['chunk', 'V'] },
      { kind: 'INT', name: 'chunk' },
    ],
    flops: ({ N, C, V }) => 6 * N * C * V,
  },
  {
    name: 'dot',
    opcode: 17,
    fields: [
      { kind: 'IN', name: 'a', dtype: 'f32', dims: ['N'] },
      { kind: 'IN', name: 'b', dtype: 'f32', dims: ['N'] },
      { kind: 'OPT', name: 'add', dtype: 'f32', dims: ['1'] },
      { kind: 'OUT', name: 'y', dtype: 'f32', dims: ['1'] },
    ],
    flops: ({ N }) => 2 * N,
  },
  {
    name: 'sum_squares',
    opcode: 18,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'G', dims: ['N'] },
      { kind: 'OPT', name: 'add', dtype: 'f32', dims: ['1'] },
      { kind: 'OUT', name: 'y', dtype: 'f32', dims: ['1'] },
    ],
    flops: ({ N }) => 2 * N,
  },
  {
    name: 'clip',
    opcode: 19,
    fields: [
      { kind: 'IN', name: 'sum_squares', dtype: 'f32', dims: ['1'] },
      { kind: 'IN', name: 'loss', dtype: 'f32', dims: ['1'] },
      { kind: 'INOUT', name: 'hyper', dtype: 'f32', dims: ['8'] },
    ],
    flops: () => 0,
  },
  {
    name: 'adamw',
    opcode: 20,
    fields: [
      { kind: 'INOUT', name: 'p', dtype: 'W', dims: ['N'] },
      { kind: 'OPT_INOUT', name: 'master', dtype: 'f32', dims: ['N'] },
      { kind: 'OPT_INOUT', name: 'low', dtype: 'u16', dims: ['N'] },
      { kind: 'IN', name: 'g', dtype: 'G', dims: ['N'] },
      { kind: 'INOUT', name: 'm', dtype: 'S', dims: ['N'] },
      { kind: 'INOUT', name: 'v', dtype: 'S', dims: ['N'] },
      { kind: 'IN', name: 'hyper', dtype: 'f32', dims: ['8'] },
      { kind: 'FLT', name: 'beta1' },
      { kind: 'FLT', name: 'beta2' },
      { kind: 'FLT', name: 'eps' },
      { kind: 'FLT', name: 'weight_decay' },
      { kind: 'FLT', name: 'seed' },
      { kind: 'FLT', name: 'first' },
    ],
    flops: ({ N }) => 14 * N,
  },
  {
    name: 'adamw_8bit',
    opcode: 21,
    fields: [
      { kind: 'INOUT', name: 'p', dtype: 'W', dims: ['N'] },
      { kind: 'OPT_INOUT', name: 'master', dtype: 'f32', dims: ['N'] },
      { kind: 'OPT_INOUT', name: 'low', dtype: 'u16', dims: ['N'] },
      { kind: 'IN', name: 'g', dtype: 'G', dims: ['N'] },
      { kind: 'INOUT', name: 'm', dtype: 'u8', dims: ['N'] },
      { kind: 'INOUT', name: 'm_scale', dtype: 'f32', dims: ['N/256'] },
      { kind: 'INOUT', name: 'v', dtype: 'u8', dims: ['N'] },
      { kind: 'INOUT', name: 'v_scale', dtype: 'f32', dims: ['N/256'] },
      { kind: 'IN', name: 'hyper', dtype: 'f32', dims: ['8'] },
      { kind: 'FLT', name: 'beta1' },
      { kind: 'FLT', name: 'beta2' },
      { kind: 'FLT', name: 'eps' },
      { kind: 'FLT', name: 'weight_decay' },
      { kind: 'FLT', name: 'seed' },
      { kind: 'FLT', name: 'first' },
    ],
    flops: ({ N }) => 30 * N,
  },
  {
    name: 'copy_start',
    opcode: 22,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'F', dims: ['N'] },
      { kind: 'OUT', name: 'y', dtype: 'F', dims: ['N'] },
    ],
    flops: () => 0,
  },
  {
    name: 'copy_wait',
    opcode: 23,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'F', dims: ['N'] },
      { kind: 'INOUT', name: 'y', dtype: 'F', dims: ['N'] },
    ],
    flops: () => 0,
  },
  {
    name: 'scale',
    opcode: 24,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'F', dims: ['N'] },
      { kind: 'OUT', name: 'y', dtype: 'F', dims: ['N'] },
      { kind: 'FLT', name: 'a' },
    ],
    flops: ({ N }) => N,
  },
  {
    name: 'add',
    opcode: 25,
    fields: [
      { kind: 'IN', name: 'a', dtype: 'F', dims: ['N'] },
      { kind: 'IN', name: 'b', dtype: 'F', dims: ['N'] },
      { kind: 'OUT', name: 'y', dtype: 'F', dims: ['N'] },
    ],
    flops: ({ N }) => N,
  },
  {
    name: 'cast',
    opcode: 26,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'F', dims: ['N'] },
      { kind: 'OUT', name: 'y', dtype: 'G', dims: ['N'] },
    ],
    flops: () => 0,
  },
  {
    name: 'quantize',
    opcode: 27,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'F', dims: ['N'] },
      { kind: 'OUT', name: 'y', dtype: 'Q', dims: ['N'] },
    ],
    flops: ({ N }) => 20 * N,
  },
  {
    name: 'dequantize',
    opcode: 28,
    fields: [
      { kind: 'IN', name: 'x', dtype: 'Q', dims: ['N'] },
      { kind: 'OUT', name: 'y', dtype: 'G', dims: ['N'] },
    ],
    flops: ({ N }) => N,
  },
  {
    name: 'fill',
    opcode: 29,
    fields: [
      { kind: 'OUT', name: 'y', dtype: 'F', dims: ['N'] },
      { kind: 'FLT', name: 'value' },
    ],
    flops: () => 0,
  },
] as const satisfies readonly OpRow[]

export interface EmbeddingFwd {
  ids: Tensor // i32 (N)
  w: Tensor // W (V,C)
  y?: Tensor | undefined // F (N,C)
}

/** y[n] = w[ids[n]]. Also gathers rows of any matrix. */
export function embeddingFwd(recorder: Recorder, args: EmbeddingFwd): { y: Tensor } {
  return recorder.emit(OPS[0], args) as { y: Tensor }
}

export interface EmbeddingBwd {
  ids: Tensor // i32 (N)
  dy: Tensor // F (N,C)
  add?: Tensor | undefined // G (V,C)
  dw?: Tensor | undefined // G (V,C)
}

/** dw[v] = add[v] + sum of dy[n] over n with ids[n] = v, in the order of n. */
export function embeddingBwd(recorder: Recorder, args: EmbeddingBwd): { dw: Tensor } {
  return recorder.emit(OPS[1], args) as { dw: Tensor }
}

export interface RmsnormFwd {
  x: Tensor // F (N,C)
  w: Tensor // W (C)
  y?: Tensor | undefined // F (N,C)
  rstd?: Tensor | undefined // f32 (N)
  eps: number
}

/** y = w * x * rstd, rstd = 1 / sqrt(mean(x^2) + eps). arXiv 1910.07467. */
export function rmsnormFwd(recorder: Recorder, args: RmsnormFwd): { y: Tensor; rstd: Tensor } {
  return recorder.emit(OPS[2], args) as { y: Tensor; rstd: Tensor }
}

export interface RmsnormBwd {
  x: Tensor // F (N,C)
  w: Tensor // W (C)
  rstd: Tensor // f32 (N)
  dy: Tensor // F (N,C)
  add?: Tensor | undefined // F (N,C)
  dw_add?: Tensor | undefined // G (C)
  dx?: Tensor | undefined // F (N,C)
  dw?: Tensor | undefined // G (C)
}

/** dx = add + rstd * (w dy - x * rstd^2 * mean(w dy x)); dw = dw_add + sum_n dy x rstd. */
export function rmsnormBwd(recorder: Recorder, args: RmsnormBwd): { dx: Tensor; dw: Tensor } {
  return recorder.emit(OPS[3], args) as { dx: Tensor; dw: Tensor }
}

export interface MatmulNn {
  a: Tensor // F (M,K)
  b: Tensor // Q (K,N)
  add?: Tensor | undefined // G (M,N)
  c?: Tensor | undefined // G (M,N)
}

/**
 * c = a b (+ add), with a, b stored as the suffix says: n as is, t transposed. f32 accumulation. A quantised b is
 * dequantised to the dtype of a, tile by tile within the product.
 */
export function matmulNn(recorder: Recorder, args: MatmulNn): { c: Tensor } {
  return recorder.emit(OPS[4], args) as { c: Tensor }
}

export interface MatmulNt {
  a: Tensor // F (M,K)
  b: Tensor // Q (N,K)
  add?: Tensor | undefined // G (M,N)
  c?: Tensor | undefined // G (M,N)
}

export function matmulNt(recorder: Recorder, args: MatmulNt): { c: Tensor } {
  return recorder.emit(OPS[5], args) as { c: Tensor }
}

export interface MatmulTn {
  a: Tensor // F (K,M)
  b: Tensor // W (K,N)
  add?: Tensor | undefined // G (M,N)
  c?: Tensor | undefined // G (M,N)
}

export function matmulTn(recorder: Recorder, args: MatmulTn): { c: Tensor } {
  return recorder.emit(OPS[6], args) as { c: Tensor }
}

export interface MatmulSwiglu {
  a: Tensor // F (M,K)
  w_gate: Tensor // Q (N,K)
  w_up: Tensor // Q (N,K)
  gate?: Tensor | undefined // F (M,N)
  up?: Tensor | undefined // F (M,N)
  y?: Tensor | undefined // F (M,N)
}

/** gate = a w_gate^T, up = a w_up^T, y = silu(gate) * up: the first half of an MLP without a second pass over gate and up. */
export function matmulSwiglu(recorder: Recorder, args: MatmulSwiglu): { gate: Tensor; up: Tensor; y: Tensor } {
  return recorder.emit(OPS[7], args) as { gate: Tensor; up: Tensor; y: Tensor }
}

export interface AttentionFwd {
  q: Tensor // F (B,T,H,D)
  k: Tensor // F (B,T,K,D)
  v: Tensor // F (B,T,K,D)
  cos: Tensor // f32 (P,D/2)
  sin: Tensor // f32 (P,D/2)
  pos: Tensor // i32 (B,T)
  first: Tensor // i32 (B,T)
  o?: Tensor | undefined // F (B,T,H,D)
  lse?: Tensor | undefined // f32 (B,H,T)
  scale: number
}

/**
 * o = softmax(scale * R q (R k)^T) v over the keys first[t] .. t, R the rotary embedding: rotate-half pairing (i, i + D/2)
 * by the angle of row pos[t] of the table. lse is the natural log of the softmax's denominator, max included.
 * q head h reads kv head h / (H / K). arXiv 2104.09864, 2205.14135.
 */
export function attentionFwd(recorder: Recorder, args: AttentionFwd): { o: Tensor; lse: Tensor } {
  return recorder.emit(OPS[8], args) as { o: Tensor; lse: Tensor }
}

export interface AttentionDelta {
  o: Tensor // F (B,T,H,D)
  dout: Tensor // F (B,T,H,D)
  delta?: Tensor | undefined // f32 (B,H,T)
}

/** delta = sum_d o dout, all that the backward pass needs to know of the result. */
export function attentionDelta(recorder: Recorder, args: AttentionDelta): { delta: Tensor } {
  return recorder.emit(OPS[9], args) as { delta: Tensor }
}

export interface AttentionBwd {
  q: Tensor // F (B,T,H,D)
  k: Tensor // F (B,T,K,D)
  v: Tensor // F (B,T,K,D)
  cos: Tensor // f32 (P,D/2)
  sin: Tensor // f32 (P,D/2)
  pos: Tensor // i32 (B,T)
  first: Tensor // i32 (B,T)
  delta: Tensor // f32 (B,H,T)
  lse: Tensor // f32 (B,H,T)
  dout: Tensor // F (B,T,H,D)
  dq?: Tensor | undefined // F (B,T,H,D)
  dk?: Tensor | undefined // F (B,T,K,D)
  dv?: Tensor | undefined // F (B,T,K,D)
  groups: number
  scale: number
}

/**
 * Gradients with respect to the unrotated q and k. Nothing rotated is kept from the forward pass: q and k are rotated
 * again, those of one of `groups` groups of heads at a time. Results do not depend on the number of groups.
 */
export function attentionBwd(recorder: Recorder, args: AttentionBwd): { dq: Tensor; dk: Tensor; dv: Tensor } {
  return recorder.emit(OPS[10], args) as { dq: Tensor; dk: Tensor; dv: Tensor }
}

export interface KvAppend {
  k: Tensor // F (B,T,K,D)
  v: Tensor // F (B,T,K,D)
  cos: Tensor // f32 (P,D/2)
  sin: Tensor // f32 (P,D/2)
  pos: Tensor // i32 (B,T)
  slot: Tensor // i32 (B,T)
  k_cache: Tensor // F (B,K,S,D)
  v_cache: Tensor // F (B,K,S,D)
}

/** Rotates k and stores it with v at slot[t] of the cache. */
export function kvAppend(recorder: Recorder, args: KvAppend): void {
  recorder.emit(OPS[11], args)
}

export interface AttentionCached {
  q: Tensor // F (B,T,H,D)
  k_cache: Tensor // F (B,K,S,D)
  v_cache: Tensor // F (B,K,S,D)
  cos: Tensor // f32 (P,D/2)
  sin: Tensor // f32 (P,D/2)
  pos: Tensor // i32 (B,T)
  first: Tensor // i32 (B,T)
  last: Tensor // i32 (B,T)
  o?: Tensor | undefined // F (B,T,H,D)
  scale: number
}

/** As attention_fwd, over the slots first[t] .. last[t] of a cache of rotated keys. */
export function attentionCached(recorder: Recorder, args: AttentionCached): { o: Tensor } {
  return recorder.emit(OPS[12], args) as { o: Tensor }
}

export interface SwigluFwd {
  gate: Tensor // F (N)
  up: Tensor // F (N)
  y?: Tensor | undefined // F (N)
}

/** y = silu(gate) * up. arXiv 2002.05202. */
export function swigluFwd(recorder: Recorder, args: SwigluFwd): { y: Tensor } {
  return recorder.emit(OPS[13], args) as { y: Tensor }
}

export interface SwigluBwd {
  gate: Tensor // F (N)
  up: Tensor // F (N)
  dy: Tensor // F (N)
  dgate?: Tensor | undefined // F (N)
  dup?: Tensor | undefined // F (N)
}

export function swigluBwd(recorder: Recorder, args: SwigluBwd): { dgate: Tensor; dup: Tensor } {
  return recorder.emit(OPS[14], args) as { dgate: Tensor; dup: Tensor }
}

export interface LinearCrossEntropyFwd {
  x: Tensor // F (N,C)
  w: Tensor // W (V,C)
  labels: Tensor // i32 (N)
  nll?: Tensor | undefined // f32 (N)
  chunk: number
}

/** nll[n] = -log softmax(x w^T)[labels[n]], 0 where labels[n] < 0; logits exist for `chunk` rows at a time. */
export function linearCrossEntropyFwd(recorder: Recorder, args: LinearCrossEntropyFwd): { nll: Tensor } {
  return recorder.emit(OPS[15], args) as { nll: Tensor }
}

export interface LinearCrossEntropyBwd {
  x: Tensor // F (N,C)
  w: Tensor // W (V,C)
  labels: Tensor // i32 (N)
  weight: Tensor // f32 (N)
  dw_add?: Tensor | undefined // f32 (V,C)
  nll?: Tensor | undefined // f32 (N)
  dx?: Tensor | undefined // F (N,C)
  dw?: Tensor | undefined // f32 (V,C)
  chunk: number
}

/** The same and, in the same pass over the chunks, the gradients of sum_n weight[n] nll[n]. */
export function linearCrossEntropyBwd(recorder: Recorder, args: LinearCrossEntropyBwd): { nll: Tensor; dx: Tensor } {
  return recorder.emit(OPS[16], args) as { nll: Tensor; dx: Tensor }
}

export interface Dot {
  a: Tensor // f32 (N)
  b: Tensor // f32 (N)
  add?: Tensor | undefined // f32 (1)
  y?: Tensor | undefined // f32 (1)
}

/** y = add + sum_n a[n] b[n], in a fixed order of summation. */
export function dot(recorder: Recorder, args: Dot): { y: Tensor } {
  return recorder.emit(OPS[17], args) as { y: Tensor }
}

export interface SumSquares {
  x: Tensor // G (N)
  add?: Tensor | undefined // f32 (1)
  y?: Tensor | undefined // f32 (1)
}

/** y = add + sum_n x[n]^2, in a fixed order of summation. */
export function sumSquares(recorder: Recorder, args: SumSquares): { y: Tensor } {
  return recorder.emit(OPS[18], args) as { y: Tensor }
}

export interface Clip {
  sum_squares: Tensor // f32 (1)
  loss: Tensor // f32 (1)
  hyper: Tensor // f32 (8)
}

/**
 * hyper = [learning rate, 1 - beta1^t, 1 - beta2^t, max norm or 0, gradient scale, gradient norm, apply, step].
 * Fills in norm = sqrt(sum_squares), scale = min(1, max norm / (norm + 1e-6)) and apply = 1, or apply = 0 where the norm
 * or the loss is not finite: the update is then skipped without asking the host. The step (t) is left alone.
 */
export function clip(recorder: Recorder, args: Clip): void {
  recorder.emit(OPS[19], args)
}

export interface Adamw {
  p: Tensor // W (N)
  master?: Tensor | undefined // f32 (N)
  low?: Tensor | undefined // u16 (N)
  g: Tensor // G (N)
  m: Tensor // S (N)
  v: Tensor // S (N)
  hyper: Tensor // f32 (8)
  beta1: number
  beta2: number
  eps: number
  weight_decay: number
  seed: number
  first: number
}

/**
 * Decoupled weight decay, arXiv 1711.05101; nothing changes where hyper's apply is not 1. bf16 weights are kept in one of
 * three ways. `master` holds them in f32, and p is their rounding, half away from zero. `low` holds the lower 16 bits of
 * the same masters, whose bits are (p << 16) + low as a signed number. Without both, p is rounded stochastically: the
 * lower 16 bits are made up to a whole unit with the probability that they are of one. bf16 m, v are rounded so too. The
 * random bits are a function of seed, hyper's step and the number of the element, `first` being that of the first one.
 */
export function adamw(recorder: Recorder, args: Adamw): void {
  recorder.emit(OPS[20], args)
}

export interface Adamw8bit {
  p: Tensor // W (N)
  master?: Tensor | undefined // f32 (N)
  low?: Tensor | undefined // u16 (N)
  g: Tensor // G (N)
  m: Tensor // u8 (N)
  m_scale: Tensor // f32 (N/256)
  v: Tensor // u8 (N)
  v_scale: Tensor // f32 (N/256)
  hyper: Tensor // f32 (8)
  beta1: number
  beta2: number
  eps: number
  weight_decay: number
  seed: number
  first: number
}

/**
 * The same with states of 8 bits, arXiv 2110.02861: blocks of 256 elements, each a scale (its largest magnitude) and a
 * byte an element, an index into the dynamic map: 0, seven decades 10^-7 .. 1 of 2^i linear steps each, and 1. m has the
 * signed map (i = 0 .. 6 in each sign, no -1), its byte being the index counted from that of 0, modulo 256; v has the
 * unsigned one (i = 1 .. 7), its byte being the index. So bytes and scales of 0 are the state before the first step. The
 * nearest value of the map is stored, but for a v > 0 never 0: its root is a divisor.
 */
export function adamw8bit(recorder: Recorder, args: Adamw8bit): void {
  recorder.emit(OPS[21], args)
}

export interface CopyStart {
  x: Tensor // F (N)
  y?: Tensor | undefined // F (N)
}

/** y = x, at the same time as the operations that follow, until copy_wait. Between a device's memory and the host's. */
export function copyStart(recorder: Recorder, args: CopyStart): { y: Tensor } {
  return recorder.emit(OPS[22], args) as { y: Tensor }
}

export interface CopyWait {
  x: Tensor // F (N)
  y: Tensor // F (N)
}

/** What follows comes after the copy of x to y. */
export function copyWait(recorder: Recorder, args: CopyWait): void {
  recorder.emit(OPS[23], args)
}

export interface Scale {
  x: Tensor // F (N)
  y?: Tensor | undefined // F (N)
  a: number
}

/** y = a x. */
export function scale(recorder: Recorder, args: Scale): { y: Tensor } {
  return recorder.emit(OPS[24], args) as { y: Tensor }
}

export interface Add {
  a: Tensor // F (N)
  b: Tensor // F (N)
  y?: Tensor | undefined // F (N)
}

export function add(recorder: Recorder, args: Add): { y: Tensor } {
  return recorder.emit(OPS[25], args) as { y: Tensor }
}

export interface Cast {
  x: Tensor // F (N)
  y?: Tensor | undefined // G (N)
}

export function cast(recorder: Recorder, args: Cast): { y: Tensor } {
  return recorder.emit(OPS[26], args) as { y: Tensor }
}

export interface Quantize {
  x: Tensor // F (N)
  y?: Tensor | undefined // Q (N)
}

/**
 * y = x, rounded to nf4 or int8 in blocks of 64 elements; the last one is filled up with 0. A block's largest magnitude
 * is its absmax. int8: a byte an element, round(x / s), and s = absmax / 127 in f32. nf4 (arXiv 2305.14314): four bits an
 * element, the number of the nearest to x / absmax of 16 values (appendix E). The absmax is kept as a byte: offset + u
 * map[byte], offset the mean of all of them, u the largest distance from it in a group of 256 blocks, and the map that of
 * 8-bit states with both signs, sorted. As bitsandbytes has it, but for the order of sums. NaN and infinity spoil all.
 */
export function quantize(recorder: Recorder, args: Quantize): { y: Tensor } {
  return recorder.emit(OPS[27], args) as { y: Tensor }
}

export interface Dequantize {
  x: Tensor // Q (N)
  y?: Tensor | undefined // G (N)
}

export function dequantize(recorder: Recorder, args: Dequantize): { y: Tensor } {
  return recorder.emit(OPS[28], args) as { y: Tensor }
}

export interface Fill {
  y?: Tensor | undefined // F (N)
  value: number
}

export function fill(recorder: Recorder, args: Fill): { y: Tensor } {
  return recorder.emit(OPS[29], args) as { y: Tensor }
}

/** Of the table; the addon and every backend must have been built from the same one. */
export const TABLE_HASH = '15780648f0d46099'
