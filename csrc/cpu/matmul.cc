// c = a b (+ add), with a (M,K), b (K,N) and c (M,N) stored as the op's suffix says: n as is, t transposed. a, b, add
// and c are f32 or bf16 each; bf16 is widened while packing, sums are f32, and c is rounded once, at its store. A
// quantised b is dequantised while packing, a panel at a time: 32 KB of its values exist before they are packed.
//
// Ways chosen by the shape alone (GFLOP/s of one core of a Zen 5 at 4.0 GHz, 255 at best, see bench/LOG.md):
//
// With AMX, M > 96, or 16 where b is bf16: tiles (matmul_tiles.cc).
// M > 128: the five loops of BLIS. For NC columns, b is packed once for all threads (16 MB at most, in the L3 or in
//   memory: each element serves MC rows). Tasks are blocks of c, MC rows by the NC columns; each packs its MC x KC
//   piece of a (344 KB, a third of a 1 MB L2), then the micro-kernel (gemm.h) walks the micro-tiles. A panel of b, KC x
//   NR, is 32 KB of a 48 KB L1 and is asked for while the one before is used (the gain is within the noise). The rows
//   of a tile of c are asked for 64 steps before they are needed rather than at the start: 2 to 4 %, for with N a power
//   of two they fall into two sets of the L1 and are evicted at once (such N still lose 4 %). KC from 192 to 512 and MC
//   from 224 to 448 differ by less than the noise of 5 %. f32 c is summed in place over the blocks of K; otherwise the
//   sums wait in the thread's scratch.
// M <= 128: writing b packed to memory and reading it again would take longer than the products (M = 24, N = K = 4096:
//   126 against 78). a is packed once, and each task packs its own 4 NR columns of b, KC rows at a time, in its L2.
// M <= 16 with b transposed (decoding: y = x w^T): dot products straight from b, which is read once: 40 GB/s of it at
//   M = 1; at M = 4, 24 GB/s against 14 when packed. Not for b as stored, where reading in place was no faster.
//
// Each c is a sum over k in an order that the shape fixes, by one thread: bits do not depend on the number of threads.
// Traffic: a is read N / NC times, b once; f32 c is read and written K / KC times, bf16 c written once.
//
// Van Zee, van de Geijn, BLIS: A Framework for Rapidly Instantiating BLAS Functionality, ACM TOMS 41(3), 2015;
// Goto, van de Geijn, Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008.
#include "product.h"
#include "tiles.h"

