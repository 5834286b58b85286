// How the ops that update weights read and write them: f32, bf16 with masters or their lower halves, or bf16 alone.
#pragma once
#include "elementwise.h"

#include "../adamw.h"

namespace rw::cuda {

// What p holds, and what lies beside it: masters or their lower halves.
template <Keep keep>
using Weight = std::conditional_t<keep == Keep::f32, float, bf16>;
template <Keep keep>
using Beside = std::conditional_t<keep == Keep::master, float, uint16_t>;

template <Keep keep>
struct Weights {
  Weight<keep>* p;
  Beside<keep>* beside;  // null where there is nothing
};

// f(Weights<keep>) of the tensors of an op.
template <typename Args, typename F>
void with_weights(const Args& args, F&& f) {
  if (args.p.dtype == DType::f32) return f(Weights<Keep::f32>{args.p.template as<float>(), nullptr});
  bf16* p = args.p.template as<bf16>();
  if (args.master) return f(Weights<Keep::master>{p, args.master.template as<float>()});
  if (args.low) return f(Weights<Keep::low>{p, args.low.template as<uint16_t>()});
  f(Weights<Keep::stochastic>{p, nullptr});
}

// 16-bit element i of some, and its place.
template <typename T, int N>
__device__ __forceinline__ uint32_t half_of(const Raw<N, T>& raw, int i) {
  return i % 2 ? raw.word[i / 2] >> 16 : raw.word[i / 2] & 0xffffu;
}
template <typename T, int N>
__device__ __forceinline__ void set_half(Raw<N, T>& raw, int i, uint32_t bits) {
  raw.word[i / 2] = i % 2 ? raw.word[i / 2] | bits << 16 : bits;
}

// N weights from `at` on; Vector as for fetch_some.
template <bool Vector, int N, Keep keep>
__device__ __forceinline__ void load_weights(const Weights<keep>& w, int64_t at, float (&weight)[N]) {
  if constexpr (keep == Keep::master) {
    load_some<Vector>(w.beside + at, N, weight);
  } else if constexpr (keep == Keep::low) {
    const auto upper = fetch_some<Vector, N>(w.p + at, N);
    const auto low = fetch_some<Vector, N>(w.beside + at, N);
#pragma unroll
    for (int i = 0; i < N; i++) weight[i] = real_of(master_of(half_of(upper, i), half_of(low, i)));
  } else {
    load_some<Vector>(w.p + at, N, weight);
  }
}

// `element` is the number of the first one.
template <bool Vector, int N, Keep keep>
__device__ __forceinline__ void store_weights(const Weights<keep>& w, int64_t at, const float (&weight)[N],
                                              const Stream& stream, int64_t element) {
  if constexpr (keep == Keep::f32) {
    store_some<Vector>(w.p + at, N, weight);
  } else if constexpr (keep == Keep::stochastic) {
    Raw<N, bf16> upper;
#pragma unroll
    for (int i = 0; i < N; i++)
      set_half(upper, i, round_stochastically(weight[i], random_bits(stream, element + i) >> 16));
    put_all<Vector>(w.p + at, upper);
  } else {
    Raw<N, bf16> upper;
    Raw<N, Beside<keep>> beside;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const uint32_t bits = sound_bits(weight[i]);
      set_half(upper, i, upper_of(bits));
      if constexpr (keep == Keep::master)
        beside.word[i] = bits;
      else
        set_half(beside, i, bits & 0xffffu);
    }
    put_all<Vector>(w.p + at, upper);
    put_all<Vector>(w.beside + at, beside);
  }
}

}  // namespace rw::cuda
