// clip: the gradient's norm, the factor that clips it, and whether the update may be applied at all, into `hyper`.
// adamw, arXiv 1711.05101, as torch.optim.AdamW computes it, with g scaled by hyper's clipping factor:
//   p -= lr decay p;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;  p -= lr / bc1 m / (sqrt(v) / sqrt(bc2) + eps)
//
// p, g f32 or bf16, master, m, v f32, flat (N). Memory traffic: p, m, v read and written, g read: 28 bytes an element
// in f32. With bf16 weights `master` holds p in f32 and p is written only. Nothing is touched where hyper's apply is 0.
// Grid: at most 5 blocks of 256 threads an SM, each thread 4 elements (16 bytes of f32) at a time; no shared memory.
// clip: one thread.
#include "elementwise.h"

namespace rw::cuda {

namespace {

constexpr int kResident = 5;  // blocks of an SM: 48 registers a thread

enum Hyper { kRate, kCorrection1, kCorrection2, kMaxNorm, kScale, kNorm, kApply };

struct Settings {
  double weight_decay;
  float beta2, eps, rest1, rest2;  // rest = 1 - beta
};

template <int Pack, bool Master, typename W, typename G>
__global__ void __launch_bounds__(kFlatThreads, kResident)
    adamw_kernel(W* p, float* master, const G* g, float* m, float* v, const float* hyper, Settings settings,
                 int64_t size) {
  if (hyper[kApply] == 0.0f) return;
  const float scale = hyper[kScale];
  const float keep = static_cast<float>(1.0 - hyper[kRate] * settings.weight_decay);
  const float step = hyper[kRate] / hyper[kCorrection1];
  const float inverse_root = 1.0f / sqrtf(hyper[kCorrection2]);
  for_each_pack<Pack>(size, [&](auto width, int64_t at) {
    constexpr int N = decltype(width)::value;
    float weight[N], gradient[N], first[N], second[N];
    load(g + at, gradient);
    load(m + at, first);
    load(v + at, second);
    if constexpr (Master)
      load(master + at, weight);
    else
      load(p + at, weight);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float scaled = gradient[i] * scale;
      first[i] += settings.rest1 * (scaled - first[i]);
      second[i] = settings.beta2 * second[i] + settings.rest2 * (scaled * scaled);
      weight[i] = weight[i] * keep - step * (first[i] / (sqrtf(second[i]) * inverse_root + settings.eps));
    }
    store(m + at, first);
    store(v + at, second);
    if constexpr (Master) store(master + at, weight);
    store(p + at, weight);
  });
}

__global__ void clip_kernel(const float* sum_squares, const float* loss, float* hyper) {
  const float norm = sqrtf(*sum_squares);
  const auto finite = [](float x) { return x - x == 0.0f; };
  hyper[kNorm] = norm;
  hyper[kApply] = finite(norm) && finite(*loss) ? 1.0f : 0.0f;
  const float limit = hyper[kMaxNorm] > 0.0f ? hyper[kMaxNorm] / (norm + 1e-6f) : 1.0f;
  hyper[kScale] = limit < 1.0f ? limit : 1.0f;
}

template <bool Master, typename W, typename G>
void update(Context& context, const adamw_args& args) {
  constexpr int P = kPack<float>;
  // From f64: 1 - 0.999f is off by 1.3e-5 of itself.
  const Settings settings = {args.weight_decay, static_cast<float>(args.beta2), static_cast<float>(args.eps),
                             static_cast<float>(1.0 - args.beta1), static_cast<float>(1.0 - args.beta2)};
  const bool vector = all_aligned(args.p, args.master, args.g, args.m, args.v);
  const int64_t size = args.p.size();
  launch(flat(context, vector ? size / P : size, kResident),
         vector ? adamw_kernel<P, Master, W, G> : adamw_kernel<1, Master, W, G>, args.p.as<W>(),
         args.master.as<float>(), args.g.as<G>(), args.m.as<float>(), args.v.as<float>(), args.hyper.as<float>(),
         settings, size);
}

}  // namespace

void clip(Context& context, const clip_args& args) {
  launch({1, 1, 0, context.stream}, clip_kernel, args.sum_squares.as<float>(), args.loss.as<float>(),
         args.hyper.as<float>());
}

void adamw(Context& context, const adamw_args& args) {
  with_float_type(args.p.dtype, [&](auto w) {
    with_float_type(args.g.dtype, [&](auto g) {
      if (args.master) return update<true, decltype(w), decltype(g)>(context, args);
      update<false, decltype(w), decltype(g)>(context, args);
    });
  });
}

}  // namespace rw::cuda
