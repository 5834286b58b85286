// Quantised elements as floats, for the kernels that read them.
#pragma once
#include "device.h"

#include "../quantized.h"

namespace rw::cuda {

struct QuantizedMapsTag;

// The maps in shared memory, where lanes look up different values at once. Every thread of the block calls it; a
// barrier is in it.
__device__ __forceinline__ const QuantizedMaps& share_maps(const QuantizedMaps& from) {
  auto& maps = static_smem<QuantizedMaps, QuantizedMapsTag>();
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(QuantizedMaps) / sizeof(float)); i += blockDim.x)
    (&maps.nf4[0])[i] = (&from.nf4[0])[i];
  __syncthreads();
  return maps;
}

// What a block's codes are multiplied by.
template <DType dtype>
__device__ __forceinline__ float scale_of(const QuantizedMaps& maps, const Quantized& q, int64_t block) {
  if constexpr (dtype == DType::nf4)
    return kept_absmax(maps.absmax, q, block);
  else
    return q.scales[block];
}

// The values of codes that lie in an integer, element 0 first: Count of nf4, 8 bits for two, or of int8.
template <DType dtype, int Count>
__device__ __forceinline__ void decode(const QuantizedMaps& maps, uint32_t codes, float scale, float* x) {
#pragma unroll
  for (int i = 0; i < Count; i++) {
    if constexpr (dtype == DType::nf4)
      x[i] = maps.nf4[codes >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15u] * scale;
    else
      x[i] = static_cast<float>(static_cast<int32_t>(codes << (24 - 8 * i)) >> 24) * scale;
  }
}

// Count elements from `at` on, which are of one block; Count is 1, 4 or 8 and divides `at`.
template <DType dtype, int Count>
__device__ __forceinline__ void load_quantized(const QuantizedMaps& maps, const Quantized& q, int64_t at,
                                               float (&x)[Count]) {
  const float scale = scale_of<dtype>(maps, q, at / kQuantBlock);
  const uint8_t* from = q.codes + (dtype == DType::nf4 ? at / 2 : at);
  if constexpr (Count == 1) {
    const uint32_t byte = *from;
    decode<dtype, 1>(maps, dtype == DType::nf4 && at % 2 ? byte << 4 : byte, scale, x);
  } else if constexpr (dtype == DType::int8 && Count == 8) {
    const uint2 codes = *reinterpret_cast<const uint2*>(from);
    decode<dtype, 4>(maps, codes.x, scale, x), decode<dtype, 4>(maps, codes.y, scale, x + 4);
  } else {
    using Codes = std::conditional_t<dtype == DType::nf4 && Count == 4, uint16_t, uint32_t>;
    decode<dtype, Count>(maps, *reinterpret_cast<const Codes*>(from), scale, x);
  }
}

}  // namespace rw::cuda
