// swiglu_fwd: y = silu(gate) up, silu(g) = g s, s = 1 / (1 + e^-g). arXiv 2002.05202.
// swiglu_bwd: dup = dy g s, dgate = dy up s (1 + g (1 - s)).
//
// All flat (N), f32 or bf16; computed in f32. Memory traffic: forward 3 N elements, backward 5 N. Nothing but gate and
// up is kept for the backward pass. Grid: at most 6 (5) blocks of 256 threads an SM, each thread a pack of 16 bytes of
// every tensor at a time; no shared memory.
#include "elementwise.h"

namespace rw::cuda {

namespace {

// Blocks of an SM: 40 and 48 registers a thread.
constexpr int kForward = 6, kBackward = 5;

template <int Pack, typename F>
__global__ void __launch_bounds__(kFlatThreads, kForward)
    swiglu_fwd_kernel(const F* gate, const F* up, F* y, int64_t size) {
  for_each_pack<Pack>(size, [&](auto width, int64_t at) {
    constexpr int W = decltype(width)::value;
    float g[W], u[W];
    load(gate + at, g);
    load(up + at, u);
#pragma unroll
    for (int i = 0; i < W; i++) u[i] *= g[i] * sigmoid(g[i]);
    store(y + at, u);
  });
}

template <int Pack, typename F>
__global__ void __launch_bounds__(kFlatThreads, kBackward)
    swiglu_bwd_kernel(const F* gate, const F* up, const F* dy, F* dgate, F* dup, int64_t size) {
  for_each_pack<Pack>(size, [&](auto width, int64_t at) {
    constexpr int W = decltype(width)::value;
    float g[W], u[W], d[W];
    load(gate + at, g);
    load(up + at, u);
    load(dy + at, d);
#pragma unroll
    for (int i = 0; i < W; i++) {
      const float s = sigmoid(g[i]);
      u[i] = d[i] * u[i] * (s * (1.0f + g[i] * (1.0f - s)));
      d[i] *= g[i] * s;
    }
    store(dgate + at, u);
    store(dup + at, d);
  });
}

}  // namespace

void swiglu_fwd(Context& context, const swiglu_fwd_args& args) {
  with_float_type(args.y.dtype, [&](auto f) {
    using F = decltype(f);
    constexpr int P = kPack<F>;
    const bool vector = all_aligned(args.gate, args.up, args.y);
    const int64_t size = args.y.size();
    launch(flat(context, vector ? size / P : size, kForward),
           vector ? swiglu_fwd_kernel<P, F> : swiglu_fwd_kernel<1, F>, args.gate.as<F>(), args.up.as<F>(),
           args.y.as<F>(), size);
  });
}

void swiglu_bwd(Context& context, const swiglu_bwd_args& args) {
  with_float_type(args.dy.dtype, [&](auto f) {
    using F = decltype(f);
    constexpr int P = kPack<F>;
    const bool vector = all_aligned(args.gate, args.up, args.dy, args.dgate, args.dup);
    const int64_t size = args.dy.size();
    launch(flat(context, vector ? size / P : size, kBackward),
           vector ? swiglu_bwd_kernel<P, F> : swiglu_bwd_kernel<1, F>, args.gate.as<F>(), args.up.as<F>(),
           args.dy.as<F>(), args.dgate.as<F>(), args.dup.as<F>(), size);
  });
}

}  // namespace rw::cuda
