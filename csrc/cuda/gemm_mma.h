// The tensor-core kernel of matmul.cu: a bf16, b bf16 or quantised.
#pragma once
#include "elementwise.h"
#include "gemm_quantized.h"

namespace rw::cuda {

// A block's tile of c and how it is divided among warps; k elements of the sum per stage, `stages` of which are under
// way.
template <int M, int N, int WarpsM, int WarpsN, int BlocksPerSm>
struct MmaTile {
  static constexpr int m = M, n = N, k = 64, stages = 3, blocks_per_sm = BlocksPerSm;
  static constexpr int warps_n = WarpsN, threads = kWarp * WarpsM * WarpsN;
  static constexpr int warp_m = M / WarpsM, warp_n = N / WarpsN;
  static_assert(warp_m % 16 == 0 && warp_n % 32 == 0);

  struct Smem {
    bf16 a[stages][M * k];
    REDZONE(after_a);
    bf16 b[stages][N * k];
    REDZONE(after_b);
  };
  static_assert(sizeof(Smem) <= 163 * 1024, "an SM of sm_80 has no more");
};

// A thread's share of copying tiles, Rows x Columns as the operand is stored, into shared memory. What lies outside of
// the matrix becomes 0. Paired: a tile has eight rows of one matrix, then the same rows of a second one, and so on.
template <int Rows, int Columns, int Threads, bool Aligned, bool Paired = false>
struct Copier {
  static constexpr int kPieces = Columns / 8, kRowStep = Threads / kPieces, kCopies = Rows / kRowStep;
  static constexpr int kMatrixStep = Paired ? kRowStep / 2 : kRowStep;
  static_assert(kRowStep % 8 == 0 && Rows % kRowStep == 0, "the swizzle is the same for all rows of a thread");
  static_assert(!Paired || kRowStep % 16 == 0, "all rows of a thread are of one matrix");

  const bf16* matrix;
  const bf16* from;  // this thread's first piece of the next tile
  int64_t stride;
  int rows, columns;  // of the matrix, from there on
  int to;             // place of that piece in the tile

  __device__ __forceinline__ Copier(const void* data, const void* second, int64_t stride, int row, int column,
                                    int row_end, int column_end)
      : stride(stride) {
    const int own_row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    matrix = static_cast<const bf16*>(Paired && own_row / 8 % 2 ? second : data);
    const int matrix_row = row + (Paired ? own_row / 16 * 8 + own_row % 8 : own_row);
    from = matrix + matrix_row * stride + column + 8 * piece;
    rows = row_end - matrix_row;
    columns = column_end - column - 8 * piece;
    to = swizzled<Columns>(own_row, piece);
  }

  __device__ __forceinline__ void copy(bf16* tile) const {
    const bf16* p = from;
#pragma unroll
    for (int i = 0; i < kCopies; i++, p += kMatrixStep * stride) {
      bf16* place = tile + to + i * kRowStep * Columns;
      const bool inside = i * kMatrixStep < rows && columns > 0;
      if constexpr (Aligned) {
        cp_async_16(place, inside ? p : matrix, inside);  // columns is a multiple of 8
      } else {
        uint32_t word[4] = {};
#pragma unroll
        for (int j = 0; j < 8; j++)
          if (inside && j < columns) word[j / 2] |= static_cast<uint32_t>(p[j].bits) << j % 2 * 16;
        *reinterpret_cast<uint4*>(place) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }

  __device__ __forceinline__ void next_rows() { from += Rows * stride, rows -= Rows; }
  __device__ __forceinline__ void next_columns() { from += Columns, columns -= Columns; }
};

// An operand of a tile that is Extent wide: rows of a or columns of b. Along: whether it is stored along k, as the
// extent's rows of 64 elements, or across, as 64 rows of `Extent` elements.
template <bool IsRows, bool Along, int Extent, typename Tile, bool Aligned, bool Paired = false>
struct Operand : Copier<Along ? Extent : Tile::k, Along ? Tile::k : Extent, Tile::threads, Aligned, Paired> {
  static_assert(Along || !Paired);
  using Base = Copier<Along ? Extent : Tile::k, Along ? Tile::k : Extent, Tile::threads, Aligned, Paired>;

  __device__ __forceinline__ Operand(const void* data, const void* second, int64_t stride, int first, int end, int k,
                                     int k_end)
      : Base(data, second, stride, Along ? first : k, Along ? k : first, Along ? end : k_end, Along ? k_end : end) {}

  __device__ __forceinline__ void advance() {
    if constexpr (Along)
      Base::next_columns();
    else
      Base::next_rows();
  }

  // Fragments of 16 k from 16 `step` on and of 16 Count rows or columns from `first` on, as mma wants them in adjacent
  // registers. r[0 .. 3] of rows: first 8 of both, last 8 rows, last 8 k, both; of columns the middle two change
  // places.
  template <int Count>
  __device__ __forceinline__ static void fragments(uint32_t (&r)[Count][4], const bf16* tile, int first, int step) {
    const int lane = lane_index();
    const int half_extent = IsRows ? lane / 8 % 2 : lane / 16, half_k = IsRows ? lane / 16 : lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < Count; i++) {
      if constexpr (Along)
        ldmatrix_x4(r[i], tile + swizzled<Tile::k>(first + 16 * i + 8 * half_extent + lane % 8, 2 * step + half_k));
      else
        ldmatrix_x4_trans(r[i],
                          tile + swizzled<Extent>(16 * step + 8 * half_k + lane % 8, first / 8 + 2 * i + half_extent));
    }
  }
};

// Exchanges halves between lanes `Step` apart: of the pairs i and i + Step the lane without that bit gets both lanes'
// pair i, the other one both lanes' pair i + Step.
template <int Step>
__device__ __forceinline__ void exchange_pairs(float (&x)[8]) {
  const bool upper = lane_index() & Step;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (i / 2 & Step) continue;
    const int j = i + 2 * Step;
    const float got = __shfl_xor_sync(kAllLanes, upper ? x[i] : x[j], Step);
    if (upper)
      x[i] = got;
    else
      x[j] = got;
  }
}

// Of a row of c, lane t of four has two columns in each of four pieces of 8. It stores 16 bytes at a time: all of piece
// t as bf16, and as f32 half of two pieces; so that the four lanes always write whole sectors of 32 bytes.
__device__ __forceinline__ void store_pieces(const Product& p, int row, int column, float (&x)[8]) {
  const int t = lane_index() % 4;
  exchange_pairs<1>(x);
  if (p.dtype == DType::bf16) {
    exchange_pairs<2>(x);
    store_result<bf16>(p, row, column + 8 * t, x);
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float half[4] = {x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]};
      store_result<float>(p, row, column + 8 * (2 * i + t % 2) + t / 2 * 4, half);
    }
  }
}

