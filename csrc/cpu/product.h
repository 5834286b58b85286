// What the ways to a matrix product share (matmul.cc, matmul_tiles.cc): the problem, scratch, how rows are cut into
// tasks, and the last step from sums to the stored result.
#pragma once
#include "dequantize.h"
#include "gemm.h"

namespace rw::cpu::RW_ISA {

struct Problem {
  int64_t m, n, k;
  Matrix a, b, add, c;
  Quantized q;  // the parts of a quantised b

  // A quantised b has values of a's dtype.
  bool b_is_f32() const { return (is_quantized(b.dtype) ? a.dtype : b.dtype) == DType::f32; }
  // f32 c takes the sums while they grow; else they wait in scratch, to be rounded once.
  bool sums_in_place() const { return c.dtype == DType::f32 && (!add.data || add.dtype == DType::f32); }
};

// c = a b (+ add) in tiles (matmul_tiles.cc), where Context::has_tiles() and for more rows than a few.
void multiply_tiles(Context& context, const Problem& p);

namespace {

constexpr int64_t SMALL = 64 * 64 * 64;  // multiplications: 2 microseconds, less than waking a thread up
constexpr int64_t SMALL_B = 64 * 256;    // elements of b: the same where they are read for a row or two

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

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
  if (tasks > 1 && (p.m * p.n * p.k > SMALL || p.n * p.k > SMALL_B))
    return parallel(context, tasks, static_cast<Body&&>(body));
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

inline void* start_at(const Matrix& x, int64_t element) {
  return static_cast<char*>(x.data) + element * (x.dtype == DType::f32 ? sizeof(float) : sizeof(bf16));
}

template <typename T>
T* at(const Matrix& x, int64_t i, int64_t j) {
  return x.data ? static_cast<T*>(x.data) + i * x.row + j * x.column : nullptr;
}

inline void finish(const Problem& p, int64_t i, int64_t j, int64_t rows, int64_t columns, const float* sum,
                   int64_t ld) {
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

// How the rows of c are cut into tasks: into an equal share for each thread, and that into `cuts` blocks of whole
// panels, the larger ones first, of which the last takes the rows that do not fill a panel. Threads that are equally
// fast then end together; blocks of one size for all rows left up to a tenth of the time to one thread. About four
// blocks a thread, where that leaves enough rows to pay for reading b, so that a thread that is held up can be helped.
template <int64_t panel_rows, int64_t most_rows>
struct Blocks {
  int64_t m, shares, share, cuts, panels, larger;

  Blocks(int64_t m, int64_t threads)
      : m(m), shares(min(threads, ceil_div(m, 4 * panel_rows))), share(ceil_div(m, shares)) {
    cuts = max(ceil_div(share, most_rows), threads == 1 ? 1 : min(4, ceil_div(share, 4 * panel_rows)));
    panels = share / panel_rows / cuts;
    larger = share / panel_rows % cuts;
  }
  int64_t count() const { return shares * cuts; }
  int64_t most_panels() const { return panels + (larger > 0) + 1; }
  // Of `count()` blocks, the first ones of all shares come first.
  int64_t start(int64_t block) const {
    const int64_t cut = block / shares;
    return block % shares * share + (cut * panels + min(cut, larger)) * panel_rows;
  }
  int64_t end(int64_t block) const {
    const int64_t last = min(m, (block % shares + 1) * share);
    return block / shares == cuts - 1 ? last : min(last, start(block + shares));
  }
};

}  // namespace
}  // namespace rw::cpu::RW_ISA
