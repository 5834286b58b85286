// c = a b (+ add)
#include "gemm.h"

namespace rw::cpu::RW_ISA {

namespace {

constexpr int64_t KC = 256;
constexpr int64_t MC = 336 / MR * MR;
constexpr int64_t NC = 1024;
constexpr int64_t PANEL_FLOATS = 4 << 20;
constexpr int64_t GROUP = 4 * NR;
constexpr int64_t FEW_ROWS = 16;
constexpr int64_t STEP = 16;
constexpr int64_t CHUNK = 256;
constexpr int64_t SMALL = 64 * 64 * 64;

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Problem {
  int64_t m, n, k;
  Matrix a, b, add, c;
};

// Scratch: what thread 0 packs or shares for all, then a private part for each thread.
struct Workspace {
  Context* context;
  float* shared;
  int64_t shared_floats, own_floats;

  Workspace(Context& context, int64_t shared_floats, int64_t own_floats)
      : context(&context), shared_floats(round_up(shared_floats, 16)), own_floats(own_floats) {
    shared = static_cast<float*>(context.scratch(0, (this->shared_floats + own_floats) * sizeof(float)));
  }
  float* own(int thread) const {
    return thread == 0 ? shared + shared_floats
                       : static_cast<float*>(context->scratch(thread, own_floats * sizeof(float)));
  }
};

// One task needs no other thread, nor does a problem that is done before another thread would have woken up.
template <typename Body>
void for_tasks(Context& context, const Problem& p, int64_t tasks, Body&& body) {
  if (tasks > 1 && p.m * p.n * p.k > SMALL) return parallel(context, tasks, static_cast<Body&&>(body));
  for (int64_t task = 0; task < tasks; task++) body(task, 0);
}

// c = sum (+ add) for a block of c at (i, j), rounded to the dtype of c.
template <typename A, typename C>
void finish(int64_t rows, int64_t columns, const float* sum, int64_t ld, const A* add, int64_t add_ld, C* c,
            int64_t c_ld) {
  for (int64_t i = 0; i < rows; i++) {
    int64_t j = 0;
    for (; j + VL <= columns; j += VL) {
      vf value = load(sum + i * ld + j);
      if (add) value += load(add + i * add_ld + j);
      store(c + i * c_ld + j, value);
    }
    for (; j < columns; j++)
      store_one(c + i * c_ld + j, add ? to_float(add[i * add_ld + j]) + sum[i * ld + j] : sum[i * ld + j]);
  }
}

template <typename T>
T* at(const Matrix& x, int64_t i, int64_t j) {
  return x.data ? static_cast<T*>(x.data) + i * x.row + j * x.column : nullptr;
}

void finish(const Problem& p, int64_t i, int64_t j, int64_t rows, int64_t columns, const float* sum, int64_t ld) {
  bool add_f32 = p.add.dtype == DType::f32, c_f32 = p.c.dtype == DType::f32;
  if (add_f32 && c_f32)
    finish(rows, columns, sum, ld, at<float>(p.add, i, j), p.add.row, at<float>(p.c, i, j), p.c.row);
  else if (add_f32)
    finish(rows, columns, sum, ld, at<float>(p.add, i, j), p.add.row, at<bf16>(p.c, i, j), p.c.row);
  else if (c_f32)
    finish(rows, columns, sum, ld, at<bf16>(p.add, i, j), p.add.row, at<float>(p.c, i, j), p.c.row);
  else
    finish(rows, columns, sum, ld, at<bf16>(p.add, i, j), p.add.row, at<bf16>(p.c, i, j), p.c.row);
}

// Rows [i0, i1) and columns [j0, j1) of c, the latter packed in `b` (NR wide panels of depth k, from j0 on).
void multiply_block(const Problem& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1, const float* b, float* own) {
  const int64_t panel = min(p.k, KC) * MR + VL;
  const int64_t tile_step = p.k > KC ? MR * NR : 0;  // tiles that wait for the next block of k are kept apart
  float* tiles = own + ceil_div(i1 - i0, MR) * panel;
  const bool c_f32 = p.c.dtype == DType::f32 && (!p.add.data || p.add.dtype == DType::f32);
  for (int64_t k0 = 0; k0 < p.k; k0 += KC) {
    const int64_t depth = min(p.k - k0, KC);
    const bool last = k0 + depth == p.k;
    pack<MR>(p.a.dtype, p.a.data, i0 * p.a.row + k0 * p.a.column, p.a.row, p.a.column, i1 - i0, depth, own, panel);
    float* tile = tiles;
    for (int64_t j = j0; j < j1; j += NR) {
      const float* b_panel = b + (j - j0) * p.k + k0 * NR;
      const int64_t columns = min(j1 - j, NR);
      const bool direct = c_f32 && columns == NR;
      const float* next = j + NR < j1 ? b_panel + p.k * NR : b + min(k0 + KC, p.k - depth) * NR;
      const int64_t share = depth * NR / ceil_div(i1 - i0, MR);
      for (int64_t i = i0, at_panel = 0; i < i1; i += MR, at_panel += panel, tile += tile_step) {
        const int rows = static_cast<int>(min(i1 - i, MR));
        const auto kernel = micro_kernel_for<float>(rows);
        for (const float* line = next; line < next + share; line += 16) __builtin_prefetch(line, 0, 2);
        next += share;
        if (direct) {
          float* c = at<float>(p.c, i, j);
          const Matrix& init = k0 == 0 ? p.add : p.c;
          kernel(depth, own + at_panel, b_panel, NR, at<float>(init, i, j), init.row, c, p.c.row);
        } else {
          kernel(depth, own + at_panel, b_panel, NR, k0 == 0 ? nullptr : tile, NR, tile, NR);
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
  // rows are cut for about four tasks a thread, where that leaves enough rows to pay for reading b
  int64_t blocks = max(ceil_div(p.m, MC), min(4 * threads, ceil_div(p.m, 4 * MR)));
  int64_t mc = round_up(ceil_div(p.m, blocks), MR);
  blocks = ceil_div(p.m, mc);
  // and columns, where they are not enough and packing a again is still cheap
  int64_t splits = max(1, min(threads == 1 ? 1 : ceil_div(4 * threads, blocks), nc / (8 * NR)));
  int64_t width = round_up(ceil_div(nc, splits), NR);
  splits = ceil_div(nc, width);

  const int64_t tiles = p.k > KC ? mc * width : MR * NR;
  Workspace work(context, nc * p.k, mc / MR * (min(p.k, KC) * MR + VL) + tiles);
  for (int64_t j0 = 0; j0 < p.n; j0 += nc) {
    const int64_t columns = min(p.n - j0, nc);
    const int64_t slabs = ceil_div(p.k, KC);
    for_tasks(context, p, ceil_div(columns, GROUP) * slabs, [&](int64_t task, int) {
      const int64_t j = task / slabs * GROUP, k0 = task % slabs * KC;
      pack<NR>(p.b.dtype, p.b.data, (j0 + j) * p.b.column + k0 * p.b.row, p.b.column, p.b.row, min(columns - j, GROUP),
               min(p.k - k0, KC), work.shared + j * p.k + k0 * NR, p.k * NR);
    });
    for_tasks(context, p, blocks * splits, [&](int64_t task, int thread) {
      const int64_t i = task / splits * mc, j = task % splits * width;
      if (j >= columns) return;
      multiply_block(p, i, min(i + mc, p.m), j0 + j, j0 + min(j + width, columns), work.shared + j * p.k,
                     work.own(thread));
    });
  }
}

// Few rows, b with rows contiguous along n: b is read where it lies, STEP rows at a time, c is summed in the cache.
template <typename T>
void multiply_few_rows(Context& context, const Problem& p) {
  const int64_t panels = ceil_div(p.m, MR), panel = p.k * MR + VL, ld = CHUNK;
  Workspace work(context, panels * panel, round_up(p.m, MR) * ld + STEP * NR);
  pack<MR>(p.a.dtype, p.a.data, 0, p.a.row, p.a.column, p.m, p.k, work.shared, panel);
  for_tasks(context, p, ceil_div(p.n, CHUNK), [&](int64_t task, int thread) {
    float* sum = work.own(thread);
    float* edge = sum + round_up(p.m, MR) * ld;
    const int64_t j0 = task * CHUNK, columns = min(p.n - j0, CHUNK);
    for (int64_t k = 0; k < p.k; k += STEP) {
      const int64_t depth = min(p.k - k, STEP);
      for (int64_t j = 0; j < columns; j += NR) {
        const T* b = at<T>(p.b, k, j0 + j);
        const bool full = columns - j >= NR;
        for (int64_t next = k + STEP; next < min(k + 2 * STEP, p.k); next++) {
          __builtin_prefetch(at<T>(p.b, next, j0 + j));
          __builtin_prefetch(at<T>(p.b, next, j0 + j) + VL);
        }
        if (!full) pack_copied<NR>(b, p.b.row, columns - j, depth, edge, 0);
        for (int64_t i = 0; i < p.m; i += MR) {
          const int rows = static_cast<int>(min(p.m - i, MR));
          const float* a = work.shared + i / MR * panel + k * MR;
          float* c = sum + i * ld + j;
          if (full)
            micro_kernel_for<T>(rows)(depth, a, b, p.b.row, k ? c : nullptr, ld, c, ld);
          else
            micro_kernel_for<float>(rows)(depth, a, edge, NR, k ? c : nullptr, ld, c, ld);
        }
      }
    }
    finish(p, 0, j0, p.m, columns, sum, ld);
  });
}

// Dot products of R rows of a (f32, padded with zeros to whole vectors) with S rows of b.
template <int R, int S, typename T>
void dots(int64_t depth, const float* a, int64_t lda, const T* b, int64_t ldb, float* sums, int64_t ld) {
  vf acc[R][S];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) acc[r][s] = vf{};
  int64_t k = 0;
  for (; k + VL <= depth; k += VL) {
    vf x[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) x[r] = load(a + r * lda + k);
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) {
      vf y = load(b + s * ldb + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][s] += x[r] * y;
    }
  }
  if (k < depth) {
    for (int s = 0; s < S; s++) {
      vf y = load_some(b + s * ldb + k, depth - k);
      for (int r = 0; r < R; r++) acc[r][s] += load(a + r * lda + k) * y;
    }
  }
  for (int r = 0; r < R; r++)
    for (int s = 0; s < S; s++) sums[r * ld + s] = sum(acc[r][s]);
}

constexpr int DOT_ROWS = RW_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int DOT_COLUMNS = 4;

template <int S, typename T>
void dots_for(int64_t rows, int64_t depth, const float* a, int64_t lda, const T* b, int64_t ldb, float* sums,
              int64_t ld) {
  int64_t i = 0;
  for (; i + DOT_ROWS <= rows; i += DOT_ROWS) dots<DOT_ROWS, S>(depth, a + i * lda, lda, b, ldb, sums + i * ld, ld);
  for (; i + 2 <= rows; i += 2) dots<2, S>(depth, a + i * lda, lda, b, ldb, sums + i * ld, ld);
  if (i < rows) dots<1, S>(depth, a + i * lda, lda, b, ldb, sums + i * ld, ld);
}

// Few rows, b with columns contiguous along k (y = x w^T of one token): dot products, so that b is read once and whole.
template <typename T>
void multiply_few_rows_dots(Context& context, const Problem& p) {
  constexpr int64_t chunk = 32;
  const int64_t lda = round_up(p.k, VL);
  Workspace work(context, p.m * lda, p.m * chunk);
  for (int64_t i = 0; i < p.m; i++) {
    pack<1>(p.a.dtype, p.a.data, i * p.a.row, p.a.row, p.a.column, 1, p.k, work.shared + i * lda, 0);
    for (int64_t k = p.k; k < lda; k++) work.shared[i * lda + k] = 0;
  }
  for_tasks(context, p, ceil_div(p.n, chunk), [&](int64_t task, int thread) {
    float* sums = work.own(thread);
    const int64_t j0 = task * chunk, columns = min(p.n - j0, chunk);
    int64_t j = 0;
    for (; j + DOT_COLUMNS <= columns; j += DOT_COLUMNS)
      dots_for<DOT_COLUMNS>(p.m, p.k, work.shared, lda, at<T>(p.b, 0, j0 + j), p.b.column, sums + j, chunk);
    for (; j < columns; j++)
      dots_for<1>(p.m, p.k, work.shared, lda, at<T>(p.b, 0, j0 + j), p.b.column, sums + j, chunk);
    finish(p, 0, j0, p.m, columns, sums, chunk);
  });
}

}  // namespace

void gemm(Context& context, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix add, Matrix c) {
  const Problem p = {m, n, k, a, b, add, c};
  const bool f32 = b.dtype == DType::f32;
  if (m > FEW_ROWS)
    multiply_packed(context, p);
  else if (b.row == 1)
    f32 ? multiply_few_rows_dots<float>(context, p) : multiply_few_rows_dots<bf16>(context, p);
  else
    f32 ? multiply_few_rows<float>(context, p) : multiply_few_rows<bf16>(context, p);
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

}  // namespace rw::cpu::RW_ISA
