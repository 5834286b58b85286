// rmsnorm_fwd: rstd[n] = 1 / sqrt(mean_c x[n,c]^2 + eps), y[n,c] = w[c] x[n,c] rstd[n]. arXiv 1910.07467.
// rmsnorm_bwd: with g = w dy and s[n] = rstd[n]^3 / C sum_c g x: dx = add + rstd g - s x, dw[c] = dw_add + sum_n dy x
// rstd.
//
// x, y, dy, add, dx (N,C), w, dw_add and dw (C), each f32 or bf16, rstd (N) f32; computed in f32. Memory traffic:
// forward 2 N C elements, backward 3 N C (4 with add): dx and dw come from one reading of x and dy.
//
// Forward: a block for a row, 1, 8 or 16 warps by C. A thread keeps its first 3 packs of the row in registers; what
// lies beyond (C > 6144 in f32, 12288 in bf16) is read again, from the L1 or L2. Backward: up to 512 blocks (2048 of
// one warp), each for a range of rows. A block adds dy x rstd, row after row, to C sums in shared memory (4 C bytes; in
// device memory where they do not fit), each thread to sums of its own channels, and writes them to scratch (blocks,
// C); a second kernel adds the blocks up in a fixed order. The table's `partial` holds 64 blocks, too few to fill a
// GPU, and is not used. The order of all sums depends on N, C and the dtypes alone, not on alignment or the device.
#include "elementwise.h"

