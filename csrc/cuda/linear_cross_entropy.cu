// nll[n] = -log softmax(x w^T)[labels[n]], and the gradients of sum_n weight[n] nll[n].
//
// x (N,C), w (V,C) f32 or bf16; nll, weight (N) and dw (V,C) f32; dx as x. With z = x w^T, m = max_v z, s = sum_v of
// e^(z - m) and q the same sum without the label: nll = m - z[label] + log s, dz = weight e^(z - m) / s, but for the
// label -weight q / s, no difference of almost equal numbers; dx = dz w, dw = dw_add + dz^T x.
//
// The logits (N,V) never exist whole: `chunk` rows at a time, f32, in `logits`, and dz replaces them. Where x and w are
// both bf16, dz is rounded to bf16, so that both products with it run on tensor cores, as they do in any training in
// bf16: each row of dz then takes the first half of its row of logits. dw is summed in f32 over all chunks.
//
// The products are gemm (matmul.cu). Between them one block of 256 threads a row of logits, which reads it once for
// maximum and sum together (a running maximum, arXiv 1805.02867), and once more for dz, mostly from the L2: 4 elements
// a thread where rows allow it. Traffic of a chunk: w is read once (forward) or twice, dw is read and written once;
// each logit is written once and read twice (4 bytes), dz written once and read twice (2 or 4 bytes).
//
// The same idea: Cut Your Losses in Large-Vocabulary Language Models, arXiv 2411.09009; Liger Kernel, arXiv 2410.10989.
#include "gemm.h"

#include <cfloat>

namespace rw::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kPiece = 4, kPass = kThreads * kPiece;

// Sum of e^(z - top) over what a thread has seen. `top` starts at the lowest finite number, not at -infinity: then -inf
// among the logits adds 0 instead of NaN.
struct RunningSum {
  float top = -FLT_MAX, sum = 0;

  __device__ __forceinline__ void raise(float largest) {
    if (!(largest > top)) return;
    sum *= expf(top - largest);
    top = largest;
  }
};

// The thread's four logits from `column` on. Beyond the end they are -infinity, whose exponential is 0.
__device__ __forceinline__ void load_logits(const float* row, int column, int size, bool wide, float (&z)[kPiece]) {
#pragma unroll
  for (int i = 0; i < kPiece; i++) z[i] = -INFINITY;
  if (wide) {
    if (column < size) load_vector(row + column, z);
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; i++)
      if (column + i < size) z[i] = row[column + i];
  }
}

template <typename T>
__device__ __forceinline__ void store_slopes(T* row, int column, int size, bool wide, const float (&slope)[kPiece]) {
  if (wide) {
    if (column < size) store_piece(row + column, slope);
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; i++)
      if (column + i < size) row[column + i] = from_float<T>(slope[i]);
  }
}

// Largest value of the block, the same in every thread; NaN is passed over.
__device__ __forceinline__ float block_max(float x) {
  struct Tag;
  auto& parts = static_smem<WarpValues<kWarps>, Tag>();
  x = warp_max(x);
  if (lane_index() == 0) parts.value[warp_index()] = x;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; warp++) x = fmaxf(x, parts.value[warp]);
  return x;
}

// A block for each row of logits: nll and, with Slope f32 or bf16, dz in its place.
template <typename Slope>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_kernel(float* logits, const int32_t* labels, const float* weight, float* nll, int size, bool wide) {
  float* row = logits + int64_t{blockIdx.x} * size;
  const int own = static_cast<int>(threadIdx.x) * kPiece, label = labels[blockIdx.x];
  const bool counts = label >= 0 && label < size;  // the same for the whole block

  float top = 0, total = 0, others = 0;
  if (counts) {
    const float logit = row[label];  // before block_sum: then all have read it before one writes there
    RunningSum rest;                 // without the label
#pragma unroll 2
    for (int column = own; column < size; column += kPass) {
      float z[kPiece];
      load_logits(row, column, size, wide, z);
      rest.raise(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])));
