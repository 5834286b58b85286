// c = a b (+ add), with a (M,K), b (K,N) and c (M,N) stored as the op's suffix says: n as is, t transposed. a, b, add
// and c are f32 or bf16 each; sums are f32, and c is rounded once, at its store.
//
// a and b bf16 (gemm_mma.h): mma.sync 16x8x16. A block computes a tile of c, 64 of k at a time: three stages of tiles
//   of a and b in shared memory, filled by cp.async two stages ahead and swizzled, so that copies and ldmatrix (.trans
//   where an operand is not stored along k) take one pass over the banks each. Fragments are loaded 16 k before their
//   use. c goes from registers to memory, 16 bytes a thread. Tiles (threads, shared memory, blocks of an SM of sm_80):
//   128 x 256 (256, 144 KB, 1), 128 x 128 (256, 96 KB, 1), 64 x 64 (128, 48 KB, 3). Rows whose start or length is no
//   multiple of 16 bytes are copied element by element, in tiles of 64 x 64.
// otherwise (gemm_ffma.h): f32 products and sums, two stages of 16 k, elements widened on their way through registers:
//   128 x 128 with 8 x 8 elements a thread (256, 32 KB, 2), 64 x 64 with 4 x 4 (256, 16 KB, 2).
// matmul_swiglu: the columns of gate and up take turns in tiles of 128 x 256 or 64 x 128 (128 threads, 72 KB, 2), so
//   that a thread has both and makes y on the way; otherwise two products and the kernel of swiglu.cu.
// M <= 4 with b transposed (decoding: y = x w^T): b is read once, straight from memory, two rows of it a warp.
//
// Epilogues: add, by which the residual stream and added up gradients take no pass of their own, and y of SwiGLU. RoPE
//   has none: it would save at most 1.5 % of attention, and a tile would have to hold both halves of a head
//   (attention.cu). Nor have the gradients of gate and up: at 32,768 tokens of 7B dy is 0.72 GB, written once and read
//   once, 0.34 ms at 4.3 TB/s, beside 114 ms for the layer's products (39.8 TFLOP) at 350 TFLOP/s.
//
// The grid is one block a tile, in groups that share rows and columns in the L2; where tiles are too few for the SMs,
// the sum is divided among several blocks, whose f32 parts go to scratch and are added in their order by a second
// kernel. Tile and division are chosen by an estimate of the time: bits depend on the shape and the number of SMs.
// Traffic: a is read N / TileN times, b M / TileM times, mostly from the L2; add and c once.
//
// Kerr, Merrill, Demouth, Tran, CUTLASS: Fast Linear Algebra in CUDA C++, 2017; Osama et al., Stream-K, 2301.03598.
#include "gemm_ffma.h"
#include "gemm_mma.h"

namespace rw::cuda {

namespace {

// ---- the sum's parts
// --------------------------------------------------------------------------------------------------

constexpr int kSumThreads = 256;

// c = add + parts[0] + parts[1] + ..
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const float* parts, int count, const T* add, T* c, int64_t size) {
  const int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int part = 0; part < count; part++) sum += parts[part * size + i];
  c[i] = from_float<T>(add ? to_float(add[i]) + sum : sum);
}

// ---- few rows
// ---------------------------------------------------------------------------------------------------------

constexpr int kFewThreads = 256, kFewColumns = 2;