namespace rw::cpu::RW_ISA {

namespace {

constexpr int64_t KC = 256;
constexpr int64_t MC = 336 / MR * MR;
constexpr int64_t NC = 1024;
constexpr int64_t LONG_K = 4096;           // f32 c is summed in memory over so many k at a time
constexpr int64_t PANEL_FLOATS = 4 << 20;  // the packed part of b: 16 MB, or 8 NR columns where k is huge
constexpr int64_t GROUP = 4 * NR;          // columns of a packing task: pieces of rows worth reading
constexpr int64_t FEW_ROWS = 16;
constexpr int64_t SOME_ROWS = 128;

// Packs columns j .. j + count of b from row k on, at most GROUP and KC of them.
void pack_b(const Problem& p, int64_t j, int64_t k, int64_t count, int64_t depth, float* panels, int64_t stride) {
  const Matrix& b = p.b;
  const int64_t start = j * b.column + k * b.row;
  if (!is_quantized(b.dtype)) return pack<NR>(b.dtype, b.data, start, b.column, b.row, count, depth, panels, stride);
  float values[NR * KC];
  if (b.row == 1) {
    for (int64_t i = 0; i < count; i += NR, panels += stride) {
      const int64_t columns = min(count - i, NR);
      for (int64_t column = 0; column < columns; column++)
        dequantize_run(b.dtype, p.q, start + (i + column) * b.column, depth, p.a.dtype, values + column * KC);
      pack_transposed<NR>(values, KC, columns, depth, panels);
    }
  } else {
    static_assert(GROUP <= NR * KC, "a row is dequantised at a time");
    for (int64_t row = 0; row < depth; row++) {
      dequantize_run(b.dtype, p.q, start + row * b.row, count, p.a.dtype, values);
      pack_copied<NR>(values, count, count, 1, panels + row * NR, stride);
    }
  }
}

// Rows [i0, i1) and columns [j0, j1) of c, the latter packed in `b` (NR wide panels of depth k, from j0 on).
void multiply_block(const Problem& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1, const float* b, float* own) {
  const int64_t panel = min(p.k, KC) * MR + VL;
  const int64_t tile_step = p.k > KC ? MR * NR : 0;  // tiles that wait for the next block of k are kept apart
  float* tiles = own + ceil_div(i1 - i0, MR) * panel;
  for (int64_t k0 = 0; k0 < p.k; k0 += KC) {
    const int64_t depth = min(p.k - k0, KC);
    const bool last = k0 + depth == p.k;
    pack<MR>(p.a.dtype, p.a.data, i0 * p.a.row + k0 * p.a.column, p.a.row, p.a.column, i1 - i0, depth, own, panel);
    float* tile = tiles;
    for (int64_t j = j0; j < j1; j += NR) {
      const float* b_panel = b + (j - j0) * p.k + k0 * NR;
      const int64_t columns = min(j1 - j, NR);
      const bool direct = p.sums_in_place() && columns == NR;
      const float* next = j + NR < j1 ? b_panel + p.k * NR : b + min(k0 + KC, p.k - depth) * NR;
      const int64_t share = depth * NR / ceil_div(i1 - i0, MR);
      for (int64_t i = i0, at_panel = 0; i < i1; i += MR, at_panel += panel, tile += tile_step) {
        const int64_t rows = min(i1 - i, MR);
        const MicroKernel kernel = micro_kernel_for(rows, columns);
        for (const float* line = next; line < next + share; line += 16) __builtin_prefetch(line, 0, 2);
        next += share;
        if (direct) {
          float* c = at<float>(p.c, i, j);
          const Matrix& init = k0 == 0 ? p.add : p.c;
          kernel(depth, own + at_panel, b_panel, at<float>(init, i, j), init.row, c, p.c.row);
        } else {
          kernel(depth, own + at_panel, b_panel, k0 == 0 ? nullptr : tile, NR, tile, NR);
          if (last) finish(p, i, j, rows, columns, tile, NR);
        }
      }
    }
  }
}

void multiply_packed(Context& context, const Problem& p) {
  const int64_t threads = context.threads();
  int64_t nc = min(NC, max(PANEL_FLOATS / p.k, 8 * NR));
  nc = round_up(ceil_div(p.n, ceil_div(p.n, nc)), NR);
  const Blocks<MR, MC> rows(p.m, threads);
  // and columns, where they are not enough and packing a again is still cheap
  int64_t splits = max(1, min(threads == 1 ? 1 : ceil_div(4 * threads, rows.count()), nc / (8 * NR)));
  int64_t width = round_up(ceil_div(nc, splits), NR);
  splits = ceil_div(nc, width);

  const int64_t panels = rows.most_panels();
  const int64_t tiles = (p.k > KC ? panels * width : NR) * MR;
  Workspace work(context, nc * p.k, panels * (min(p.k, KC) * MR + VL) + tiles);
  for (int64_t j0 = 0; j0 < p.n; j0 += nc) {
    const int64_t columns = min(p.n - j0, nc);
    const int64_t slabs = ceil_div(p.k, KC);
    for_tasks(context, p, ceil_div(columns, GROUP) * slabs, [&](int64_t task, int) {
      const int64_t j = task / slabs * GROUP, k0 = task % slabs * KC;
      pack_b(p, j0 + j, k0, min(columns - j, GROUP), min(p.k - k0, KC), work.shared + j * p.k + k0 * NR, p.k * NR);
    });
    for_tasks(context, p, rows.count() * splits, [&](int64_t task, int thread) {
      const int64_t block = task / splits, j = task % splits * width;
      const int64_t i = rows.start(block), end = rows.end(block);
      if (j >= columns || i >= end) return;
      multiply_block(p, i, end, j0 + j, j0 + min(j + width, columns), work.shared + j * p.k, work.own(thread));
    });
  }
}

void multiply_many_rows(Context& context, const Problem& p) {
  context.has_tiles() ? multiply_tiles(context, p) : multiply_packed(context, p);
}

// The weights' gradients of a long context: k is its tokens. One packing of b would be as deep, and 32 MiB at T 32768.
void multiply_long(Context& context, const Problem& p) {
  const int64_t slabs = ceil_div(p.k, LONG_K), depth = round_up(ceil_div(p.k, slabs), KC);
  for (int64_t k = 0; k < p.k; k += depth) {
    Problem part = p;
    part.k = min(depth, p.k - k);
    part.a.data = start_at(p.a, k * p.a.column);
    part.b.data = start_at(p.b, k * p.b.row);
    if (k > 0) part.add = p.c;
    multiply_many_rows(context, part);
  }
}

// Few rows: a is packed once for all, b by each task for its own columns, into a buffer that stays in the cache.
void multiply_some_rows(Context& context, const Problem& p) {
  const int64_t panels = ceil_div(p.m, MR), panel = p.k * MR + VL, b_step = min(p.k, KC) * NR;
  Workspace work(context, panels * panel, GROUP / NR * b_step + panels * MR * GROUP);
  pack<MR>(p.a.dtype, p.a.data, 0, p.a.row, p.a.column, p.m, p.k, work.shared, panel);
  for_tasks(context, p, ceil_div(p.n, GROUP), [&](int64_t task, int thread) {
    float* b = work.own(thread);
    float* sums = b + GROUP / NR * b_step;
    const int64_t j0 = task * GROUP, columns = min(p.n - j0, GROUP);
    for (int64_t k = 0; k < p.k; k += KC) {
      const int64_t depth = min(p.k - k, KC);
      pack_b(p, j0, k, columns, depth, b, b_step);
      for (int64_t j = 0; j < columns; j += NR)
        for (int64_t i = 0; i < p.m; i += MR) {
          float* c = sums + i * GROUP + j;
          micro_kernel_for(min(p.m - i, MR), columns - j)(depth, work.shared + i / MR * panel + k * MR,
                                                          b + j / NR * b_step, k ? c : nullptr, GROUP, c, GROUP);
        }
    }
    finish(p, 0, j0, p.m, columns, sums, GROUP);
  });
}

// R x VL/R dot products of rows of a (f32, padded with zeros to whole vectors) and of b. VL of them, because
// transposing their VL vectors of partial sums leaves one vector of results. Rows beyond the counts repeat the last.
template <int R, typename T>
void dots(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const T* b, int64_t ldb,
          float* sums, int64_t ld) {
  constexpr int S = VL / R;
  const float* x[R];
  const T* y[S];
  for (int r = 0; r < R; r++) x[r] = a + (r < rows ? r : rows - 1) * lda;
  for (int s = 0; s < S; s++) y[s] = b + (s < columns ? s : columns - 1) * ldb;
  vf acc[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) acc[i] = vf{};
  // A row of b after the other, as memory has them, and what is 3 KB later into the L1.
  const int64_t k = depth / VL * VL;
#pragma GCC unroll 16
  for (int s = 0; s < S; s++) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < k; i += VL) {
      const vf part = load(y[s] + i);
      __builtin_prefetch(y[s] + i + 3072 / sizeof(T), 0, 3);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[r * S + s] += load(x[r] + i) * part;
    }
  }
  if (k < depth) {
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) {
      const vf part = load_some(y[s] + k, depth - k);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[r * S + s] += load(x[r] + k) * part;
    }
  }
  transpose(acc);
