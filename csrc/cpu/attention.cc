// placeholder
#include "attention.h"

namespace rw::cpu::RW_ISA {

template <typename F>
static void forward(Context& context, const attention_fwd_args& a) {
  int64_t B = a.q.dims[0], T = a.q.dims[1], H = a.q.dims[2], D = a.q.dims[3], K = a.k.dims[2], G = H / K;
  rotate_keys<F>(context, a.k, a.cos, a.sin, a.pos, a.kr);
  int64_t step = query_tile(G), tiles = round_up(T, step) / step;
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
    attend(part, static_cast<float*>(context.scratch(thread, attend_scratch(D, G))));
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