// Each warp computes two columns of c, Rows at most: b's rows are read 8 elements a lane, a's come out of the L1.
template <typename A, typename B, typename C, int Rows>
__global__ void __launch_bounds__(kFewThreads) few_rows_kernel(typename Elements<B>::P p) {
  const int column = (blockIdx.x * (kFewThreads / kWarp) + warp_index()) * kFewColumns, lane = lane_index();
  const A* a[Rows];
  typename Elements<B>::Pointer b[kFewColumns];
  const auto all = Elements<B>::of(p);
#pragma unroll
  for (int i = 0; i < Rows; i++) a[i] = static_cast<const A*>(p.a) + (i < p.m ? i : p.m - 1) * p.a_stride;
#pragma unroll
  for (int j = 0; j < kFewColumns; j++) b[j] = all + (column + j < p.n ? column + j : p.n - 1) * p.b_stride;

  float sum[Rows][kFewColumns] = {};
#pragma unroll(Rows == 1 ? 4 : 1)
  for (int k = 8 * lane; k < p.k; k += 8 * kWarp) {
    float x[8], y[kFewColumns][8];
#pragma unroll
    for (int j = 0; j < kFewColumns; j++) {
      load_piece(b[j] + k, y[j]);
      if constexpr (kIsQuantized<typename Elements<B>::P> && std::is_same_v<A, bf16>)
#pragma unroll
        for (int u = 0; u < 8; u++) y[j][u] = to_float(to_bf16(y[j][u]));  // as a tile has it
    }
#pragma unroll
    for (int i = 0; i < Rows; i++) {
      load_piece(a[i] + k, x);
#pragma unroll
      for (int j = 0; j < kFewColumns; j++)
#pragma unroll
        for (int u = 0; u < 8; u++) sum[i][j] += x[u] * y[j][u];
    }
  }
#pragma unroll
  for (int i = 0; i < Rows; i++)
#pragma unroll
    for (int j = 0; j < kFewColumns; j++) {
      const float total = warp_sum(sum[i][j]);
      if (lane != i * kFewColumns + j || i >= p.m || column + j >= p.n) continue;
      const int64_t at = int64_t{i} * p.n + column + j;
      static_cast<C*>(p.c)[at] = from_float<C>(p.add ? to_float(static_cast<const C*>(p.add)[at]) + total : total);
    }
}

template <typename B>
void launch_few_rows(const Context& context, DType a, const typename Elements<B>::P& p) {
  with_float_type(a, [&](auto zero_a) {
    with_float_type(p.dtype, [&](auto zero_c) {
      using A = decltype(zero_a);
      using C = decltype(zero_c);
      const auto kernel = p.m == 1 ? few_rows_kernel<A, B, C, 1> : few_rows_kernel<A, B, C, 4>;
      const unsigned blocks = ceil_div(p.n, kFewThreads / kWarp * kFewColumns);
      launch({blocks, kFewThreads, 0, context.stream}, kernel, p);
    });
  });
}

// ---- tiles
// ------------------------------------------------------------------------------------------------------------

// A kernel and what the choice needs to know of it: the part of c that a block computes; `rate`, products a clock of an
// SM as far as a large product gets.
template <typename P>
struct TileKernel {
  int m, n, threads;
  size_t smem;
  int blocks_per_sm;
  double rate;
  void (*kernel)(P);
};

template <typename Tile, Layout layout, bool Aligned, typename P = Product>
constexpr TileKernel<P> mma_tile(double rate) {
  return {Tile::m,
          Tile::n,
          Tile::threads,
          sizeof(typename RightOperand<Tile, layout, Aligned, P>::Smem),
          Tile::blocks_per_sm,
          rate,
          mma_kernel<Tile, layout, Aligned, P>};
}

// Half of a tile's columns are those of gate, half those of up.
template <typename Tile>
constexpr TileKernel<GatedProduct> gated_tile(double rate) {
  return {Tile::m,
          Tile::n / 2,
          Tile::threads,
          sizeof(typename Tile::Smem),
          Tile::blocks_per_sm,
          rate,
          mma_kernel<Tile, Layout::nt, true, GatedProduct>};
}

template <typename A, typename B, Layout layout, int Quads>
constexpr TileKernel<typename Elements<B>::P> ffma_tile(double rate) {
  using Tile = FfmaTile<Quads>;
  return {Tile::m, Tile::n, Tile::threads, sizeof(typename Tile::Smem), 2, rate, ffma_kernel<A, B, layout, Quads>};
}

using LargeTile = MmaTile<128, 256, 2, 4, 1>;
using MediumTile = MmaTile<128, 128, 2, 4, 1>;
using SmallTile = MmaTile<64, 64, 2, 2, 3>;
using SmallGatedTile = MmaTile<64, 128, 2, 2, 2>;

// Rates relative to the 1024 products a clock of an SM of sm_80, and 64 in f32: estimates, not yet measured.
template <Layout layout>
constexpr TileKernel<Product> mma_tiles[] = {mma_tile<LargeTile, layout, true>(0.9 * 1024),
                                             mma_tile<MediumTile, layout, true>(0.75 * 1024),
                                             mma_tile<SmallTile, layout, true>(0.5 * 1024)};