#pragma unroll
      for (int i = 0; i < kPiece; i++)
        if (column + i != label) rest.sum += expf(z[i] - rest.top);
    }
    top = block_max(rest.top);
    rest.raise(top);
    struct Others;
    others = block_sum<kWarps, Others>(rest.sum);
    total = others + expf(logit - top);
    if (threadIdx.x == 0)  // in f64: where the label is almost sure, s is 1 and a little
      nll[blockIdx.x] =
          static_cast<float>(double{top} - double{logit} + log(double{others} + double{expf(logit - top)}));
  } else if (threadIdx.x == 0) {
    nll[blockIdx.x] = 0;
  }

  if constexpr (!std::is_same_v<Slope, void>) {
    const float scale = counts ? weight[blockIdx.x] / total : 0;
    for (int pass = 0; pass < size; pass += kPass) {
      float z[kPiece] = {};
      if (counts) {
        load_logits(row, pass + own, size, wide, z);
#pragma unroll
        for (int i = 0; i < kPiece; i++) z[i] = scale * (pass + own + i == label ? -others : expf(z[i] - top));
      }
      // As bf16, the first pass goes where other threads have just read; later ones where an earlier pass did.
      if constexpr (!std::is_same_v<Slope, float>) __syncthreads();
      store_slopes(reinterpret_cast<Slope*>(row), pass + own, size, wide, z);
    }
  }
}

Matrix rows_of(const Tensor& x, int64_t first = 0) {
  return {x.as<char>() + first * x.dims[1] * dtype_bytes(x.dtype), x.dtype, x.dims[1]};
}

// Rows from `first` on: their logits, nll and, with Slope, dz. `labels` and what follows belong to row 0.
template <typename Slope>
void losses(Context& context, const Tensor& x, const Tensor& w, float* logits, const Tensor& labels,
            const float* weight, const Tensor& nll, int64_t first, int64_t rows) {
  const int64_t size = w.dims[0];
  gemm(context, Layout::nt, rows, size, x.dims[1], rows_of(x, first), rows_of(w), nullptr, logits, DType::f32);
  launch({static_cast<unsigned>(rows), kThreads, 0, context.stream}, cross_entropy_kernel<Slope>, logits,
         labels.as<int32_t>() + first, weight ? weight + first : nullptr, nll.as<float>() + first, size,
         size % kPiece == 0 && aligned(logits, 16));
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

void linear_cross_entropy_fwd(Context& context, const linear_cross_entropy_fwd_args& args) {
  const int64_t count = args.x.dims[0];
  for (int64_t first = 0; first < count; first += args.chunk)
    losses<void>(context, args.x, args.w, args.logits.as<float>(), args.labels, nullptr, args.nll, first,
                 smaller(args.chunk, count - first));
}

void linear_cross_entropy_bwd(Context& context, const linear_cross_entropy_bwd_args& args) {
  const int64_t count = args.x.dims[0], channels = args.x.dims[1], size = args.w.dims[0];
  const bool narrow = args.x.dtype == DType::bf16 && args.w.dtype == DType::bf16;
  float* logits = args.logits.as<float>();
  const Matrix dz = narrow ? Matrix{logits, DType::bf16, 2 * size} : Matrix{logits, DType::f32, size};
  for (int64_t first = 0; first < count; first += args.chunk) {
    const int64_t rows = smaller(args.chunk, count - first);
    (narrow ? losses<bf16> : losses<float>)(context, args.x, args.w, logits, args.labels, args.weight.as<float>(),
                                            args.nll, first, rows);
    gemm(context, Layout::nn, rows, channels, size, dz, rows_of(args.w), nullptr,
         args.dx.as<char>() + first * channels * dtype_bytes(args.dx.dtype), args.dx.dtype);
    if (args.dw)
      gemm(context, Layout::tn, size, channels, rows, dz, rows_of(args.x, first),
           first == 0 ? args.dw_add.data : args.dw.data, args.dw.data, DType::f32);
  }
}

}  // namespace rw::cuda