#pragma GCC unroll 4
  for (int64_t half = VL / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; i++) acc[i] += acc[i + half];
  for (int64_t r = 0; r < min(rows, R); r++)
    for (int64_t s = 0; s < min(columns, S); s++) sums[r * ld + s] = acc[0][r * S + s];
}

// Rows a, a + lda, ... with R of them at a time, and fewer for fewer rows.
template <int R, typename T>
void all_dots(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const T* b, int64_t ldb,
              float* sums, int64_t ld) {
  if constexpr (R > 1)
    if (rows <= R / 2) return all_dots<R / 2>(rows, columns, depth, a, lda, b, ldb, sums, ld);
  for (int64_t j = 0; j < columns; j += VL / R)
    for (int64_t i = 0; i < rows; i += R)
      dots<R>(rows - i, columns - j, depth, a + i * lda, lda, b + j * ldb, ldb, sums + i * ld + j, ld);
}

// Very few rows, b with columns contiguous along k (y = x w^T of one token): b is read once, as whole rows; a quantised
// one by way of scratch, fewer rows at a time. T is the dtype that it is read in.
template <typename T>
void multiply_few_rows(Context& context, const Problem& p) {
  constexpr int R = RW_VECTOR_BYTES == 64 ? 4 : 2;
  const bool is_whole = !is_quantized(p.b.dtype);
  // Of a chunk the first rows are not asked for ahead: long ones, if there are some for each thread.
  const int64_t chunk = is_whole ? round_up(min(128, max(32, p.n / (4 * context.threads()))), VL) : 8;
  const int64_t lda = round_up(p.k, VL);
  Workspace work(context, p.m * lda, p.m * chunk + (is_whole ? 0 : chunk * p.k));
  for (int64_t i = 0; i < p.m; i++)
    for (int64_t k = 0; k < lda; k++) {
      float* x = work.shared + i * lda + k;
      *x = k >= p.k ? 0 : p.a.dtype == DType::f32 ? *at<float>(p.a, i, k) : to_float(*at<bf16>(p.a, i, k));
    }
  for_tasks(context, p, ceil_div(p.n, chunk), [&](int64_t task, int thread) {
    float* sums = work.own(thread);
    const int64_t j = task * chunk, columns = min(p.n - j, chunk);
    if (is_whole) {
      all_dots<R>(p.m, columns, p.k, work.shared, lda, at<T>(p.b, 0, j), p.b.column, sums, chunk);
    } else {
      float* values = sums + p.m * chunk;
      dequantize_run(p.b.dtype, p.q, j * p.k, columns * p.k, p.a.dtype, values);
      all_dots<R>(p.m, columns, p.k, work.shared, lda, values, p.k, sums, chunk);
    }
    finish(p, 0, j, p.m, columns, sums, chunk);
  });
}

}  // namespace

