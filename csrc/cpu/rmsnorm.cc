// rmsnorm_fwd: rstd[n] = 1 / sqrt(mean_c x[n,c]^2 + eps), y[n,c] = w[c] x[n,c] rstd[n]. arXiv 1910.07467.
// rmsnorm_bwd: with g = w dy and s[n] = rstd[n]^3 / C sum_c g x: dx = add + rstd g - s x, dw[c] = dw_add + sum_n dy x
// rstd.
//
// x, y, dy, dx (N,C), w and dw (C), rstd (N) f32. Memory traffic: forward 2 N C elements, backward 3 N C (4 with add).
// dw: rows are split into at most 64 blocks by N alone, each block sums its rows in order into `partial` (64,C), and
// the blocks are then added in order: the same bits for any number of threads.
#include "cpu.h"
#include "simd.h"

namespace rw::cpu::RW_ISA {

namespace {

constexpr int64_t kBlocks = 64;  // rows of `partial` in the op table

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename F, typename W>
void forward(Context& context, const rmsnorm_fwd_args& a) {
  const int64_t rows = a.x.dims[0], channels = a.x.dims[1];
  constexpr int64_t kRows = 16;
  parallel(context, (rows + kRows - 1) / kRows, [&](int64_t task, int) {
    for (int64_t n = task * kRows; n < smaller(rows, task * kRows + kRows); n++) {
      const F* x = a.x.as<F>() + n * channels;
      const W* w = a.w.as<W>();
      F* y = a.y.as<F>() + n * channels;
      vf sums[4] = {};
      int64_t c = 0;
      for (; c + 4 * VL <= channels; c += 4 * VL)
        for (int64_t j = 0; j < 4; j++) {
          const vf value = load(x + c + j * VL);
          sums[j] += value * value;
        }
      float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
      for (; c < channels; c++) total += to_float(x[c]) * to_float(x[c]);
      const float rstd = 1.0f / __builtin_sqrtf(total / static_cast<float>(channels) + static_cast<float>(a.eps));
      a.rstd.as<float>()[n] = rstd;
      for (c = 0; c + VL <= channels; c += VL) store(y + c, load(w + c) * (load(x + c) * rstd));
      for (; c < channels; c++) store_one(y + c, to_float(w[c]) * (to_float(x[c]) * rstd));
    }
  });
}

template <typename F, typename W, typename G>
void backward(Context& context, const rmsnorm_bwd_args& a) {
  const int64_t rows = a.x.dims[0], channels = a.x.dims[1];
  const int64_t rows_per_block = (rows + kBlocks - 1) / kBlocks;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  const W* w = a.w.as<W>();
  parallel(context, blocks, [&](int64_t block, int) {
    float* partial = a.partial.as<float>() + block * channels;
    for (int64_t c = 0; c < channels; c++) partial[c] = 0.0f;
    for (int64_t n = block * rows_per_block; n < smaller(rows, (block + 1) * rows_per_block); n++) {
      const F* x = a.x.as<F>() + n * channels;
      const F* dy = a.dy.as<F>() + n * channels;
      const F* add = a.add ? a.add.as<F>() + n * channels : nullptr;
      F* dx = a.dx.as<F>() + n * channels;
      const float rstd = a.rstd.as<float>()[n];
      vf sums[2] = {};
      int64_t c = 0;
      for (; c + 2 * VL <= channels; c += 2 * VL)
        for (int64_t j = 0; j < 2; j++) {
          const vf xv = load(x + c + j * VL), dyv = load(dy + c + j * VL);
          sums[j] += load(w + c + j * VL) * dyv * xv;
          store(partial + c + j * VL, load(partial + c + j * VL) + dyv * xv * rstd);
        }
      float total = sum(sums[0] + sums[1]);
      for (; c < channels; c++) {
        total += to_float(w[c]) * to_float(dy[c]) * to_float(x[c]);
        partial[c] += to_float(dy[c]) * to_float(x[c]) * rstd;
      }
      const float scale = rstd * rstd * rstd * (total / static_cast<float>(channels));
      for (c = 0; c + VL <= channels; c += VL) {
        vf value = load(w + c) * load(dy + c) * rstd - load(x + c) * scale;
        if (add) value = load(add + c) + value;
        store(dx + c, value);
      }
      for (; c < channels; c++) {
        float value = to_float(w[c]) * to_float(dy[c]) * rstd - to_float(x[c]) * scale;
        store_one(dx + c, add ? to_float(add[c]) + value : value);
      }
    }
  });
  for (int64_t c = 0; c < channels; c++) {
    float total = 0.0f;
    for (int64_t block = 0; block < blocks; block++) total += a.partial.as<float>()[block * channels + c];
    store_one(a.dw.as<G>() + c, a.dw_add ? to_float(a.dw_add.as<G>()[c]) + total : total);
  }
}

template <typename F, typename W>
void backward_into(Context& context, const rmsnorm_bwd_args& a) {
  if (a.dw.dtype == DType::bf16) return backward<F, W, bf16>(context, a);
  backward<F, W, float>(context, a);
}

}  // namespace

void rmsnorm_fwd(Context& context, const rmsnorm_fwd_args& a) {
  const bool x16 = a.x.dtype == DType::bf16, w16 = a.w.dtype == DType::bf16;
  if (x16 && w16) return forward<bf16, bf16>(context, a);
  if (x16) return forward<bf16, float>(context, a);
  if (w16) return forward<float, bf16>(context, a);
  forward<float, float>(context, a);
}

void rmsnorm_bwd(Context& context, const rmsnorm_bwd_args& a) {
  const bool x16 = a.x.dtype == DType::bf16, w16 = a.w.dtype == DType::bf16;
  if (x16 && w16) return backward_into<bf16, bf16>(context, a);
  if (x16) return backward_into<bf16, float>(context, a);
  if (w16) return backward_into<float, bf16>(context, a);
  backward_into<float, float>(context, a);
}

}  // namespace rw::cpu::RW_ISA
