// embedding_fwd: y[n] = w[ids[n]]. embedding_bwd: dw[v] = add[v] + sum over n with ids[n] = v of dy[n].
//
// ids (N) i32, w and dw (V,C), y and dy (N,C). Memory traffic: forward 2 N C elements; backward V C written once (read
// too, with add) and N C read.
// The backward pass splits the columns, never the rows: each task walks over all ids in order and owns its columns, so
// that a row's sum has one fixed order whatever the number of threads, and no sorting is needed.
#include "cpu.h"
#include "simd.h"

namespace rw::cpu::RW_ISA {

namespace {

template <typename W, typename F>
void gather(Context& context, const embedding_fwd_args& a) {
  const int64_t rows = a.y.dims[0], channels = a.y.dims[1], vocabulary = a.w.dims[0];
  constexpr int64_t kRows = 64;
  parallel(context, (rows + kRows - 1) / kRows, [&](int64_t task, int) {
    const int64_t end = task * kRows + kRows < rows ? task * kRows + kRows : rows;
    for (int64_t n = task * kRows; n < end; n++) {
      const int64_t id = a.ids.as<int32_t>()[n];
      F* to = a.y.as<F>() + n * channels;
      if (id < 0 || id >= vocabulary) {  // refused by the host; a NaN shows a caller that did not
        for (int64_t c = 0; c < channels; c++) store_one(to + c, __builtin_nanf(""));
        continue;
      }
      const W* from = a.w.as<W>() + id * channels;
      int64_t c = 0;
      for (; c + VL <= channels; c += VL) store(to + c, load(from + c));
      for (; c < channels; c++) store_one(to + c, to_float(from[c]));
    }
  });
}

template <typename F, typename G>
void scatter(Context& context, const embedding_bwd_args& a) {
  const int64_t rows = a.dy.dims[0], channels = a.dy.dims[1], vocabulary = a.dw.dims[0];
  constexpr int64_t kColumns = 64;
  parallel(context, (channels + kColumns - 1) / kColumns, [&](int64_t task, int) {
    const int64_t begin = task * kColumns;
    const int64_t end = begin + kColumns < channels ? begin + kColumns : channels;
    if (a.add.data != a.dw.data) {
      for (int64_t v = 0; v < vocabulary; v++) {
        G* to = a.dw.as<G>() + v * channels;
        for (int64_t c = begin; c < end; c++)
          store_one(to + c, a.add ? to_float(a.add.as<G>()[v * channels + c]) : 0.0f);
      }
    }
    for (int64_t n = 0; n < rows; n++) {
      const int64_t id = a.ids.as<int32_t>()[n];
      if (id < 0 || id >= vocabulary) continue;
      const F* from = a.dy.as<F>() + n * channels;
      G* to = a.dw.as<G>() + id * channels;
      int64_t c = begin;
      for (; c + VL <= end; c += VL) store(to + c, load(to + c) + load(from + c));
      for (; c < end; c++) store_one(to + c, to_float(to[c]) + to_float(from[c]));
    }
  });
}

}  // namespace

void embedding_fwd(Context& context, const embedding_fwd_args& a) {
  const bool w16 = a.w.dtype == DType::bf16, y16 = a.y.dtype == DType::bf16;
  if (w16 && y16) return gather<bf16, bf16>(context, a);
  if (w16) return gather<bf16, float>(context, a);
  if (y16) return gather<float, bf16>(context, a);
  gather<float, float>(context, a);
}

void embedding_bwd(Context& context, const embedding_bwd_args& a) {
  const bool dy16 = a.dy.dtype == DType::bf16, dw16 = a.dw.dtype == DType::bf16;
  if (dy16 && dw16) return scatter<bf16, bf16>(context, a);
  if (dy16) return scatter<bf16, float>(context, a);
  if (dw16) return scatter<float, bf16>(context, a);
  scatter<float, float>(context, a);
}

}  // namespace rw::cpu::RW_ISA