void gemm(Context& context, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix add, Matrix c) {
  Problem p = {m, n, k, a, b, add, c, {}};
  if (is_quantized(b.dtype)) p.q = quantized(b.dtype, b.data, n * k);
  const int64_t some_rows = !context.has_tiles() ? SOME_ROWS : p.b_is_f32() ? 96 : FEW_ROWS;
  if (m > some_rows && k > LONG_K && p.sums_in_place() && !is_quantized(b.dtype))
    multiply_long(context, p);
  else if (m > some_rows)
    multiply_many_rows(context, p);
  else if (m > FEW_ROWS || b.row != 1)
    multiply_some_rows(context, p);
  else if (b.dtype == DType::bf16)
    multiply_few_rows<bf16>(context, p);
  else
    multiply_few_rows<float>(context, p);
}

namespace {

Matrix stored(const Tensor& x) { return {x.data, x.dtype, x.dims[1], 1}; }
Matrix transposed(const Tensor& x) { return {x.data, x.dtype, 1, x.dims[1]}; }

}  // namespace

void matmul_nn(Context& context, const matmul_nn_args& args) {
  gemm(context, args.c.dims[0], args.c.dims[1], args.a.dims[1], stored(args.a), stored(args.b), stored(args.add),
       stored(args.c));
}

void matmul_nt(Context& context, const matmul_nt_args& args) {
  gemm(context, args.c.dims[0], args.c.dims[1], args.a.dims[1], stored(args.a), transposed(args.b), stored(args.add),
       stored(args.c));
}

void matmul_tn(Context& context, const matmul_tn_args& args) {
  gemm(context, args.c.dims[0], args.c.dims[1], args.a.dims[0], transposed(args.a), stored(args.b), stored(args.add),
       stored(args.c));
}

void matmul_swiglu(Context& context, const matmul_swiglu_args& args) {
  matmul_nt(context, {args.a, args.w_gate, {}, args.gate});
  matmul_nt(context, {args.a, args.w_up, {}, args.up});
  swiglu_fwd(context, {args.gate, args.up, args.y});
}

}  // namespace rw::cpu::RW_ISA
