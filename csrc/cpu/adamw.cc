// clip: the gradient's norm, the factor that clips it, and whether the update may be applied at all, into `hyper`.
// adamw, arXiv 1711.05101, as torch.optim.AdamW computes it, with g scaled by hyper's clipping factor:
//   p -= lr decay p;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;  p -= lr / bc1 m / (sqrt(v) / sqrt(bc2) + eps)
//
// p, master, g, m, v flat (N); m, v, master f32. Memory traffic: p, m, v read and written, g read: 28 bytes an element
// in f32. With bf16 weights `master` holds p in f32 and p is written only.
#include "elementwise.h"

namespace rw::cpu::RW_ISA {

namespace {

enum Hyper { kRate, kCorrection1, kCorrection2, kMaxNorm, kScale, kNorm, kApply };

inline vf sqrt(vf x) {
  for (int64_t i = 0; i < VL; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

template <typename W, typename G>
void update(Context& context, const adamw_args& a) {
  const float* hyper = a.hyper.as<float>();
  if (hyper[kApply] == 0.0f) return;
  const float rate = hyper[kRate], scale = hyper[kScale];
  const float keep = static_cast<float>(1.0 - rate * a.weight_decay);
  const float step = rate / hyper[kCorrection1];
  const float inverse_root = 1.0f / __builtin_sqrtf(hyper[kCorrection2]);
  // From f64: 1 - 0.999f is off by 1.3e-5 of itself.
  const float rest1 = static_cast<float>(1.0 - a.beta1), rest2 = static_cast<float>(1.0 - a.beta2);
  const float beta2 = static_cast<float>(a.beta2), eps = static_cast<float>(a.eps);
  float* master = a.master.as<float>();
  W* p = a.p.as<W>();
  for_each_vector(context, a.p.size(), [&](int64_t i, auto load, auto store) {
    const vf g = load(a.g.as<G>() + i) * scale;
    vf m = load(a.m.as<float>() + i), v = load(a.v.as<float>() + i);
    m += rest1 * (g - m);
    v = beta2 * v + rest2 * (g * g);
    vf weight = master ? load(master + i) : load(p + i);
    weight = weight * keep - step * (m / (sqrt(v) * inverse_root + eps));
    store(a.m.as<float>() + i, m);
    store(a.v.as<float>() + i, v);
    if (master) store(master + i, weight);
    store(p + i, weight);
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
  const bool p16 = a.p.dtype == DType::bf16, g16 = a.g.dtype == DType::bf16;
  if (p16 && g16) return update<bf16, bf16>(context, a);
  if (p16) return update<bf16, float>(context, a);
  if (g16) return update<float, bf16>(context, a);
  update<float, float>(context, a);
}

}  // namespace rw::cpu::RW_ISA