// The same with gate and up, whose columns take turns in the tile, eight at a time: a thread has the same ones of both.
// y is made from their rounded values, as a pass of its own would.
__device__ __forceinline__ void store_gated(const GatedProduct& p, int row, int column, float (&gate)[8],
                                            float (&up)[8]) {
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float g = to_float(to_bf16(gate[i])), u = to_float(to_bf16(up[i]));
    y[i] = u * (g * sigmoid(g));
  }
  Product to = p;
  store_pieces(to, row, column, gate);
  to.c = p.up;
  store_pieces(to, row, column, up);
  to.c = p.y;
  store_pieces(to, row, column, y);
}

// What b is read by, and what it is kept in.
template <typename Tile, Layout layout, bool Aligned, typename P>
struct RightOperand {
  using type = Operand<false, layout == Layout::nt, Tile::n, Tile, Aligned, std::is_same_v<P, GatedProduct>>;
  using Smem = typename Tile::Smem;
};
template <typename Tile, Layout layout, DType dtype>
struct RightOperand<Tile, layout, false, QuantizedProduct<dtype>> {
  using type = ScatteredOperand<dtype, layout == Layout::nt, Tile::n, Tile>;
  using Smem = typename Tile::Smem;
};
template <typename Tile, Layout layout, DType dtype>
struct RightOperand<Tile, layout, true, QuantizedProduct<dtype>> {
  using type = QuantizedOperand<dtype, layout == Layout::nt, Tile::n, Tile>;
  using Smem = QuantizedSmem<dtype, Tile>;
};

