// nll[n] = -log softmax(x w^T)[labels[n]], and the gradients of sum_n weight[n] nll[n].
//
// x (N,C), w (V,C) f32 or bf16; nll, weight (N) and dw (V,C) f32; dx as x. With z = x w^T, m = max_v z and s = sum_v
// e^(z - m): nll = m - z[label] + log s, dz = weight (e^(z - m) / s - onehot(label)), dx = dz w, dw = dw_add + dz^T x.
//
// The logits (N,V) never exist whole: `chunk` rows at a time, f32, in `logits`, where dz replaces them. Traffic of a
// chunk: w is read once (forward) or twice, dw is read and written once, so that a larger chunk costs less of both; a
// row of logits is read twice forward, three times backward, out of the cache. Rows are one task each and the sum over
// chunks is in their order, so that bits do not depend on the number of threads. A row's sum runs in 4 VL lanes of f32
// with V / (4 VL) terms each, which are then added in f64.
//
// The same idea: Cut Your Losses in Large-Vocabulary Language Models, arXiv 2411.09009; Liger Kernel, arXiv 2410.10989.
#include "gemm.h"

namespace rw::cpu::RW_ISA {

namespace {

constexpr int LANES = 4;  // independent vectors of a reduction, to hide the latency of an addition

float row_max(const float* z, int64_t size) {
  vf top[LANES];
  for (int u = 0; u < LANES; u++) top[u] = splat(z[0]);
  int64_t i = 0;
  for (; i + LANES * VL <= size; i += LANES * VL)
#pragma GCC unroll 4
    for (int u = 0; u < LANES; u++) top[u] = max(top[u], load(z + i + u * VL));
  vf all = max(max(top[0], top[1]), max(top[2], top[3]));
  float result = z[0];
  for (int64_t lane = 0; lane < VL; lane++) result = all[lane] > result ? all[lane] : result;
  for (; i < size; i++) result = z[i] > result ? z[i] : result;
  return result;
}

// Sum of e^(z - top), a NaN or an infinity where z has one. With `keep`, e^(z - top) replaces z.
template <bool keep>
double row_exp(float* z, int64_t size, float top) {
  vf total[LANES] = {};
  int64_t i = 0;
  for (; i + LANES * VL <= size; i += LANES * VL)
#pragma GCC unroll 4
    for (int u = 0; u < LANES; u++) {
      vf e = exp(load(z + i + u * VL) - top);
      total[u] += e;
      if constexpr (keep) store(z + i + u * VL, e);
    }
  double result = 0;
  for (int u = 0; u < LANES; u++)
    for (int64_t lane = 0; lane < VL; lane++) result += total[u][lane];
  for (; i < size; i += VL) {
    const int64_t rest = size - i < VL ? size - i : VL;
    float part[VL] = {};
    for (int64_t lane = 0; lane < rest; lane++) part[lane] = z[i + lane];
    const vf e = exp(load(part) - top);
    for (int64_t lane = 0; lane < rest; lane++) {
      result += e[lane];
      if constexpr (keep) z[i + lane] = e[lane];
    }
  }
  return result;
}

Matrix stored(const Tensor& x, int64_t first = 0) {
  return {x.as<char>() + first * x.dims[1] * dtype_bytes(x.dtype), x.dtype, x.dims[1], 1};
}
Matrix transposed(const Matrix& x) { return {x.data, x.dtype, x.column, x.row}; }

constexpr Matrix none = {nullptr, DType::f32, 0, 0};

// z = x w^T for `rows` rows from `first` on, then body(z row, n) for each row.
template <typename Body>
void for_logits(Context& context, const Tensor& x, const Tensor& w, float* logits, int64_t first, int64_t rows,
                Body&& body) {
  const int64_t vocabulary = w.dims[0];
  gemm(context, rows, vocabulary, x.dims[1], stored(x, first), transposed(stored(w)), none,
       {logits, DType::f32, vocabulary, 1});
  parallel(context, rows, [&](int64_t row, int) { body(logits + row * vocabulary, first + row); });
}

float negative_log_likelihood(float top, float logit, double total) {
  return static_cast<float>(static_cast<double>(top) - logit + __builtin_log(total));
}

}  // namespace

void linear_cross_entropy_fwd(Context& context, const linear_cross_entropy_fwd_args& args) {
  const int64_t count = args.x.dims[0], vocabulary = args.w.dims[0];
  const int32_t* labels = args.labels.as<int32_t>();
  float* nll = args.nll.as<float>();
  for (int64_t first = 0; first < count; first += args.chunk) {
    const int64_t rows = count - first < args.chunk ? count - first : args.chunk;
    for_logits(context, args.x, args.w, args.logits.as<float>(), first, rows, [&](float* z, int64_t n) {
      nll[n] = 0;
      if (labels[n] < 0 || labels[n] >= vocabulary) return;
      const float top = row_max(z, vocabulary);
      nll[n] = negative_log_likelihood(top, z[labels[n]], row_exp<false>(z, vocabulary, top));
    });
  }
}

void linear_cross_entropy_bwd(Context& context, const linear_cross_entropy_bwd_args& args) {
  const int64_t count = args.x.dims[0], channels = args.x.dims[1], vocabulary = args.w.dims[0];
  const int32_t* labels = args.labels.as<int32_t>();
  const float* weight = args.weight.as<float>();
  float* nll = args.nll.as<float>();
  for (int64_t first = 0; first < count; first += args.chunk) {
    const int64_t rows = count - first < args.chunk ? count - first : args.chunk;
    float* logits = args.logits.as<float>();
    for_logits(context, args.x, args.w, logits, first, rows, [&](float* z, int64_t n) {
      nll[n] = 0;
      if (labels[n] < 0 || labels[n] >= vocabulary) {
        memset(z, 0, vocabulary * sizeof(float));
        return;
      }
      const float top = row_max(z, vocabulary), logit = z[labels[n]];
      const double total = row_exp<true>(z, vocabulary, top);
      nll[n] = negative_log_likelihood(top, logit, total);
      const double p = z[labels[n]] / total;
      const float scale = static_cast<float>(weight[n] / total);
      int64_t i = 0;
      for (; i + VL <= vocabulary; i += VL) store(z + i, load(z + i) * scale);
      for (; i < vocabulary; i++) z[i] *= scale;
      z[labels[n]] = static_cast<float>(weight[n] * (p - 1));  // in f64: p is often almost 1
    });
    const Matrix dz = {logits, DType::f32, vocabulary, 1};
    gemm(context, rows, channels, vocabulary, dz, stored(args.w), none, stored(args.dx, first));
    if (args.dw)
      gemm(context, vocabulary, channels, rows, transposed(dz), stored(args.x, first),
           first == 0 ? stored(args.dw_add) : stored(args.dw), stored(args.dw));
  }
}

}  // namespace rw::cpu::RW_ISA
