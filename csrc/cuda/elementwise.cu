// add: y = a + b. scale: y = a x. cast: y = x in another (or the same) dtype. fill: y = value.
//
// All flat (N), f32 or bf16. Memory traffic: each element is read and written once.
// Grid: at most 8 blocks of 256 threads an SM, each thread a pack of 16 bytes at a time; no shared memory. Tensors that
// are not aligned are treated element by element.
#include "elementwise.h"

namespace rw::cuda {

namespace {

constexpr int kResident = 8;  // blocks of an SM: 32 registers a thread

template <int Pack, typename F>
__global__ void __launch_bounds__(kFlatThreads, kResident) add_kernel(const F* a, const F* b, F* y, int64_t size) {
  for_each_pack<Pack>(size, [&](auto width, int64_t at) {
    constexpr int W = decltype(width)::value;
    float x[W], other[W];
    load(a + at, x);
    load(b + at, other);
#pragma unroll
    for (int i = 0; i < W; i++) x[i] += other[i];
    store(y + at, x);
  });
}

template <int Pack, typename F>
__global__ void __launch_bounds__(kFlatThreads, kResident) scale_kernel(const F* x, F* y, float factor, int64_t size) {
  for_each_pack<Pack>(size, [&](auto width, int64_t at) {
    constexpr int W = decltype(width)::value;
    float value[W];
    load(x + at, value);
#pragma unroll
    for (int i = 0; i < W; i++) value[i] *= factor;
    store(y + at, value);
  });
}

template <int Pack, typename F, typename G>
__global__ void __launch_bounds__(kFlatThreads, kResident) cast_kernel(const F* x, G* y, int64_t size) {
  for_each_pack<Pack>(size, [&](auto width, int64_t at) {
    float value[decltype(width)::value];
    load(x + at, value);
    store(y + at, value);
  });
}

template <int Pack, typename F>
__global__ void __launch_bounds__(kFlatThreads, kResident) fill_kernel(F* y, float value, int64_t size) {
  for_each_pack<Pack>(size, [&](auto width, int64_t at) {
    constexpr int W = decltype(width)::value;
    float x[W];
#pragma unroll
    for (int i = 0; i < W; i++) x[i] = value;
    store(y + at, x);
  });
}

}  // namespace

void add(Context& context, const add_args& args) {
  with_float_type(args.y.dtype, [&](auto f) {
    using F = decltype(f);
    constexpr int P = kPack<F>;
    const bool vector = all_aligned(args.a, args.b, args.y);
    const int64_t size = args.y.size();
    launch(flat(context, vector ? size / P : size, kResident), vector ? add_kernel<P, F> : add_kernel<1, F>,
           args.a.as<F>(), args.b.as<F>(), args.y.as<F>(), size);
  });
}

void scale(Context& context, const scale_args& args) {
  with_float_type(args.y.dtype, [&](auto f) {
    using F = decltype(f);
    constexpr int P = kPack<F>;
    const bool vector = all_aligned(args.x, args.y);
    const int64_t size = args.y.size();
    launch(flat(context, vector ? size / P : size, kResident), vector ? scale_kernel<P, F> : scale_kernel<1, F>,
           args.x.as<F>(), args.y.as<F>(), static_cast<float>(args.a), size);
  });
}

void cast(Context& context, const cast_args& args) {
  with_float_type(args.x.dtype, [&](auto f) {
    with_float_type(args.y.dtype, [&](auto g) {
      using F = decltype(f);
      using G = decltype(g);
      constexpr int P = kPack<F, G>;
      const bool vector = all_aligned(args.x, args.y);
      const int64_t size = args.y.size();
      launch(flat(context, vector ? size / P : size, kResident), vector ? cast_kernel<P, F, G> : cast_kernel<1, F, G>,
             args.x.as<F>(), args.y.as<G>(), size);
    });
  });
}

void fill(Context& context, const fill_args& args) {
  with_float_type(args.y.dtype, [&](auto f) {
    using F = decltype(f);
    constexpr int P = kPack<F>;
    const bool vector = all_aligned(args.y);
    const int64_t size = args.y.size();
    launch(flat(context, vector ? size / P : size, kResident), vector ? fill_kernel<P, F> : fill_kernel<1, F>,
           args.y.as<F>(), static_cast<float>(args.value), size);
  });
}

}  // namespace rw::cuda