template <Layout layout>
constexpr TileKernel<Product> mma_unaligned_tiles[] = {mma_tile<SmallTile, layout, false>(0.2 * 1024)};
template <typename B, Layout layout>
constexpr TileKernel<Product> ffma_tiles[] = {ffma_tile<float, B, layout, 2>(0.85 * 64),
                                              ffma_tile<float, B, layout, 1>(0.5 * 64)};
// No model multiplies bf16 by f32 weights.
template <Layout layout>
constexpr TileKernel<Product> ffma_bf16_tiles[] = {ffma_tile<bf16, float, layout, 1>(0.5 * 64)};

// Expanding codes takes instructions beside the products', and registers that the large tile has not left.
template <DType dtype, Layout layout>
constexpr TileKernel<QuantizedProduct<dtype>> quantized_mma_tiles[] = {
    mma_tile<MediumTile, layout, true, QuantizedProduct<dtype>>(0.65 * 1024),
    mma_tile<SmallTile, layout, true, QuantizedProduct<dtype>>(0.4 * 1024)};
template <DType dtype, Layout layout>
constexpr TileKernel<QuantizedProduct<dtype>> quantized_scattered_tiles[] = {
    mma_tile<SmallTile, layout, false, QuantizedProduct<dtype>>(0.1 * 1024)};
template <DType dtype, Layout layout>
constexpr TileKernel<QuantizedProduct<dtype>> quantized_ffma_tiles[] = {
    ffma_tile<float, Coded<dtype>, layout, 1>(0.4 * 64)};

// A product of gate and up counts double, hence half the rates.
constexpr TileKernel<GatedProduct> gated_tiles[] = {gated_tile<LargeTile>(0.45 * 1024),
                                                    gated_tile<SmallGatedTile>(0.3 * 1024)};

template <typename P>
struct Tiles {
  const TileKernel<P>* begin;
  int count;
};

template <typename P, size_t Count>
Tiles<P> list(const TileKernel<P> (&tiles)[Count]) {
  return {tiles, static_cast<int>(Count)};
}

template <Layout layout>
Tiles<Product> tiles_for(DType a, DType b, bool aligned) {
  if (a == DType::bf16 && b == DType::bf16)
    return aligned ? list(mma_tiles<layout>) : list(mma_unaligned_tiles<layout>);
  if (a == DType::bf16) return list(ffma_bf16_tiles<layout>);
  if (b == DType::bf16) return list(ffma_tiles<bf16, layout>);
  return list(ffma_tiles<float, layout>);
}

template <typename P>
struct Choice {
  const TileKernel<P>* tile;
  int shares;  // among how many blocks the sum of a tile is divided
};

constexpr int kMaxShares = 32, kMinShare = 256;

// The static variables of a block, beside a tile's own memory: the map of a quantised operand.
constexpr size_t kStaticSmem = 2048;

// Of the tiles that a block of this GPU has the memory for, the least time in clocks: that of the SM with the most
// blocks, each with a start and an end that cost as much as 192 steps of k; for a divided sum also its second kernel
// (3000 clocks, then 1500 bytes a clock). An SM with less than half of the blocks that it could have at a time is not
// quicker than one with half of them.
template <typename P>
Choice<P> choose(const Tiles<P>& tiles, int64_t m, int64_t n, int64_t k, const Context& context, int most_shares) {
  Choice<P> best = {};
  const int64_t fitting = static_cast<int64_t>(context.workspace_bytes / sizeof(float)) / (m * n);
  double best_time = 0;
  for (const TileKernel<P>* tile = tiles.begin; tile < tiles.begin + tiles.count; tile++) {
    if (tile->smem + kStaticSmem > context.max_smem) continue;  // the last one fits every GPU
    const int64_t count = ceil_div<int64_t>(m, tile->m) * ceil_div<int64_t>(n, tile->n);
    for (int shares = 1;
         shares <= most_shares && (shares == 1 || (shares <= fitting && k >= int64_t{kMinShare} * shares)); shares++) {
      const int64_t most = ceil_div<int64_t>(count * shares, context.sm_count), least = (tile->blocks_per_sm + 1) / 2;
      const double block =
          static_cast<double>(tile->m) * tile->n * (static_cast<double>(k) / shares + 192) / tile->rate;
      double time = static_cast<double>(most > least ? most : least) * block;
      if (shares > 1) time += 3000 + static_cast<double>(m) * static_cast<double>(n) * (2 * shares + 1) * 4 / 1500;
      if (best.tile && time >= best_time) continue;
      best = {tile, shares};
      best_time = time;
    }
  }
  return best;
}

