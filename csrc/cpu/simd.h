// Vectors as wide as the instruction set of this compilation, in the compiler's own vector types: the same source gives
// SSE2 or NEON (4 floats), AVX2 (8) and AVX-512 (16). Multiplications and additions contract to fused ones where the
// instruction set has them (-ffp-contract=fast).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define RW_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define RW_VECTOR_BYTES 32
#else
#define RW_VECTOR_BYTES 16
#endif

namespace rw::cpu::RW_ISA {

constexpr int64_t VL = RW_VECTOR_BYTES / 4;  // floats in a vector

typedef float vf __attribute__((vector_size(RW_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(RW_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(RW_VECTOR_BYTES)));
typedef uint8_t vb __attribute__((vector_size(RW_VECTOR_BYTES / 4)));
typedef uint16_t vh __attribute__((vector_size(RW_VECTOR_BYTES / 2)));
typedef float vf_unaligned __attribute__((vector_size(RW_VECTOR_BYTES), aligned(4), may_alias));
typedef uint8_t vb_unaligned __attribute__((vector_size(RW_VECTOR_BYTES / 4), aligned(1), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(RW_VECTOR_BYTES / 2), aligned(2), may_alias));

// bf16 is stored as the upper half of an f32.
struct bf16 {
  uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }  // the addition of zero would turn -0 into 0

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(bf16* p, float x) { *p = to_bf16(x); }

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
// Integers of other widths. GCC 12 takes several instructions where AVX-512 has one, and converts a factor of four lane
// by lane unless it is done in two steps. Masks of all ones: the plain forms make it warn of undefined lanes.
#if defined(__AVX512F__)
inline vu widen(vh x) { return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x); }
inline vu widen(vb x) { return (vu)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)x); }
inline vh narrow_to_half(vu x) { return (vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x); }
inline vb narrow_to_byte(vu x) { return (vb)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x); }
#else
inline vu widen(vh x) { return __builtin_convertvector(x, vu); }
inline vu widen(vb x) { return widen(__builtin_convertvector(x, vh)); }
inline vh narrow_to_half(vu x) { return __builtin_convertvector(x, vh); }
inline vb narrow_to_byte(vu x) { return __builtin_convertvector(narrow_to_half(x), vb); }
#endif

inline vf load(const bf16* p) { return (vf)(widen(*reinterpret_cast<const vh_unaligned*>(p)) << 16); }
inline vu load(const uint16_t* p) { return widen(*reinterpret_cast<const vh_unaligned*>(p)); }
inline vb load(const uint8_t* p) { return *reinterpret_cast<const vb_unaligned*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
inline void store(bf16* p, vf x) {
  vu bits = (vu)x;
  vu rounded = bits + 0x7fffu + ((bits >> 16) & 1);
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  vu chosen = (vu)_mm512_mask_or_epi32((__m512i)rounded, nan, (__m512i)bits, _mm512_set1_epi32(0x400000));
#else
  vu nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
  vu chosen = (nan & (bits | 0x400000u)) | (~nan & rounded);
#endif
  *reinterpret_cast<vh_unaligned*>(p) = narrow_to_half(chosen >> 16);
}

// The lower bits of each.
inline void store(uint16_t* p, vu x) { *reinterpret_cast<vh_unaligned*>(p) = narrow_to_half(x); }
inline void store(uint8_t* p, vu x) { *reinterpret_cast<vb_unaligned*>(p) = narrow_to_byte(x); }

// The smaller one, b where one of them is NaN.
inline vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// table[index % 8].
inline vf lookup8(const float (&table)[8], vu index) {
#if defined(__AVX512F__)
  // masked with all ones: the plain forms make GCC 12 warn of undefined lanes
  const __m512 twice = _mm512_maskz_broadcast_f32x8(0xffff, _mm256_loadu_ps(table));
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, twice);
#elif defined(__AVX2__)
  return (vf)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
#else
  vf x;
  for (int64_t i = 0; i < VL; i++) x[i] = table[index[i] % 8];
  return x;
#endif
}

// table[index], index < 16.
inline vf lookup16(const float (&table)[16], vu index) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
  return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
  vf x;
  for (int64_t i = 0; i < VL; i++) x[i] = table[index[i]];
  return x;
#endif
}

// Sum of the lanes, always in the same order.
inline float sum(vf x) {
  float lane[VL];
  memcpy(lane, &x, sizeof(lane));
  for (int64_t width = VL / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}

inline vf max(vf a, vf b) { return a > b ? a : b; }

// e^x to within 1.5 units in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 7 for e^r, and
// n added to the exponent. Below -87.3 the result is 0 (never a denormal), above 88.7 it is infinite, NaN stays NaN.
inline vf exp(vf x) {
  vf shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to nearest in the low bits
  vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  vf result = (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  // 2^n in two factors, so that results up to the largest float are reached
  vi exponent = (vi)shifted - 0x4b400000, half = exponent >> 1;
  vf result = p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
#endif
  result = x < -87.33654f ? vf{} : result;
  result = x > 88.72283f ? splat(__builtin_inff()) : result;
  return x != x ? x : result;
}

}  // namespace rw::cpu::RW_ISA