namespace rw::cuda {

namespace {

constexpr int kHeld = 3;

// Blocks of an SM, as its registers allow: 32 is what every SM can hold.
constexpr int resident(int warps_per_sm, int warps_per_block) {
  return warps_per_sm / warps_per_block < 32 ? warps_per_sm / warps_per_block : 32;
}

template <typename F>
constexpr int kRowPack = kPack<F>;

// ---- forward
// ----------------------------------------------------------------------------------------------------------

template <int Warps, bool Vector, typename F, typename W>
__global__ void __launch_bounds__(Warps* kWarp, Vector ? resident(40, Warps) : 1)
    rmsnorm_fwd_kernel(const F* x, const W* w, F* y, float* rstds, int channels, float eps) {
  constexpr int P = kRowPack<F>;
  constexpr int kStep = Warps * kWarp * P;
  const int own = static_cast<int>(threadIdx.x) * P;
  x += int64_t{blockIdx.x} * channels;
  y += int64_t{blockIdx.x} * channels;

  Raw<P, F> held[kHeld];
  float sum = 0;
  const auto add_squares = [&](const Raw<P, F>& raw) {
    float value[P];
    to_floats(raw, value);
#pragma unroll
    for (int i = 0; i < P; i++) sum += value[i] * value[i];
  };
#pragma unroll
  for (int k = 0; k < kHeld; k++) held[k] = fetch_some<Vector, P>(x + own + k * kStep, channels - own - k * kStep);
#pragma unroll
  for (int k = 0; k < kHeld; k++) add_squares(held[k]);
#pragma unroll 1
  for (int c = own + kHeld * kStep; c < channels; c += kStep) add_squares(fetch_some<Vector, P>(x + c, channels - c));

  struct Sum;
  const float mean = block_sum<Warps, Sum>(sum) / static_cast<float>(channels);
  const float rstd = 1.0f / sqrtf(mean + eps);
  if (threadIdx.x == 0) rstds[blockIdx.x] = rstd;

  const auto scale = [&](const Raw<P, F>& raw, int c) {
    float value[P], weight[P];
    to_floats(raw, value);
    load_some<Vector>(w + c, channels - c, weight);
#pragma unroll
    for (int i = 0; i < P; i++) value[i] = weight[i] * (value[i] * rstd);
    store_some<Vector>(y + c, channels - c, value);
  };
#pragma unroll
  for (int k = 0; k < kHeld; k++) scale(held[k], own + k * kStep);
#pragma unroll 1
  for (int c = own + kHeld * kStep; c < channels; c += kStep) scale(fetch_some<Vector, P>(x + c, channels - c), c);
}

// ---- backward
// ---------------------------------------------------------------------------------------------------------

// Where the sum of channel c lies in a row of sums: packs of 8 are split into two halves, all first halves before all
// second ones, so that lanes of neighbouring packs access neighbouring 16 bytes.
template <int P>
__device__ __forceinline__ int sum_index(int c, int packs) {
  return (c % P / 4 * packs + c / P) * 4 + c % 4;
}

template <int Warps, bool Vector, bool Shared, typename F, typename W>
__global__ void __launch_bounds__(Warps* kWarp, Vector ? resident(32, Warps) : 1)
    rmsnorm_bwd_kernel(const F* x, const W* w, const float* rstds, const F* dy, const F* add, F* dx, float* partial,
                       int64_t rows, int rows_per_block, int channels) {
  constexpr int P = kRowPack<F>;
  constexpr int kStep = Warps * kWarp * P;
  const int own = static_cast<int>(threadIdx.x) * P;
  const int packs = ceil_div(channels, P);
  partial += int64_t{blockIdx.x} * packs * P;
  float* sums = Shared ? &dyn_smem<float>() : partial;
  const float zeros[4] = {};
  for (int c = own; c < channels; c += kStep)
#pragma unroll
    for (int half = 0; half < P; half += 4) store(sums + sum_index<P>(c + half, packs), zeros);

  const int64_t begin = int64_t{blockIdx.x} * rows_per_block;
  const int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
  for (int64_t n = begin; n < end; n++) {
    const int64_t row = n * channels;
    const float rstd = rstds[n];
    float total = 0;
    // g x into the row's sum, dy x rstd into the sums of its channels
    const auto accumulate = [&](const Raw<P, F>& raw_x, const Raw<P, F>& raw_dy, int c) {
      float value[P], slope[P], weight[P];
      to_floats(raw_x, value);
      to_floats(raw_dy, slope);
      load_some<Vector>(w + c, channels - c, weight);
#pragma unroll
      for (int half = 0; half < P; half += 4) {
        float* to = sums + sum_index<P>(c + half, packs);
        float sum[4];
        load(to, sum);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float product = slope[half + i] * value[half + i];
          total += weight[half + i] * product;
          sum[i] += product * rstd;
        }
        store(to, sum);
      }
    };
    Raw<P, F> held_x[kHeld], held_dy[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; k++) {
      const int c = own + k * kStep;
      held_x[k] = fetch_some<Vector, P>(x + row + c, channels - c);
      held_dy[k] = fetch_some<Vector, P>(dy + row + c, channels - c);
    }
#pragma unroll
    for (int k = 0; k < kHeld; k++)
      if (own + k * kStep < channels) accumulate(held_x[k], held_dy[k], own + k * kStep);
#pragma unroll 1
    for (int c = own + kHeld * kStep; c < channels; c += kStep)
      accumulate(fetch_some<Vector, P>(x + row + c, channels - c), fetch_some<Vector, P>(dy + row + c, channels - c),
                 c);

    // On its way while the block meets.
    const auto fetch_add = [&](int c) {
      return add ? fetch_some<Vector, P>(add + row + c, channels - c) : Raw<P, F>{};
    };
    Raw<P, F> held_add[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; k++) held_add[k] = fetch_add(own + k * kStep);

    if constexpr (Warps > 1) __syncthreads();  // all have read the last row's sum
    struct Total;
    const float mean = block_sum<Warps, Total>(total) / static_cast<float>(channels);
    const float scale = rstd * rstd * rstd * mean;

    const auto write = [&](const Raw<P, F>& raw_x, const Raw<P, F>& raw_dy, const Raw<P, F>& raw_add, int c) {
      float value[P], slope[P], weight[P], before[P];
      to_floats(raw_x, value);
      to_floats(raw_dy, slope);
      to_floats(raw_add, before);
      load_some<Vector>(w + c, channels - c, weight);
#pragma unroll
      for (int i = 0; i < P; i++) value[i] = weight[i] * slope[i] * rstd - value[i] * scale;
      if (add)
#pragma unroll
        for (int i = 0; i < P; i++) value[i] = before[i] + value[i];
      store_some<Vector>(dx + row + c, channels - c, value);
    };
#pragma unroll
    for (int k = 0; k < kHeld; k++)
      if (own + k * kStep < channels) write(held_x[k], held_dy[k], held_add[k], own + k * kStep);
#pragma unroll 1
    for (int c = own + kHeld * kStep; c < channels; c += kStep)
      write(fetch_some<Vector, P>(x + row + c, channels - c), fetch_some<Vector, P>(dy + row + c, channels - c),
            fetch_add(c), c);
  }

