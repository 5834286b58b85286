// quantize: y = x rounded to nf4 or int8 in blocks of 64; dequantize: back to floats. The formats are those of
// csrc/quantized.h, QLoRA: arXiv 2305.14314.
//
// x, y flat (N), the float one f32 or bf16. Memory traffic: nf4 reads x twice, first for the mean absmax, int8 once. A
// warp has a block at a time, a lane the elements l and l + 32 of it. A block of 8 warps has a group of 256 blocks of
// elements. Its sum of absmax, in f64 and in order, goes to scratch; one warp adds those of all groups up, in order;
// then come the codes. Shared memory: the values that codes stand for and the absmax of the group, 2.1 KB.
#include "dequantize.h"

namespace rw::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

struct Group {
  float absmax[kScaleGroup];
};
struct GroupTag;

struct Most {
  uint32_t bits[kWarps];
};
struct MostTag;

// A lane's two elements of a block, the last one filled up with 0, and the block's largest magnitude; NaN where there
// is one.
template <typename T>
__device__ __forceinline__ float read_block(const T* x, int64_t elements, int64_t block, float (&values)[2]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t at = block * kQuantBlock + i * kWarp + lane_index();
    values[i] = at < elements ? to_float(x[at]) : 0.0f;
    const uint32_t bits = __float_as_uint(values[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return __uint_as_float(__reduce_max_sync(kAllLanes, most));
}

// How many blocks a group has: the last one may have fewer.
__device__ __forceinline__ int blocks_of(int64_t group, int64_t blocks) {
  const int64_t left = blocks - group * kScaleGroup;
  return static_cast<int>(left < kScaleGroup ? left : kScaleGroup);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    absmax_sums_kernel(const T* x, int64_t elements, int64_t blocks, double* sums) {
  auto& group = static_smem<Group, GroupTag>();
  const int64_t first = int64_t{blockIdx.x} * kScaleGroup;
  const int count = blocks_of(blockIdx.x, blocks);
  for (int i = warp_index(); i < count; i += kWarps) {
    float values[2];
    const float absmax = read_block(x, elements, first + i, values);
    if (lane_index() == 0) group.absmax[i] = absmax;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int i = 0; i < count; i++) sum += group.absmax[i];
  sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kWarp)
    absmax_mean_kernel(const double* sums, int groups, int64_t blocks, float* mean) {
  double sum = 0;
  for (int first = 0; first < groups; first += kWarp) {
    const int at = first + lane_index();
    const double own = at < groups ? sums[at] : 0.0;
    for (int lane = 0; lane < kWarp; lane++) sum += __shfl_sync(kAllLanes, own, lane);
  }
  if (lane_index() == 0) *mean = static_cast<float>(sum / static_cast<double>(blocks));
}

__device__ __forceinline__ uint32_t nf4_code(const QuantizedMaps& maps, float x) {
  uint32_t code = 0;
#pragma unroll
  for (int value = 0; value < 15; value++) code += x > halfway(maps.nf4[value], maps.nf4[value + 1]);
  return code;
}

// Lane l writes byte l / 2 of the block's half l % 2: it has an element of it, and gets the other one.
__device__ __forceinline__ void store_nf4(const QuantizedMaps& maps, const float (&values)[2], float absmax,
                                          uint8_t* codes) {
  const float divisor = absmax > 0 ? absmax : 1.0f;
  const uint32_t low = nf4_code(maps, values[0] / divisor), high = nf4_code(maps, values[1] / divisor);
  const bool odd = lane_index() % 2;
  const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
  codes[lane_index() % 2 * 16 + lane_index() / 2] = static_cast<uint8_t>(odd ? other << 4 | high : low << 4 | other);
}

__device__ __forceinline__ uint8_t int8_code(float x, float divisor) {
  float steps = x / divisor;
  steps = steps < 127.0f ? steps : 127.0f;  // NaN too
  steps = steps > -127.0f ? steps : -127.0f;
  return static_cast<uint8_t>(__float_as_uint(steps + 12582912.0f));  // 1.5 * 2^23: rounds to nearest in the low bits
}

// The largest in the block, in every thread.
__device__ __forceinline__ uint32_t block_max(uint32_t x) {
  auto& most = static_smem<Most, MostTag>();
  x = __reduce_max_sync(kAllLanes, x);
  if (lane_index() == 0) most.bits[warp_index()] = x;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; warp++) x = most.bits[warp] > x ? most.bits[warp] : x;
  return x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    nf4_kernel(const T* x, int64_t elements, Quantized q, const __grid_constant__ QuantizedMaps from) {
  const QuantizedMaps& maps = share_maps(from);
  auto& group = static_smem<Group, GroupTag>();
  const int64_t first = int64_t{blockIdx.x} * kScaleGroup;
  const int count = blocks_of(blockIdx.x, q.blocks);
  for (int i = warp_index(); i < count; i += kWarps) {
    float values[2];
    const float absmax = read_block(x, elements, first + i, values);
    store_nf4(maps, values, absmax, q.codes + (first + i) * (kQuantBlock / 2));
    if (lane_index() == 0) group.absmax[i] = absmax;
  }
  __syncthreads();
  const int own = threadIdx.x;
  const float distance = own < count ? group.absmax[own] - *q.mean : 0.0f;
  const float scale = __uint_as_float(block_max(__float_as_uint(distance) & 0x7fffffffu));
  if (own == 0) q.scales[blockIdx.x] = scale;
  if (own < count)
    q.absmax[first + own] = nearest_absmax(maps.absmax, distance / (scale > 0 ? scale : 1.0f));
  else if (first + own < (q.blocks + 3) / 4 * 4)
    q.absmax[first + own] = 0;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) int8_kernel(const T* x, int64_t elements, Quantized q) {
  const int64_t first = int64_t{blockIdx.x} * kScaleGroup;
  const int count = blocks_of(blockIdx.x, q.blocks);
  for (int i = warp_index(); i < count; i += kWarps) {
    float values[2];
    const float scale = read_block(x, elements, first + i, values) / 127.0f, divisor = scale > 0 ? scale : 1.0f;
    uint8_t* codes = q.codes + (first + i) * kQuantBlock;
#pragma unroll
    for (int j = 0; j < 2; j++) codes[j * kWarp + lane_index()] = int8_code(values[j], divisor);
    if (lane_index() == 0) q.scales[first + i] = scale;
  }
}

template <DType dtype, typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(Quantized q, T* y, int64_t elements, const __grid_constant__ QuantizedMaps from) {
  const QuantizedMaps& maps = share_maps(from);
  const int64_t first = int64_t{blockIdx.x} * kScaleGroup;
  const int count = blocks_of(blockIdx.x, q.blocks), lane = lane_index();
  for (int i = warp_index(); i < count; i += kWarps) {
    const int64_t block = first + i;
    const float scale = scale_of<dtype>(maps, q, block);
    float values[2];
    if constexpr (dtype == DType::nf4) {
      const uint32_t byte = q.codes[block * (kQuantBlock / 2) + lane];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint32_t pair = __shfl_sync(kAllLanes, byte, 16 * j + lane / 2);
        values[j] = maps.nf4[lane % 2 ? pair & 15u : pair >> 4] * scale;
      }
    } else {
#pragma unroll
      for (int j = 0; j < 2; j++)
        values[j] = static_cast<float>(static_cast<int8_t>(q.codes[block * kQuantBlock + j * kWarp + lane])) * scale;
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int64_t at = block * kQuantBlock + j * kWarp + lane;
      if (at < elements) y[at] = from_float<T>(values[j]);
    }
  }
}

}  // namespace

void quantize(Context& context, const quantize_args& args) {
  const int64_t elements = args.x.size();
  const Quantized q = quantized(args.y.dtype, args.y.data, elements);
  const auto groups = static_cast<unsigned>(ceil_div(q.blocks, kScaleGroup));
  const Launch at(groups, kThreads, 0, context.stream);
  with_float_type(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.y.dtype == DType::int8) return launch(at, int8_kernel<T>, args.x.as<T>(), elements, q);
    auto* sums = static_cast<double*>(context.scratch(groups * sizeof(double)));
    launch(at, absmax_sums_kernel<T>, args.x.as<T>(), elements, q.blocks, sums);
    launch({1, kWarp, 0, context.stream}, absmax_mean_kernel, sums, static_cast<int>(groups), q.blocks, q.mean);
    launch(at, nf4_kernel<T>, args.x.as<T>(), elements, q, kQuantizedMaps);
  });
}

void dequantize(Context& context, const dequantize_args& args) {
  const int64_t elements = args.x.size();
  const Quantized q = quantized(args.x.dtype, args.x.data, elements);
  const Launch at(static_cast<unsigned>(ceil_div(q.blocks, kScaleGroup)), kThreads, 0, context.stream);
  with_float_type(args.y.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel =
        args.x.dtype == DType::nf4 ? dequantize_kernel<DType::nf4, T> : dequantize_kernel<DType::int8, T>;
    launch(at, kernel, q, args.y.as<T>(), elements, kQuantizedMaps);
  });
}

}  // namespace rw::cuda