template <typename Tile, Layout layout, bool Aligned, typename P = Product>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks_per_sm) mma_kernel(P p) {
  constexpr bool kGated = std::is_same_v<P, GatedProduct>, kQuantized = kIsQuantized<P>;
  constexpr bool kExpands = kQuantized && Aligned;  // b passes through codes in shared memory
  using A = Operand<true, layout != Layout::tn, Tile::m, Tile, Aligned>;
  using B = typename RightOperand<Tile, layout, Aligned, P>::type;
  using FragmentsOfB = Operand<false, layout == Layout::nt, Tile::n, Tile, Aligned>;
  constexpr int kSteps = Tile::k / 16, kRows = Tile::warp_m / 16, kColumns = Tile::warp_n / 16,
                kAhead = Tile::stages - 1;

  auto& smem = dyn_smem<typename RightOperand<Tile, layout, Aligned, P>::Smem>();
  const TilePosition at = tile_of_block < Tile::m, kGated ? Tile::n / 2 : Tile::n > (p);
  const int m = at.m, n = at.n;
  const int k = blockIdx.y * p.k_share, k_end = p.k - k < p.k_share ? p.k : k + p.k_share;
  const int tiles = ceil_div(k_end - k, Tile::k);
  A a(p.a, nullptr, p.a_stride, m, p.m, k, k_end);
  auto b = [&] {
    if constexpr (kQuantized)
      return B(p, share_maps(p.maps), n, p.n, k, k_end);
    else if constexpr (kGated)
      return B(p.b, p.w_up, p.b_stride, n, p.n, k, k_end);
    else
      return B(p.b, nullptr, p.b_stride, n, p.n, k, k_end);
  }();
  const int warp_m = warp_index() / Tile::warps_n * Tile::warp_m, warp_n = warp_index() % Tile::warps_n * Tile::warp_n;

#pragma unroll
  for (int stage = 0; stage < kAhead; stage++) {
    a.copy(smem.a[stage]), a.advance();
    if constexpr (kExpands)
      b.copy(smem.codes[stage]);
    else
      b.copy(smem.b[stage]);
    b.advance();
    cp_async_commit();
  }
  cp_async_wait<kAhead - 1>();
  if constexpr (kExpands) {
    b.fetch_scales(kAhead);
    b.template expand<0, 1>(smem.codes[0], smem.b[0]);
  }
  __syncthreads();

  float sum[kRows][2 * kColumns][4] = {};
  uint32_t fragment_a[2][kRows][4], fragment_b[2][kColumns][4];
  A::fragments(fragment_a[0], smem.a[0], warp_m, 0);
  FragmentsOfB::fragments(fragment_b[0], smem.b[0], warp_n, 0);

  int now = 0, write = kAhead;  // the stage in use, and the one that is free
  int now_b = 0;                // the same of b where it is expanded: there are two
  for (int tile = 0; tile < tiles; tile++) {
    const int next = tile + 1 == tiles ? now : now + 1 == Tile::stages ? 0 : now + 1;
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      // Tiles after the last one are empty: the copies read nothing, and no branch is needed. They go into the stage
      // before the present one, whose last fragments were read before the barrier below.
      if (step == 0) a.copy(smem.a[write]), a.advance();
      if constexpr (kExpands) {
        // The codes of the tile after the next one take the place of those that were expanded in the tile before.
        if (step == 0) b.fetch_scales(1);
        if (step == 1) {
          b.copy(smem.codes[now_b]), b.advance();
          cp_async_commit();
          cp_async_wait<kAhead - 1>();
        }
        if (step == 1) b.template expand<0, 2>(smem.codes[1 - now_b], smem.b[1 - now_b]);
        if (step == 2) b.template expand<1, 2>(smem.codes[1 - now_b], smem.b[1 - now_b]);
        if (step == kSteps - 1) __syncthreads();  // the next tile is there
      } else {
        if (step == 1) {
          b.copy(smem.b[write]), b.advance();
          cp_async_commit();
        }
        if (step == kSteps - 1) {  // the next tile is there
          cp_async_wait<kAhead - 1>();
          __syncthreads();
        }
      }
      // Fragments are loaded one step ahead; after the last tile once more from it, in vain.
      const int ahead = (step + 1) % kSteps, stage = step == kSteps - 1 ? next : now;
      A::fragments(fragment_a[ahead % 2], smem.a[stage], warp_m, ahead);
      FragmentsOfB::fragments(fragment_b[ahead % 2], smem.b[kExpands ? step == kSteps - 1 ? 1 - now_b : now_b : stage],
                              warp_n, ahead);
#pragma unroll
      for (int i = 0; i < kRows; i++)
#pragma unroll
        for (int j = 0; j < 2 * kColumns; j++)
          mma_16x8x16(sum[i][j], fragment_a[step % 2][i], fragment_b[step % 2][j / 2][j % 2 * 2],
                      fragment_b[step % 2][j / 2][j % 2 * 2 + 1]);
    }
    write = now;
    now = next;
    now_b = 1 - now_b;
  }
  cp_async_wait<0>();  // nothing is under way when the block ends

  const int group = lane_index() / 4;
#pragma unroll
  for (int i = 0; i < kRows; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = m + warp_m + 16 * i + 8 * half + group;
      // This thread's columns of every `Step`-th of 8 from the j-th on.
      const auto columns = [&](int j, int step, float(&x)[8]) {
#pragma unroll
        for (int piece = 0; piece < 4; piece++)
#pragma unroll
          for (int u = 0; u < 2; u++) x[2 * piece + u] = sum[i][j + piece * step][2 * half + u];
      };
      float x[8], y[8];
      if constexpr (kGated) {
        static_assert(Tile::warp_n % 64 == 0);
#pragma unroll
        for (int j = 0; j < 2 * kColumns; j += 8) {
          columns(j, 2, x), columns(j + 1, 2, y);
          store_gated(p, row, n + warp_n / 2 + 4 * j, x, y);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 2 * kColumns; j += 4) {
          columns(j, 1, x);
          store_pieces(p, row, n + warp_n + 8 * j, x);
        }
      }
    }
}

}  // namespace rw::cuda