// Whether rows of `length` elements can be read `piece` elements at a time.
bool in_pieces(const Matrix& x, int64_t length, int piece) {
  if (is_quantized(x.dtype)) return length % piece == 0;
  return aligned(x.data, static_cast<size_t>(piece * dtype_bytes(x.dtype) < 16 ? piece * dtype_bytes(x.dtype) : 16)) &&
         x.stride % piece == 0 && length % piece == 0;
}

template <typename P>
void launch_tiles(Context& context, const Tiles<P>& tiles, P p) {
  const auto [tile, wanted] = choose(tiles, p.m, p.n, p.k, context, kMaxShares);
  p.k_share = static_cast<int>(ceil_div(ceil_div<int64_t>(p.k, wanted), int64_t{64}) * 64);
  const unsigned shares = ceil_div(p.k, p.k_share);  // none of them empty
  const unsigned count = ceil_div(p.m, tile->m) * ceil_div(p.n, tile->n);
  const int64_t size = int64_t{p.m} * p.n;
  const Launch at({count, shares}, tile->threads, tile->smem, context.stream);
  if (shares == 1) return launch(at, tile->kernel, p);

  P parts = p;
  parts.c = context.scratch(static_cast<size_t>(size * shares) * sizeof(float));
  parts.add = nullptr;
  parts.dtype = DType::f32;
  parts.wide = size % 4 == 0 && p.n % kMmaPiece == 0;
  launch(at, tile->kernel, parts);
  with_float_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const unsigned blocks = static_cast<unsigned>(ceil_div<int64_t>(size, kSumThreads));
    launch({blocks, kSumThreads, 0, context.stream}, sum_parts_kernel<T>, static_cast<const float*>(parts.c),
           static_cast<int>(shares), static_cast<const T*>(p.add), static_cast<T*>(p.c), size);
  });
}

template <DType dtype>
void quantized_gemm(Context& context, Layout layout, DType a, bool few, const Product& product) {
  QuantizedProduct<dtype> p = {};
  static_cast<Product&>(p) = product;
  p.q = quantized(dtype, const_cast<void*>(p.b), int64_t{p.n} * p.k);
  p.maps = kQuantizedMaps;
  const bool whole = p.b_stride % kQuantBlock == 0;
  if (few && whole) return launch_few_rows<Coded<dtype>>(context, a, p);
  const auto choose_tiles = [&](auto constant) {
    constexpr Layout order = decltype(constant)::value;
    if (a == DType::f32) return launch_tiles(context, list(quantized_ffma_tiles<dtype, order>), p);
    if (whole && p.a_wide) return launch_tiles(context, list(quantized_mma_tiles<dtype, order>), p);
    launch_tiles(context, list(quantized_scattered_tiles<dtype, order>), p);
  };
  if (layout == Layout::nt) return choose_tiles(std::integral_constant<Layout, Layout::nt>{});
  choose_tiles(std::integral_constant<Layout, Layout::nn>{});
}

constexpr int64_t kLargest = INT32_MAX - 1024;  // dimensions are rounded up to tiles in 32 bits

void need_sizes(int64_t m, int64_t n, int64_t k) {
  if (m > kLargest || n > kLargest || k > kLargest)
    throw std::runtime_error("a product of M = " + std::to_string(m) + ", N = " + std::to_string(n) +
                             ", K = " + std::to_string(k) + ": no dimension may exceed " + std::to_string(kLargest));
}

}  // namespace

