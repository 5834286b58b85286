// The f32 kernel of matmul.cu: a and b f32 or bf16 each, or b quantised; exact f32 products and sums.
#pragma once
#include "gemm_quantized.h"

namespace rw::cuda {

// 256 threads, 16 x 16 of them with Quads x Quads pieces of 4 x 4 elements of c each, 64 apart.
template <int Quads>
struct FfmaTile {
  static constexpr int m = 64 * Quads, n = m, k = 16, threads = 256, size = k * m + 8 * (k / 4 - 1);

  struct Smem {
    float a[2][size];
    REDZONE(after_a);
    float b[2][size];
    REDZONE(after_b);
  };

  // Where the element (k, at) of an operand lies. Every fourth k starts 8 banks later: lanes that store four k of a row
  // of c each would otherwise meet the same banks.
  __device__ __forceinline__ static int place(int k, int at) { return k * m + k / 4 * 8 + at; }
};

// A thread's share of moving an operand's tiles, 16 k x Extent, to shared memory by way of registers. Along: whether
// the operand is stored along k. What lies outside of the matrix becomes 0.
template <typename T, bool Along, int Quads>
struct FfmaOperand {
  static constexpr int kExtent = 64 * Quads;
  // Pieces of a row as stored, and what lies between the rows of a thread's pieces.
  static constexpr int kPieces = Along ? 4 : kExtent / kFfmaPiece, kRowStep = 256 / kPieces;

  typename Elements<T>::Pointer from;  // the thread's first piece of the next tile
  int64_t stride;
  int rows, columns;  // of the matrix, from there on
  bool wide;

  __device__ __forceinline__ FfmaOperand(typename Elements<T>::Pointer data, int64_t stride, int first, int end, int k,
                                         int k_end, bool wide)
      : stride(stride), wide(wide) {
    const int row = (Along ? first : k) + threadIdx.x / kPieces;
    const int column = (Along ? k : first) + threadIdx.x % kPieces * kFfmaPiece;
    from = data + (row * stride + column);
    rows = (Along ? end : k_end) - row;
    columns = (Along ? k_end : end) - column;
  }

  // The thread's i-th piece of the tile: from memory, and into the tile in shared memory.
  __device__ __forceinline__ void load(int i, float (&piece)[kFfmaPiece]) const {
    const auto p = from + i * kRowStep * stride;
    const int count = i * kRowStep < rows ? columns : 0;
#pragma unroll
    for (int j = 0; j < kFfmaPiece; j++) piece[j] = 0;
    if (wide) {
      if (count > 0) load_piece(p, piece);  // columns is a multiple of the piece
    } else {
#pragma unroll
      for (int j = 0; j < kFfmaPiece; j++)
        if (j < count) piece[j] = to_float(p[j]);
    }
  }

  __device__ __forceinline__ void store(int i, const float (&piece)[kFfmaPiece], float* tile) const {
    const int row = threadIdx.x / kPieces + i * kRowStep, column = threadIdx.x % kPieces * kFfmaPiece;
    if constexpr (Along) {
      float* to = tile + FfmaTile<Quads>::place(column, row);
#pragma unroll
      for (int j = 0; j < kFfmaPiece; j++) to[j * kExtent] = piece[j];
    } else {
      store_vector(tile + FfmaTile<Quads>::place(row, column), piece);
    }
  }

  __device__ __forceinline__ void advance() {
    from += Along ? 16 : 16 * stride;
    (Along ? columns : rows) -= 16;
  }
};

template <typename AType, typename BType, Layout layout, int Quads>
__global__ void __launch_bounds__(256, 2) ffma_kernel(typename Elements<BType>::P p) {
  using Tile = FfmaTile<Quads>;
  auto& smem = dyn_smem<typename Tile::Smem>();
  const auto [m, n] = tile_of_block<Tile::m, Tile::n>(p);
  const int k = blockIdx.y * p.k_share, k_end = p.k - k < p.k_share ? p.k : k + p.k_share;
  const int tiles = ceil_div(k_end - k, Tile::k);
  FfmaOperand<AType, layout != Layout::tn, Quads> a(static_cast<const AType*>(p.a), p.a_stride, m, p.m, k, k_end,
                                                    p.a_wide);
  FfmaOperand<BType, layout == Layout::nt, Quads> b(Elements<BType>::of(p), p.b_stride, n, p.n, k, k_end, p.b_wide);
  // A warp has 4 x 8 threads: the four a and eight b of its reads are one row of banks at most.
  const int row = 4 * (warp_index() / 2 * 4 + lane_index() / 8), column = 4 * (warp_index() % 2 * 8 + lane_index() % 8);

  // The pieces of a thread, those of a and then those of b, move one after the other: few registers are in use for
  // them.
  constexpr int kPieces = 2 * Quads, kStepsPerPiece = Tile::k / kPieces;
  float piece[kFfmaPiece];
  const auto load = [&](int i) { i < Quads ? a.load(i, piece) : b.load(i - Quads, piece); };
  const auto store = [&](int i, int stage) {
    i < Quads ? a.store(i, piece, smem.a[stage]) : b.store(i - Quads, piece, smem.b[stage]);
  };
#pragma unroll
  for (int i = 0; i < kPieces; i++) load(i), store(i, 0);
  __syncthreads();

  float sum[4 * Quads][4 * Quads] = {};
  int now = 0;
#pragma unroll 1  // with 128 registers, two copies of the loop do not pay
  for (int left = tiles; left > 0; left--, now ^= 1) {
    a.advance(), b.advance();
#pragma unroll
    for (int step = 0; step < Tile::k; step++) {
      // The next tile, 0 after the last one, goes where all had read before the last barrier.
      if (step % kStepsPerPiece == 0) {
        if (step > 0) store(step / kStepsPerPiece - 1, 1 - now);
        load(step / kStepsPerPiece);
      }
      float x[Quads][4], y[Quads][4];
#pragma unroll
      for (int i = 0; i < Quads; i++) {
        load_vector(smem.a[now] + Tile::place(step, row + 64 * i), x[i]);
        load_vector(smem.b[now] + Tile::place(step, column + 64 * i), y[i]);
      }
#pragma unroll
      for (int i = 0; i < 4 * Quads; i++)
#pragma unroll
        for (int j = 0; j < 4 * Quads; j++) sum[i][j] += x[i / 4][i % 4] * y[j / 4][j % 4];
    }
    store(kPieces - 1, 1 - now);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 4 * Quads; i++)
#pragma unroll
    for (int j = 0; j < Quads; j++) {
      float x[kFfmaPiece];
#pragma unroll
      for (int u = 0; u < kFfmaPiece; u++) x[u] = sum[i][4 * j + u];
      const int to_row = m + row + 64 * (i / 4) + i % 4, to_column = n + column + 64 * j;
      if (p.dtype == DType::bf16)
        store_result<bf16>(p, to_row, to_column, x);
      else
        store_result<float>(p, to_row, to_column, x);
    }
}

}  // namespace rw::cuda
