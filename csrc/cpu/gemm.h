// The matrix product inside the CPU backend: gemm() for whole matrices with strides, and the pieces it is made of
// (packing and the micro-kernel), which other kernel files may use on tiles of their own.
#pragma once
#include "cpu.h"
#include "simd.h"

namespace rw::cpu::RW_ISA {

// Element (i, j) is data[i * row + j * column]. A transposed matrix is one with its strides exchanged.
struct Matrix {
  void* data;
  DType dtype;  // f32 or bf16; of b also a quantised one
  int64_t row, column;
};

// c = a b (+ add), m x k times k x n, f32 accumulation and one rounding at the store. add.data may be null, and may be
// c.data where the two have the same dtype and strides. One stride of a and of b is 1; c and add have column 1. The
// bits of c depend on the shape, never on the number of threads. Not to be called from within a task of run_tasks.
void gemm(Context& context, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix add, Matrix c);

// A micro-tile: MR rows by two vectors. 14 x 2 accumulators, 2 vectors of b and a broadcast one of a fill the 32
// registers of AVX-512; 6 x 2 those 16 of AVX2; SSE2 has no fused multiplication and needs a register for the product.
#if RW_VECTOR_BYTES == 64
constexpr int MR = 14;
#elif RW_VECTOR_BYTES == 32
constexpr int MR = 6;
#else
constexpr int MR = 4;
#endif
constexpr int NR = 2 * VL;

namespace {

// c = init + a b for R rows and V <= 2 vectors of columns, of packed panels a[k * MR + i] and b[k * NR + j]. A null
// init is 0.
template <int R, int V>
void micro_kernel(int64_t depth, const float* a, const float* b, const float* init, int64_t ldi, float* c,
                  int64_t ldc) {
  constexpr int64_t lead = 64;  // steps between asking for c and needing it: enough for the L3, see matmul.cc
  vf acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) acc[i][v] = vf{};
  const auto multiply = [&](int64_t steps) __attribute__((always_inline)) {
    for (int64_t k = 0; k < steps; k++, a += MR, b += NR) {
      vf part[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) part[v] = load(b + v * VL);
#pragma GCC unroll 16
      for (int i = 0; i < R; i++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) acc[i][v] += a[i] * part[v];
    }
  };
  multiply(depth - lead);
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) {
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + V * VL - 1, 1);
  }
  multiply(depth < lead ? depth : lead);
  if (init) {
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) acc[i][v] += load(init + i * ldi + v * VL);
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) store(c + i * ldc + v * VL, acc[i][v]);
}

using MicroKernel = void (*)(int64_t, const float*, const float*, const float*, int64_t, float*, int64_t);

// The micro-kernel for 1 .. MR rows and one or two vectors, so that a last panel costs only what it holds.
template <int R = MR>
MicroKernel micro_kernel_for(int64_t rows, int64_t columns) {
  if constexpr (R > 1)
    if (rows < R) return micro_kernel_for<R - 1>(rows, columns);
  return columns > VL ? micro_kernel<R, 2> : micro_kernel<R, 1>;
}

// Transposes a square of vectors: log2(VL) rounds that each interleave the upper with the lower half of the rows.
inline void transpose(vf (&x)[VL]) {
#if RW_VECTOR_BYTES == 64
  constexpr vi low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif RW_VECTOR_BYTES == 32
  constexpr vi low = {0, 8, 1, 9, 2, 10, 3, 11};
#else
  constexpr vi low = {0, 4, 1, 5};
#endif
  constexpr vi high = low + static_cast<int>(VL / 2);
#pragma GCC unroll 4
  for (int64_t round = 1; round < VL; round *= 2) {
    vf y[VL];
#pragma GCC unroll 16
    for (int64_t i = 0; i < VL / 2; i++) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + VL / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + VL / 2], high);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < VL; i++) x[i] = y[i];
  }
}

