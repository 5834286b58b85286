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

// 8 elements of nf4 from their 4 bytes, of int8 from 8.
__device__ __forceinline__ void decode(const QuantizedMaps& maps, uint32_t codes, float scale, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = maps.nf4[codes >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15u] * scale;
}
__device__ __forceinline__ void decode(const QuantizedMaps&, uint2 codes, float scale, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const auto word = static_cast<int32_t>(i < 4 ? codes.x : codes.y);
    x[i] = static_cast<float>(word << (24 - 8 * (i % 4)) >> 24) * scale;
  }
}

// Count elements from `at` on, which are of one block; Count divides `at`.
template <DType dtype, int Count>
__device__ __forceinline__ void load_quantized(const QuantizedMaps& maps, const Quantized& q, int64_t at,
                                               float (&x)[Count]) {
  const float scale = scale_of<dtype>(maps, q, at / kQuantBlock);
  if constexpr (Count == 8) {
    using Codes = std::conditional_t<dtype == DType::nf4, uint32_t, uint2>;
    decode(maps, *reinterpret_cast<const Codes*>(q.codes + (dtype == DType::nf4 ? at / 2 : at)), scale, x);
  } else {
    static_assert(Count == 4 || Count == 1);
#pragma unroll
    for (int i = 0; i < Count; i++) {
      if constexpr (dtype == DType::nf4) {
        const uint32_t byte = q.codes[(at + i) / 2];
        x[i] = maps.nf4[(at + i) % 2 ? byte & 15u : byte >> 4] * scale;
      } else {
        x[i] = static_cast<float>(static_cast<int8_t>(q.codes[at + i])) * scale;
      }
    }
  }
}

}  // namespace rw::cuda