void gemm(Context& context, Layout layout, int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b,
          const void* add, void* c, DType dtype) {
  need_sizes(m, n, k);
  const int64_t a_row = layout == Layout::tn ? m : k, b_row = layout == Layout::nt ? k : n;
  const bool mma = a.dtype == DType::bf16 && b.dtype != DType::f32;
  const int piece = mma ? kMmaPiece : kFfmaPiece;
  const Matrix out = {c, dtype, n}, addend = {add, dtype, n};
  const Product p = {a.data,
                     b.data,
                     add,
                     c,
                     a.stride,
                     b.stride,
                     static_cast<int>(m),
                     static_cast<int>(n),
                     static_cast<int>(k),
                     static_cast<int>(k),
                     dtype,
                     in_pieces(out, n, piece) && in_pieces(addend, n, piece),
                     in_pieces(a, a_row, piece),
                     in_pieces(b, b_row, piece)};
  const bool few = layout == Layout::nt && m <= 4 && in_pieces(a, k, 8);
  if (b.dtype == DType::nf4) return quantized_gemm<DType::nf4>(context, layout, a.dtype, few, p);
  if (b.dtype == DType::int8) return quantized_gemm<DType::int8>(context, layout, a.dtype, few, p);
  if (few && in_pieces(b, k, 8))
    return with_float_type(b.dtype, [&](auto zero) { launch_few_rows<decltype(zero)>(context, a.dtype, p); });
  const bool whole = p.a_wide && p.b_wide;
  switch (layout) {
    case Layout::nn:
      return launch_tiles(context, tiles_for<Layout::nn>(a.dtype, b.dtype, whole), p);
    case Layout::nt:
      return launch_tiles(context, tiles_for<Layout::nt>(a.dtype, b.dtype, whole), p);
    case Layout::tn:
      return launch_tiles(context, tiles_for<Layout::tn>(a.dtype, b.dtype, whole), p);
  }
}

namespace {

template <typename Args>
void matmul(Context& context, Layout layout, int64_t k, const Args& args) {
  const auto stored = [](const Tensor& x) { return Matrix{x.data, x.dtype, x.dims[1]}; };
  gemm(context, layout, args.c.dims[0], args.c.dims[1], k, stored(args.a), stored(args.b), args.add.data, args.c.data,
       args.c.dtype);
}

// Whether gate, up and y come from one kernel: bf16 on tensor cores, whole pieces everywhere, more than a few rows.
bool gated_product(const Context& context, const matmul_swiglu_args& args) {
  const int64_t m = args.y.dims[0], n = args.y.dims[1], k = args.a.dims[1];
  if (args.a.dtype != DType::bf16 || args.w_gate.dtype != DType::bf16 || m <= 4) return false;
  for (const Tensor* x : {&args.a, &args.w_gate, &args.w_up, &args.gate, &args.up, &args.y})
    if (!in_pieces({x->data, x->dtype, x->dims[1]}, x->dims[1], kMmaPiece)) return false;
  GatedProduct p = {};
  p.a = args.a.data, p.b = args.w_gate.data, p.w_up = args.w_up.data;
  p.c = args.gate.data, p.up = args.up.data, p.y = args.y.data;
  p.a_stride = p.b_stride = k;
  p.m = static_cast<int>(m), p.n = static_cast<int>(n), p.k = static_cast<int>(k);
  p.k_share = ceil_div(p.k, 64) * 64;
  p.dtype = DType::bf16;
  p.wide = p.a_wide = p.b_wide = true;
  const TileKernel<GatedProduct>& tile = *choose(list(gated_tiles), m, n, k, context, 1).tile;
  const unsigned count = ceil_div(p.m, tile.m) * ceil_div(p.n, tile.n);
  const Launch at(count, tile.threads, tile.smem, context.stream);
  launch(at, tile.kernel, p);
  return true;
}

}  // namespace

void matmul_nn(Context& context, const matmul_nn_args& args) { matmul(context, Layout::nn, args.a.dims[1], args); }
void matmul_nt(Context& context, const matmul_nt_args& args) { matmul(context, Layout::nt, args.a.dims[1], args); }
void matmul_tn(Context& context, const matmul_tn_args& args) { matmul(context, Layout::tn, args.a.dims[0], args); }

void matmul_swiglu(Context& context, const matmul_swiglu_args& args) {
  const int64_t m = args.y.dims[0], n = args.y.dims[1], k = args.a.dims[1];
  need_sizes(m, n, k);
  if (gated_product(context, args)) return;
  matmul_nt(context, {args.a, args.w_gate, {}, args.gate});
  matmul_nt(context, {args.a, args.w_up, {}, args.up});
  swiglu_fwd(context, {args.gate, args.up, args.y});
}

}  // namespace rw::cuda
