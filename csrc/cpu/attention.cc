// o = softmax(scale R q (R k)^T) v over the keys first[t] .. t; lse = log of the softmax's denominator, maximum
// included.
//
// Shapes: q, o (B,T,H,D); k, v (B,T,K,D); cos, sin (P,D/2); lse (B,H,T). q, k, v, o and kr f32 or bf16: widened at
// load, computed in f32, rounded at store; lse f32.
//
// Never stored: scores and weights beyond a tile of 128 keys by a strip of queries, and rotated queries. A first pass
// writes R k once, head by head (kr). Traffic: q, o and lse once; k, v and kr once for 192 tokens of one query head, or
// 96 tokens of all the query heads of a kv head.
//
// A task is (b, kv head, 192 or 96 tokens), the late ones first as they see most keys. Its queries lie in the lanes:
// s^T = k q^T and o^T += v^T p^T read keys and values row by row as broadcasts, so neither is transposed, and maximum
// and sum of a query are vector operations. A strip is 3 vectors of queries: q^T, p^T and o^T of a strip and D = 64 are
// 48 KB with AVX-512, of which the product at work reads one (12 or 24 KB) from the L1 cache over and over. Tiles that
// no query of the task sees are skipped, and within a tile the rows that no query of the strip sees; where some are
// seen by a part of the strip only, weights are selected, never multiplied by zero (attend_tile).
//
// With AMX the same in tiles of its own (attention_tiles.h).
//
// Papers: FlashAttention-2 2307.08691 (tiles, running maximum, one division at the end), RoFormer 2104.09864
// (rotation).
#include "attention_tiles.h"

namespace rw::cpu::RW_ISA {

template <typename F>
static void forward(Context& context, const attention_fwd_args& a) {
  int64_t B = a.q.dims[0], T = a.q.dims[1], H = a.q.dims[2], D = a.q.dims[3], K = a.k.dims[2], G = H / K;
  rotate_keys<F>(context, a.k, a.cos, a.sin, a.pos, a.kr);
  int64_t step = query_tile(context, B, T, K, G), tiles = round_up(T, step) / step;
  parallel(context, B * K * tiles, [&](int64_t task, int thread) {
    int64_t tile = tiles - 1 - task / (B * K), b = task % (B * K) / K, head = task % K, t0 = tile * step;
    Attend<F> part = {};
    part.q = a.q.as<F>() + ((b * T + t0) * H + head * G) * D;
    part.k = a.kr.as<F>() + (b * K + head) * T * D;
    part.v = a.v.as<F>() + (b * T * K + head) * D;
    part.o = a.o.as<F>() + ((b * T + t0) * H + head * G) * D;
    part.lse = a.lse.as<float>() + (b * H + head * G) * T + t0;
    part.cos = a.cos.as<float>();
    part.sin = a.sin.as<float>();
    part.pos = a.pos.as<int32_t>() + b * T + t0;
    part.first = a.first.as<int32_t>() + b * T + t0;
    part.t0 = t0;
    part.tokens = min_of(step, T - t0);
    part.group = G;
    part.head_dim = D;
    part.q_stride = H * D;
    part.k_stride = D;
    part.v_stride = K * D;
    part.lse_stride = T;
    part.keys = T;
    part.scale = a.scale;
    attend(context, thread, part);
  });
}

void attention_fwd(Context& context, const attention_fwd_args& a) {
  if (a.q.dtype == DType::bf16) {
    forward<bf16>(context, a);
  } else {
    forward<float>(context, a);
  }
}

}  // namespace rw::cpu::RW_ISA
