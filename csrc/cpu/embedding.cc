// embedding_fwd: y[n] = w[ids[n]]. embedding_bwd: dw[v] = add[v] + sum over n with ids[n] = v of dy[n].
//
// ids (N) i32, w and dw (V,C), y and dy (N,C). Memory traffic: forward 2 N C elements; backward V C written once (read
// too, with add) and N C read.
// The backward pass first sorts the row numbers n by id, keeping their order (a counting sort, N + V integers); each
// row of dw is then summed in f32 in the order of n and written once, whatever the number of threads and the dtypes.
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

// Fills `ends` (V) and `order` (N): the row numbers with id v are order[ends[v - 1] .. ends[v]), ascending.
void sort_by_id(const int32_t* ids, int64_t rows, int64_t vocabulary, int32_t* ends, int32_t* order) {
  for (int64_t v = 0; v < vocabulary; v++) ends[v] = 0;
  for (int64_t n = 0; n < rows; n++)
    if (ids[n] >= 0 && ids[n] < vocabulary) ends[ids[n]]++;
  for (int64_t v = 1; v < vocabulary; v++) ends[v] += ends[v - 1];
  // Backwards, each cursor goes from its id's end to its start; and then to the end again.
  for (int64_t n = rows - 1; n >= 0; n--)
    if (ids[n] >= 0 && ids[n] < vocabulary) order[--ends[ids[n]]] = static_cast<int32_t>(n);
  for (int64_t n = 0; n < rows; n++)
    if (ids[n] >= 0 && ids[n] < vocabulary) ends[ids[n]]++;
}

template <typename F, typename G>
void scatter(Context& context, const embedding_bwd_args& a) {
  const int64_t rows = a.dy.dims[0], channels = a.dy.dims[1], vocabulary = a.dw.dims[0];
  auto *ends = a.ends.as<int32_t>(), *order = a.order.as<int32_t>();
  sort_by_id(a.ids.as<int32_t>(), rows, vocabulary, ends, order);
  const F* dy = a.dy.as<F>();
  const G* add = a.add.as<G>();
  const bool in_place = a.add.data == a.dw.data;
  constexpr int64_t kRows = 64;
  parallel(context, (vocabulary + kRows - 1) / kRows, [&](int64_t task, int) {
    const int64_t end = task * kRows + kRows < vocabulary ? task * kRows + kRows : vocabulary;
    for (int64_t v = task * kRows; v < end; v++) {
      const int32_t begin = v > 0 ? ends[v - 1] : 0;
      if (in_place && begin == ends[v]) continue;
      const int64_t row = v * channels;
      int64_t c = 0;
      for (; c + VL <= channels; c += VL) {
        vf total = {};
        for (int32_t i = begin; i < ends[v]; i++) total += load(dy + order[i] * channels + c);
        store(a.dw.as<G>() + row + c, add ? load(add + row + c) + total : total);
      }
      for (; c < channels; c++) {
        float total = 0;
        for (int32_t i = begin; i < ends[v]; i++) total += to_float(dy[order[i] * channels + c]);
        store_one(a.dw.as<G>() + row + c, add ? to_float(add[row + c]) + total : total);
      }
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