  if constexpr (Shared) {
    for (int c = own; c < channels; c += kStep)
#pragma unroll
      for (int half = 0; half < P; half += 4) {
        const int at = sum_index<P>(c + half, packs);
        float sum[4];
        load(sums + at, sum);
        store(partial + at, sum);
      }
  }
}

constexpr int kSumWarps = 16;

// dw[c] = dw_add[c] + sum over the blocks: a lane for a channel, warp i takes every 16th block from the i-th on.
template <int P, typename G>
__global__ void __launch_bounds__(kSumWarps* kWarp)
    rmsnorm_bwd_sum_kernel(const float* partial, int blocks, const G* add, G* dw, int channels) {
  const int packs = ceil_div(channels, P);
  const int c = static_cast<int>(blockIdx.x) * kWarp + lane_index();
  float sum = 0;
  if (c < channels) {
    partial += sum_index<P>(c, packs);
#pragma unroll 8
    for (int block = warp_index(); block < blocks; block += kSumWarps) sum += partial[int64_t{block} * packs * P];
  }
  struct Sums {
    float value[kSumWarps][kWarp];
  };
  auto& sums = static_smem<Sums, Sums>();
  sums.value[warp_index()][lane_index()] = sum;
  __syncthreads();
  if (warp_index() > 0 || c >= channels) return;
#pragma unroll
  for (int warp = 1; warp < kSumWarps; warp++) sum += sums.value[warp][lane_index()];
  dw[c] = from_float<G>(add ? to_float(add[c]) + sum : sum);
}

int channels_of(const Tensor& x) {
  if (x.dims[1] > 1 << 30)
    throw std::runtime_error("x has " + std::to_string(x.dims[1]) + " channels, the limit is 1073741824");
  return static_cast<int>(x.dims[1]);
}

// Calls f with the number of warps for a row of `packs`, which they hold in registers but for the widest.
template <typename Body>
void with_warps(int packs, Body&& f) {
  if (packs <= kHeld * kWarp) return f(std::integral_constant<int, 1>{});
  if (packs <= 8 * kHeld * kWarp) return f(std::integral_constant<int, 8>{});
  f(std::integral_constant<int, 16>{});
}

template <bool Vector, typename F, typename W>
void forward(Context& context, const rmsnorm_fwd_args& args) {
  const int channels = channels_of(args.x);
  with_warps(ceil_div(channels, kRowPack<F>), [&](auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    launch({static_cast<unsigned>(args.x.dims[0]), kWarps * kWarp, 0, context.stream},
           rmsnorm_fwd_kernel<kWarps, Vector, F, W>, args.x.as<F>(), args.w.as<W>(), args.y.as<F>(),
           args.rstd.as<float>(), channels, static_cast<float>(args.eps));
  });
}

template <bool Vector, typename F, typename W>
void backward(Context& context, const rmsnorm_bwd_args& args) {
  constexpr int P = kRowPack<F>;
  constexpr int64_t kLeastRows = 4;
  const int channels = channels_of(args.x), packs = ceil_div(channels, P);
  const int64_t rows = args.x.dims[0], wanted = packs <= kHeld * kWarp ? 2048 : 512;
  const size_t row_bytes = static_cast<size_t>(packs) * P * sizeof(float);
  const auto fitting = static_cast<int64_t>(context.workspace_bytes / row_bytes);
  const int64_t most = fitting < 1 ? 1 : fitting < wanted ? fitting : wanted;
  const int64_t share = ceil_div(rows, most), rows_per_block = share < kLeastRows ? kLeastRows : share;
  const int64_t blocks = ceil_div(rows, rows_per_block);
  auto* partial = static_cast<float*>(context.scratch(static_cast<size_t>(blocks) * row_bytes));
  const bool shared = row_bytes + 1024 <= context.max_smem;  // the sums over the block need some as well
  with_warps(packs, [&](auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    auto* kernel = rmsnorm_bwd_kernel<kWarps, Vector, true, F, W>;
    if constexpr (kWarps == 16)  // the widest rows only
      if (!shared) kernel = rmsnorm_bwd_kernel<kWarps, Vector, false, F, W>;
    Launch at(static_cast<unsigned>(blocks), kWarps * kWarp, shared ? row_bytes : 0, context.stream);
    if (shared && kWarps == 16) at.most_smem = context.max_smem - 1024;
    launch(at, kernel, args.x.as<F>(), args.w.as<W>(), args.rstd.as<float>(), args.dy.as<F>(), args.add.as<F>(),
           args.dx.as<F>(), partial, rows, rows_per_block, channels);
  });
  with_float_type(args.dw.dtype, [&](auto zero) {
    using G = decltype(zero);
    launch({static_cast<unsigned>(ceil_div(channels, kWarp)), kSumWarps * kWarp, 0, context.stream},
           rmsnorm_bwd_sum_kernel<P, G>, partial, blocks, args.dw_add.as<G>(), args.dw.as<G>(), channels);
  });
}

}  // namespace

void rmsnorm_fwd(Context& context, const rmsnorm_fwd_args& args) {
  with_float_type(args.x.dtype, [&](auto f) {
    with_float_type(args.w.dtype, [&](auto w) {
      using F = decltype(f);
      using W = decltype(w);
      if (args.x.dims[1] % kRowPack<F> == 0 && all_aligned(args.x, args.w, args.y))
        return forward<true, F, W>(context, args);
      forward<false, F, W>(context, args);
    });
  });
}

void rmsnorm_bwd(Context& context, const rmsnorm_bwd_args& args) {
  with_float_type(args.x.dtype, [&](auto f) {
    with_float_type(args.w.dtype, [&](auto w) {
      using F = decltype(f);
      using W = decltype(w);
      if (args.x.dims[1] % kRowPack<F> == 0 && all_aligned(args.x, args.w, args.dy, args.add, args.dx))
        return backward<true, F, W>(context, args);
      backward<false, F, W>(context, args);
    });
  });
}

}  // namespace rw::cuda
