// Quantised tensors (dtypes nf4 and int8, see quantize in ops.def), written once for both backends. Nothing but
// correctly rounded operations that no compiler fuses or reorders: cpu, cuda and simt give the same bits.
//
// A tensor's elements, in their order, are cut into blocks of 64. In one piece of memory, aligned to 16 bytes, lie
//   nf4   codes: 32 bytes a block, two elements a byte, the first one in the upper half
//         absmax: a byte a block, filled up to whole words
//         scales: an f32 for every group of 256 blocks, the largest distance of an absmax from the mean
//         mean: one f32
//   int8  codes: 64 bytes a block, one an element
//         scales: an f32 a block
#pragma once
#include "ops.h"

#ifdef RW_ISA
#define RW_DEVICE inline
#define RW_BOTH inline
namespace rw::cpu::RW_ISA {
#else
#define RW_DEVICE __device__ __forceinline__
#define RW_BOTH __host__ __device__ __forceinline__
namespace rw::cuda {
#endif

constexpr int64_t kQuantBlock = 64;   // elements
constexpr int64_t kScaleGroup = 256;  // blocks
constexpr int64_t kAbsmaxZero = 127;  // number of the value 0 in the map of absmax

struct Quantized {
  uint8_t *codes, *absmax;
  float *scales, *mean;
  int64_t blocks;
};

// Where the parts of a tensor lie.
RW_BOTH Quantized quantized(DType dtype, void* data, int64_t elements) {
  const int64_t blocks = (elements + kQuantBlock - 1) / kQuantBlock;
  auto* codes = static_cast<uint8_t*>(data);
  if (dtype == DType::int8) return {codes, nullptr, reinterpret_cast<float*>(codes + 64 * blocks), nullptr, blocks};
  uint8_t* absmax = codes + 32 * blocks;
  auto* scales = reinterpret_cast<float*>(absmax + (blocks + 3) / 4 * 4);
  return {codes, absmax, scales, scales + (blocks + kScaleGroup - 1) / kScaleGroup, blocks};
}

struct QuantizedMaps {
  float nf4[16];
  float absmax[256];
};

// The 16 values of arXiv 2305.14314, appendix E, and the dynamic map of arXiv 1511.04561 with both signs: 0, 1, and in
// each decade i of 0 .. 6 the values +-10^(i - 6) (0.1 + 0.9 (j + 0.5) / 2^i), j < 2^i, taken in f64.
constexpr QuantizedMaps make_quantized_maps() {
  QuantizedMaps maps = {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                         -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                         0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                         0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
                        {}};
  constexpr double kDecades[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1};
  for (int i = 0, at = 1; i < 7; i++)
    for (int j = 0; j < 1 << i; j++, at++) {
      const auto value = static_cast<float>(kDecades[i] * (0.1 + 0.9 * (j + 0.5) / (1 << i)));
      maps.absmax[kAbsmaxZero + at] = value;
      maps.absmax[kAbsmaxZero - at] = -value;
    }
  maps.absmax[255] = 1;
  return maps;
}
constexpr QuantizedMaps kQuantizedMaps = make_quantized_maps();

// Between two neighbours of a map the lower one is the nearest up to here.
RW_BOTH constexpr float halfway(float below, float above) { return (below + above) * 0.5f; }

// An absmax as it is kept, `value` that of its byte in the map. The product is rounded by itself.
RW_DEVICE float kept_absmax(float value, float scale, float mean) {
#ifdef RW_ISA
  const volatile float product = value * scale;  // else it would be fused with the addition
#else
  const float product = __fmul_rn(value, scale);
#endif
  return product + mean;
}
RW_DEVICE float kept_absmax(const float (&map)[256], const Quantized& q, int64_t block) {
  return kept_absmax(map[q.absmax[block]], q.scales[block / kScaleGroup], *q.mean);
}

// The byte of an absmax that is x times its group's scale away from the mean: the nearest, of two the lower one.
RW_DEVICE uint8_t nearest_absmax(const float (&map)[256], float x) {
  int low = 0, high = 255;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (x > halfway(map[middle], map[middle + 1]))
      low = middle + 1;
    else
      high = middle;
  }
  return static_cast<uint8_t>(low);
}

#ifdef RW_ISA
}  // namespace rw::cpu::RW_ISA
#else
}  // namespace rw::cuda
#endif
