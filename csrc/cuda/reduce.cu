// dot: y = add + sum a b. sum_squares: y = add + sum x^2. x f32 or bf16, the rest f32, flat (N). One read of each
// element.
//
// Order of summation, fixed by N alone: tiles of 4096 elements go round up to 1024 blocks. In a tile each thread sums
// its 16 products in f32; these sums are added up in f64, over the tiles of a thread, then the lanes, the warps and the
// blocks in a fixed order. So no sum in f32 is longer than 16 terms, whatever N is. Grid: up to 1024 blocks of 256
// threads, 64 bytes of f32 (32 of bf16) in flight per thread, and 64 bytes of shared memory; then one block over the
// partial sums, which lie in scratch (8 KB).
#include "elementwise.h"

namespace rw::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 4096;
constexpr int kPartials = 1024;

// Sum over the block, valid in thread 0. Called once a kernel.
__device__ __forceinline__ double ordered_block_sum(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  struct Parts {
    double warp[kThreads / kWarp];
  };
  auto& parts = static_smem<Parts, Parts>();
  if (lane_index() == 0) parts.warp[warp_index()] = x;
  __syncthreads();
  x = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / kWarp; warp++) x += parts.warp[warp];
  return x;
}

// b is a for a sum of squares: then a is read once.
template <bool Vector, bool Squares, typename T>
__global__ void __launch_bounds__(kThreads) products_kernel(const T* a, const T* b, int64_t size, double* partial) {
  constexpr int W = kPack<T>;
  constexpr int kLoads = kTile / kThreads / W;
  double total = 0;
  for (int64_t tile = int64_t{blockIdx.x} * kTile; tile < size; tile += int64_t{gridDim.x} * kTile) {
    float x[kLoads][W], y[kLoads][W];
    const int64_t own = tile + static_cast<int>(threadIdx.x) * W;
    if (Vector && tile + kTile <= size) {
#pragma unroll
      for (int j = 0; j < kLoads; j++) {
        load(a + own + j * kThreads * W, x[j]);
        if constexpr (!Squares) load(b + own + j * kThreads * W, y[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kLoads; j++) {
        const int64_t at = own + j * kThreads * W;
        load_some<false>(a + at, size - at, x[j]);
        if constexpr (!Squares) load_some<false>(b + at, size - at, y[j]);
      }
    }
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kLoads; j++)
#pragma unroll
      for (int i = 0; i < W; i++) sum += x[j][i] * (Squares ? x[j][i] : y[j][i]);
    total += sum;
  }
  total = ordered_block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) total_kernel(const double* partial, int count, const float* add, float* y) {
  double total = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) total += partial[i];
  total = ordered_block_sum(total);
  if (threadIdx.x == 0) *y = add ? *add + static_cast<float>(total) : static_cast<float>(total);
}

template <bool Squares, typename T>
void sum_products(Context& context, const Tensor& a, const Tensor& b, const Tensor& add, const Tensor& y) {
  const int64_t size = a.size(), tiles = ceil_div(size, int64_t{kTile});
  const int blocks = static_cast<int>(tiles < kPartials ? tiles : kPartials);
  auto* partial = static_cast<double*>(context.scratch(kPartials * sizeof(double)));
  launch({static_cast<unsigned>(blocks), kThreads, 0, context.stream},
         all_aligned(a, b) ? products_kernel<true, Squares, T> : products_kernel<false, Squares, T>, a.as<T>(),
         b.as<T>(), size, partial);
  launch({1, kThreads, 0, context.stream}, total_kernel, partial, blocks, add.as<float>(), y.as<float>());
}

}  // namespace

void dot(Context& context, const dot_args& args) {
  sum_products<false, float>(context, args.a, args.b, args.add, args.y);
}

void sum_squares(Context& context, const sum_squares_args& args) {
  with_float_type(args.x.dtype,
                  [&](auto zero) { sum_products<true, decltype(zero)>(context, args.x, args.x, args.add, args.y); });
}

}  // namespace rw::cuda
