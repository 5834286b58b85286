// clip: the gradient's norm, the factor that clips it, and whether the update may be applied at all, into `hyper`.
// adamw, arXiv 1711.05101, as torch.optim.AdamW computes it, with g scaled by hyper's clipping factor:
//   p -= lr decay p;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;  p -= lr / bc1 m / (sqrt(v) / sqrt(bc2) + eps)
// The arithmetic is that of csrc/adamw.h.
//
// p, g, m, v f32 or bf16, master f32, low u16, flat (N). Memory traffic: p, m, v and master or low read and written, g
// read: 28 bytes an element in f32, 14 where all is bf16 without masters. With f32 masters p is written only. Nothing
// is touched where hyper's apply is not 1. Grid: at most 3 or 5 blocks of 256 threads an SM, each thread the elements
// of 16 bytes of the widest tensor at a time; no shared memory. clip: one thread.
#include "weights.h"

namespace rw::cuda {

namespace {

// Blocks of an SM: 48 registers a thread with 4 elements, up to 85 with 8.
constexpr int resident(int pack) { return pack == 8 ? 3 : 5; }

template <int Pack, Keep keep, typename G, typename S>
__global__ void __launch_bounds__(kFlatThreads, resident(Pack))
    adamw_kernel(Weights<keep> weights, const G* g, S* m, S* v, const float* hyper, AdamWSettings settings,
                 int64_t size) {
  if (hyper[kApply] != 1.0f) return;
  const AdamWStep step = adamw_step(settings, hyper);
  const Noise noise = noise_of(settings.seed, hyper[kStep]);
  for_each_pack<Pack>(size, [&](auto width, int64_t at) {
    constexpr int N = decltype(width)::value;
    float weight[N], gradient[N], first[N], second[N];
    load(g + at, gradient);
    load(m + at, first);
    load(v + at, second);
    load_weights<true>(weights, at, weight);
#pragma unroll
    for (int i = 0; i < N; i++) update(step, gradient[i], weight[i], first[i], second[i]);
    if constexpr (std::is_same_v<S, float>) {
      store(m + at, first);
      store(v + at, second);
    } else {
      Raw<N, bf16> m_halves, v_halves;
#pragma unroll
      for (int i = 0; i < N; i++) {
        const uint32_t random = random_bits(noise.moments, settings.first + at + i);
        set_half(m_halves, i, round_stochastically(first[i], random & 0xffffu));
        set_half(v_halves, i, round_stochastically(second[i], random >> 16));
      }
      put(m + at, m_halves);
      put(v + at, v_halves);
    }
    store_weights<true>(weights, at, weight, noise.weights, settings.first + at);
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

template <Keep keep, typename G, typename S>
void update_all(Context& context, const adamw_args& args, const Weights<keep>& weights, G, S) {
  constexpr int P = kPack<Weight<keep>, std::conditional_t<keep == Keep::master, float, bf16>, G, S>;
  const bool vector = all_aligned(args.p, args.master, args.low, args.g, args.m, args.v);
  const int64_t size = args.p.size();
  launch(flat(context, vector ? size / P : size, resident(vector ? P : 1)),
         vector ? adamw_kernel<P, keep, G, S> : adamw_kernel<1, keep, G, S>, weights, args.g.as<G>(), args.m.as<S>(),
         args.v.as<S>(), args.hyper.as<float>(), adamw_settings(args), size);
}

}  // namespace

void clip(Context& context, const clip_args& args) {
  launch({1, 1, 0, context.stream}, clip_kernel, args.sum_squares.as<float>(), args.loss.as<float>(),
         args.hyper.as<float>());
}

void adamw(Context& context, const adamw_args& args) {
  with_weights(args, [&](auto weights) {
    with_float_type(args.g.dtype, [&](auto g) {
      with_float_type(args.m.dtype, [&](auto state) { update_all(context, args, weights, g, state); });
    });
  });
}

}  // namespace rw::cuda
