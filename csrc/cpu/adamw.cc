// clip: the gradient's norm, the factor that clips it, and whether the update may be applied at all, into `hyper`.
// adamw, arXiv 1711.05101, as torch.optim.AdamW computes it, with g scaled by hyper's clipping factor:
//   p -= lr decay p;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;  p -= lr / bc1 m / (sqrt(v) / sqrt(bc2) + eps)
// The arithmetic is that of csrc/adamw.h.
//
// p, g, m, v, master, low flat (N). Memory traffic: p, m, v and master or low read and written, g read: 28 bytes an
// element in f32, 14 where all is bf16 without masters. With f32 masters p is written only. Tasks are runs of elements.
#include "weights.h"

namespace rw::cpu::RW_ISA {

namespace {

template <Keep keep, typename G, typename S>
void update_all(Context& context, const adamw_args& a) {
  const float* hyper = a.hyper.as<float>();
  const AdamWSettings settings = adamw_settings(a);
  const AdamWStep step = adamw_step(settings, hyper);
  const Noise noise = noise_of(settings.seed, hyper[kStep]);
  for_each_vector(context, a.p.size(), [&](int64_t i, auto load, auto store) {
    vf weight = load_weight<keep>(a, i, load), m = load(a.m.as<S>() + i), v = load(a.v.as<S>() + i);
    update(step, load(a.g.as<G>() + i), weight, m, v);
    store_weight<keep>(a, i, weight, noise, settings.first, store);
    if constexpr (sizeof(S) == 4) {
      store(a.m.as<S>() + i, m);
      store(a.v.as<S>() + i, v);
    } else {
      const vu random = random_bits(noise.moments, settings.first + i);
      store(a.m.as<uint16_t>() + i, round_stochastically(m, random & 0xffffu));
      store(a.v.as<uint16_t>() + i, round_stochastically(v, random >> 16));
    }
  });
}

bool finite(float x) { return x - x == 0.0f; }

}  // namespace

void clip(Context&, const clip_args& a) {
  float* hyper = a.hyper.as<float>();
  const float norm = __builtin_sqrtf(*a.sum_squares.as<float>());
  hyper[kNorm] = norm;
  hyper[kApply] = finite(norm) && finite(*a.loss.as<float>()) ? 1.0f : 0.0f;
  const float limit = hyper[kMaxNorm] > 0.0f ? hyper[kMaxNorm] / (norm + 1e-6f) : 1.0f;
  hyper[kScale] = limit < 1.0f ? limit : 1.0f;
}

void adamw(Context& context, const adamw_args& a) {
  if_applied(a, [&](auto kept) {
    constexpr Keep keep = decltype(kept)::value;
    const bool g16 = a.g.dtype == DType::bf16, s16 = a.m.dtype == DType::bf16;
    if (g16 && s16) return update_all<keep, bf16, bf16>(context, a);
    if (g16) return update_all<keep, bf16, float>(context, a);
    if (s16) return update_all<keep, float, bf16>(context, a);
    update_all<keep, float, float>(context, a);
  });
}

}  // namespace rw::cpu::RW_ISA