// The first n < VL elements of p; the other lanes are 0 and their memory is not touched.
template <typename T>
vf load_some(const T* p, int64_t n) {
  T part[VL] = {};
  for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return load(part);
}

// Packing, from rows that are contiguous along k: panel[k * W + i] = source[i * ld + k] as f32, lanes i >= count are 0.
// W is MR or NR. Vectors of VL lanes are stored in ascending order of k, so that where W < VL each overwrites the
// surplus lanes of the one before it, and the last writes up to VL - W floats after the panel: leave VL there.
template <int W, typename T>
void pack_transposed(const T* source, int64_t ld, int64_t count, int64_t depth, float* panel) {
  static_assert(W <= VL || W % VL == 0, "a panel is less than a vector, or whole vectors");
  for (int64_t first = 0; first < W; first += VL) {
    int64_t rows = count - first < 0 ? 0 : count - first < VL ? count - first : VL;
    const T* from = source + first * ld;
    float* to = panel + first;
    for (int64_t k = 0; k < depth; k += VL) {
      int64_t columns = depth - k < VL ? depth - k : VL;
      vf x[VL];
      if (rows >= (W < VL ? W : VL) && columns == VL) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < VL; i++) x[i] = i < W ? load(from + i * ld + k) : vf{};
        transpose(x);
#pragma GCC unroll 16
        for (int64_t i = 0; i < VL; i++) store(to + (k + i) * W, x[i]);
      } else {
        for (int64_t i = 0; i < VL; i++)
          x[i] = i >= rows ? vf{} : columns == VL ? load(from + i * ld + k) : load_some(from + i * ld + k, columns);
        transpose(x);
        for (int64_t i = 0; i < columns; i++) store(to + (k + i) * W, x[i]);
      }
    }
  }
}

// Packing, from rows that are contiguous along i: panels `stride` floats apart, panel[k * W + i] = source[k * ld + i].
// Row by row through all panels, because short pieces of many rows are slow to read.
template <int W, typename T>
void pack_copied(const T* source, int64_t ld, int64_t count, int64_t depth, float* panels, int64_t stride) {
  static_assert(W % VL == 0 || VL <= 2 * W, "the next row holds what a vector reads too much");
  for (int64_t k = 0; k < depth; k++) {
    const T* from = source + k * ld;
    float* to = panels + k * W;
    int64_t i = 0;
    // a vector may read past the panel's width only where another row of the matrix follows
    for (; i + W <= count && (W % VL == 0 || i + VL <= count || k + 1 < depth); i += W, to += stride)
      for (int64_t v = 0; v < W; v += VL) {
        __builtin_prefetch(from + 8 * ld + i + v);
        store(to + v, load(from + i + v));
      }
    for (; i < count; i += W, to += stride)
      for (int64_t v = 0; v < W; v++) to[v] = i + v < count ? to_float(from[i + v]) : 0;
  }
}

// Packs `count` rows (or columns, for the right-hand matrix) of which `line` is the stride and `step` that along k.
template <int W, typename T>
void pack(const T* source, int64_t line, int64_t step, int64_t count, int64_t depth, float* panels, int64_t stride) {
  if (step != 1) return pack_copied<W>(source, step, count, depth, panels, stride);
  for (int64_t i = 0; i < count; i += W, panels += stride)
    pack_transposed<W>(source + i * line, line, count - i < W ? count - i : W, depth, panels);
}

template <int W>
void pack(DType dtype, const void* data, int64_t offset, int64_t line, int64_t step, int64_t count, int64_t depth,
          float* panels, int64_t stride) {
  if (dtype == DType::f32)
    pack<W>(static_cast<const float*>(data) + offset, line, step, count, depth, panels, stride);
  else
    pack<W>(static_cast<const bf16*>(data) + offset, line, step, count, depth, panels, stride);
}

}  // namespace
}  // namespace rw::cpu::RW_ISA
