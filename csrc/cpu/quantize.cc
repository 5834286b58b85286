// quantize: y = x rounded to nf4 or int8 in blocks of 64; dequantize: back to floats. The formats are those of
// csrc/quantized.h, QLoRA: arXiv 2305.14314.
//
// x, y flat (N), the float one f32 or bf16. Memory traffic: nf4 reads x twice, first for the mean absmax, int8 once. A
// task is a group of 256 blocks; the sums of the groups are added in their order, in f64.
#include "dequantize.h"

namespace rw::cpu::RW_ISA {

namespace {

constexpr int64_t kTask = kQuantBlock * kScaleGroup;  // elements

float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// A block as floats, the last one filled up with 0, and its largest magnitude; NaN where there is one.
template <typename T>
float read_block(const T* x, int64_t elements, int64_t block, float (&values)[kQuantBlock]) {
  const T* from = x + block * kQuantBlock;
  const int64_t left = elements - block * kQuantBlock;
  vi most = {};
  for (int64_t i = 0; i < kQuantBlock; i += VL) {
    vf part = {};
    if (i + VL <= left)
      part = load(from + i);
    else
      for (int64_t lane = 0; lane < VL && i + lane < left; lane++) part[lane] = to_float(from[i + lane]);
    store(values + i, part);
    const vi bits = (vi)part & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int64_t lane = 0; lane < VL; lane++) largest = most[lane] > largest ? most[lane] : largest;
  return float_of(static_cast<uint32_t>(largest));
}

void store_nf4(const float (&values)[kQuantBlock], float absmax, uint8_t* codes) {
  const float divisor = absmax > 0 ? absmax : 1;
  uint8_t code[kQuantBlock];
  for (int64_t i = 0; i < kQuantBlock; i += VL) {
    const vf x = load(values + i) / divisor;
    vi number = {};
    for (int value = 0; value < 15; value++)
      number -= x > halfway(kQuantizedMaps.nf4[value], kQuantizedMaps.nf4[value + 1]);
    store(code + i, (vu)number);
  }
  for (int64_t i = 0; i < kQuantBlock / 2; i++) codes[i] = static_cast<uint8_t>(code[2 * i] << 4 | code[2 * i + 1]);
}

void store_int8(const float (&values)[kQuantBlock], float scale, uint8_t* codes) {
  const float divisor = scale > 0 ? scale : 1;
  for (int64_t i = 0; i < kQuantBlock; i += VL) {
    const vf x = max(min(load(values + i) / divisor, splat(127)), splat(-127));
    store(codes + i, (vu)(x + 12582912.0f));  // 1.5 * 2^23: rounds to nearest in the low bits
  }
}

// The mean absmax of all blocks.
template <typename T>
float mean_absmax(Context& context, const T* x, int64_t elements, int64_t blocks, int64_t groups) {
  auto* sums = static_cast<double*>(context.scratch(0, static_cast<size_t>(groups) * sizeof(double)));
  parallel(context, groups, [&](int64_t group, int) {
    float values[kQuantBlock];
    double sum = 0;
    for (int64_t block = group * kScaleGroup; block < (group + 1) * kScaleGroup && block < blocks; block++)
      sum += read_block(x, elements, block, values);
    sums[group] = sum;
  });
  double sum = 0;
  for (int64_t group = 0; group < groups; group++) sum += sums[group];
  return static_cast<float>(sum / static_cast<double>(blocks));
}

// The bytes of a group's absmax, of which there are `count`, and their scale.
void store_absmax(const float* absmax, int64_t count, const Quantized& q, int64_t group) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    const float distance = absmax[i] - *q.mean;
    memcpy(&bits, &distance, 4);
    most = (bits & 0x7fffffffu) > most ? bits & 0x7fffffffu : most;
  }
  const float scale = float_of(most), divisor = scale > 0 ? scale : 1;
  q.scales[group] = scale;
  for (int64_t i = 0; i < count; i++)
    q.absmax[group * kScaleGroup + i] = nearest_absmax(kQuantizedMaps.absmax, (absmax[i] - *q.mean) / divisor);
}

template <typename T>
void quantize_to(Context& context, const quantize_args& a) {
  const int64_t elements = a.x.size();
  const T* x = a.x.as<T>();
  const DType dtype = a.y.dtype;
  const Quantized q = quantized(dtype, a.y.data, elements);
  const int64_t groups = (q.blocks + kScaleGroup - 1) / kScaleGroup;
  if (dtype == DType::nf4) {
    *q.mean = mean_absmax(context, x, elements, q.blocks, groups);
    for (int64_t i = q.blocks; i % 4 != 0; i++) q.absmax[i] = 0;
  }
  parallel(context, groups, [&](int64_t group, int) {
    const int64_t first = group * kScaleGroup;
    const int64_t count = q.blocks - first < kScaleGroup ? q.blocks - first : kScaleGroup;
    float values[kQuantBlock], absmax[kScaleGroup];
    for (int64_t i = 0; i < count; i++) {
      absmax[i] = read_block(x, elements, first + i, values);
      if (dtype == DType::nf4) {
        store_nf4(values, absmax[i], q.codes + (first + i) * kQuantBlock / 2);
      } else {
        q.scales[first + i] = absmax[i] / 127;
        store_int8(values, q.scales[first + i], q.codes + (first + i) * kQuantBlock);
      }
    }
    if (dtype == DType::nf4) store_absmax(absmax, count, q, group);
  });
}

template <typename T>
void dequantize_to(Context& context, const dequantize_args& a) {
  const int64_t elements = a.x.size();
  const Quantized q = quantized(a.x.dtype, a.x.data, elements);
  parallel(context, (elements + kTask - 1) / kTask, [&](int64_t task, int) {
    const int64_t end = (task + 1) * kTask < elements ? (task + 1) * kTask : elements;
    for (int64_t at = task * kTask; at < end; at += kQuantBlock) {
      float values[kQuantBlock];
      dequantize_block(a.x.dtype, q, at / kQuantBlock, values);
      T* to = a.y.as<T>() + at;
      if (at + kQuantBlock <= end)
        for (int64_t i = 0; i < kQuantBlock; i += VL) store(to + i, load(values + i));
      else
        for (int64_t i = 0; i < end - at; i++) store_one(to + i, values[i]);
    }
  });
}

}  // namespace

void quantize(Context& context, const quantize_args& a) {
  if (a.x.dtype == DType::bf16)
    quantize_to<bf16>(context, a);
  else
    quantize_to<float>(context, a);
}

void dequantize(Context& context, const dequantize_args& a) {
  if (a.y.dtype == DType::bf16)
    dequantize_to<bf16>(context, a);
  else
    dequantize_to<float>(context, a);
}

}  // namespace rw::cpu::RW_ISA
