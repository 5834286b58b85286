// dot: y = add + sum a b. sum_squares: y = add + sum x^2. One read of each element.
//
// Order of summation, fixed by N alone: 16 running sums a block of 4096 elements, lane i taking every 16th element, on
// every instruction set; then the lanes, then the blocks in order, in f64.
#include "cpu.h"
#include "simd.h"

namespace rw::cpu::RW_ISA {

namespace {

constexpr int64_t kSum = 4096;
constexpr int64_t kLanes = 16;

// term(i) is the product at i.
template <typename Term>
float ordered_sum(Context& context, int64_t size, Term&& term) {
  const int64_t blocks = (size + kSum - 1) / kSum;
  double* partial = static_cast<double*>(context.scratch(0, static_cast<size_t>(blocks) * sizeof(double)));
  parallel(context, blocks, [&](int64_t block, int) {
    const int64_t begin = block * kSum, end = begin + kSum < size ? begin + kSum : size;
    float lane[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t j = 0; j < kLanes; j++) lane[j] += term(i + j);
    for (int64_t j = 0; i < end; i++, j++) lane[j] += term(i);
    double total = 0;
    for (int64_t j = 0; j < kLanes; j++) total += lane[j];
    partial[block] = total;
  });
  double total = 0;
  for (int64_t block = 0; block < blocks; block++) total += partial[block];
  return static_cast<float>(total);
}

}  // namespace

void dot(Context& context, const dot_args& a) {
  const float* x = a.a.as<float>();
  const float* y = a.b.as<float>();
  const float total = ordered_sum(context, a.a.size(), [=](int64_t i) { return x[i] * y[i]; });
  *a.y.as<float>() = a.add ? *a.add.as<float>() + total : total;
}

void sum_squares(Context& context, const sum_squares_args& a) {
  float total;
  if (a.x.dtype == DType::bf16) {
    const bf16* x = a.x.as<bf16>();
    total = ordered_sum(context, a.x.size(), [=](int64_t i) { return to_float(x[i]) * to_float(x[i]); });
  } else {
    const float* x = a.x.as<float>();
    total = ordered_sum(context, a.x.size(), [=](int64_t i) { return x[i] * x[i]; });
  }
  *a.y.as<float>() = a.add ? *a.add.as<float>() + total : total;
}

}  // namespace rw::cpu::RW_ISA
