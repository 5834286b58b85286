// Matrix products for the ops of matmul.cu and of linear_cross_entropy.cu, and what the kernels behind them share.
#pragma once
#include "dequantize.h"

namespace rw::cuda {

// A row-major matrix in device memory: f32, bf16, or b quantised; `stride` elements from one row to the next.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t stride;
};

// How a and b are stored: n as is, t transposed.
enum class Layout { nn, nt, tn };

// c (m,n) = a b (+ add), a (m,k) and b (k,n) stored as the layout says. c and add are of one dtype, their rows follow
// each other without gaps; add may be null, or c itself. Sums are f32, in an order that the shape and the device fix.
void gemm(Context& context, Layout layout, int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b,
          const void* add, void* c, DType dtype);

// ---- for the kernels
// --------------------------------------------------------------------------------------------------

// What a kernel gets. Blocks (x, y): tile x of c, share y of the sum; the shares' c lie behind each other.
struct Product {
  const void *a, *b, *add;
  void* c;
  int64_t a_stride, b_stride;
  int m, n, k;
  int k_share;          // of the sum, a multiple of 64
  DType dtype;          // of c and add
  bool wide;            // whether c and add can be accessed in whole pieces, see store_result
  bool a_wide, b_wide;  // and the operands: gemm_ffma.h
};

// gate = a b^T, up = a w_up^T and y = silu(gate) up, all in bf16: b is w_gate, c is gate; there is no add.
struct GatedProduct : Product {
  const void* w_up;
  void *up, *y;
};

// b is quantised, its rows without gaps.
template <DType dtype>
struct QuantizedProduct : Product {
  Quantized q;
  QuantizedMaps maps;
};

template <typename P>
constexpr bool kIsQuantized = false;
template <DType dtype>
constexpr bool kIsQuantized<QuantizedProduct<dtype>> = true;

// Columns of c that a thread stores at a time, and the elements that it reads at a time.
constexpr int kMmaPiece = 8, kFfmaPiece = 4;

struct TilePosition {
  int m, n;  // of the first element
};

// Tiles in the order of the blocks: a group of 16 rows of tiles, column after column. The blocks that run at the same
// time then need few different rows of a and columns of b, which stay in the L2.
template <int TileM, int TileN>
__device__ __forceinline__ TilePosition tile_of_block(const Product& p) {
  constexpr unsigned kGroup = 16;
  const unsigned rows = ceil_div(p.m, TileM), columns = ceil_div(p.n, TileN);
  const unsigned group = blockIdx.x / (kGroup * columns), within = blockIdx.x % (kGroup * columns);
  const unsigned height = rows - group * kGroup < kGroup ? rows - group * kGroup : kGroup;
  return {static_cast<int>((group * kGroup + within % height) * TileM), static_cast<int>(within / height * TileN)};
}

// Where the 16-byte piece `piece` of a row lies in a tile: eight consecutive rows have the same piece in eight
// different groups of banks, so that neither the copies nor ldmatrix ever wait for a bank.
template <int Columns>
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * Columns + ((piece ^ (row & 7)) << 3);
}

// Count elements as floats, and back. Count * sizeof(T) is 8 or a multiple of 16; p is aligned to 8 or 16 bytes.
template <typename T, int Count>
__device__ __forceinline__ void load_piece(const T* p, float (&x)[Count]) {
  if constexpr (Count < kVector<T>) {
    static_assert(std::is_same_v<T, bf16> && Count == 4);
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
    x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
  } else {
#pragma unroll
    for (int i = 0; i < Count; i += kVector<T>) {
      float part[kVector<T>];
      load_vector(p + i, part);
#pragma unroll
      for (int j = 0; j < kVector<T>; j++) x[i + j] = part[j];
    }
  }
}

template <typename T, int Count>
__device__ __forceinline__ void store_piece(T* p, const float (&x)[Count]) {
  if constexpr (Count < kVector<T>) {
    static_assert(std::is_same_v<T, bf16> && Count == 4);
    *reinterpret_cast<uint2*>(p) = make_uint2(to_bf16(x[0]).bits | static_cast<uint32_t>(to_bf16(x[1]).bits) << 16,
                                              to_bf16(x[2]).bits | static_cast<uint32_t>(to_bf16(x[3]).bits) << 16);
  } else {
#pragma unroll
    for (int i = 0; i < Count; i += kVector<T>) {
      float part[kVector<T>];
#pragma unroll
      for (int j = 0; j < kVector<T>; j++) part[j] = x[i + j];
      store_vector(p + i, part);
    }
  }
}

// Stores Count columns of a row of c, of dtype T, added to those of add; what lies outside of the matrix is left out.
template <typename T, int Count>
__device__ __forceinline__ void store_result(const Product& p, int row, int column, float (&x)[Count]) {
  const int64_t at = int64_t{row} * p.n + column;
  const T* add = static_cast<const T*>(p.add);
  T* c = static_cast<T*>(p.c) + int64_t{blockIdx.y} * p.m * p.n;
  if (row >= p.m) return;
  if (p.wide) {
    if (column >= p.n) return;  // n is a multiple of Count: all or nothing
    if (add) {
      float addend[Count];
      load_piece(add + at, addend);
#pragma unroll
      for (int i = 0; i < Count; i++) x[i] = addend[i] + x[i];
    }
    store_piece(c + at, x);
  } else {
#pragma unroll
    for (int i = 0; i < Count; i++)
      if (column + i < p.n) c[at + i] = from_float<T>(add ? to_float(add[at + i]) + x[i] : x[i]);
  }
}

}  // namespace rw::cuda
