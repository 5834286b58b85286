// States of 8 bits and the weights beside them, a run of elements at a time: several vectors, and every operation for
// all of them in turn. A chain of dependent operations is longer than what a processor looks ahead; so several chains
// go side by side. The bits are those that csrc/adamw.h defines; AVX-512 reaches them with fewer instructions.
#pragma once
#include "weights.h"

namespace rw::cpu::RW_ISA {

constexpr DynamicMap kSignedMap = dynamic_map(kSigned), kUnsignedMap = dynamic_map(kUnsigned);

#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 1;
#endif
constexpr int kRun = kVectors * VL;  // elements

struct Run {
  vf x[kVectors];
};

template <typename F>
inline Run each(F&& f) {
  Run y;
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) y.x[i] = f(i);
  return y;
}
inline Run operator+(const Run& a, const Run& b) {
  return each([&](int i) { return a.x[i] + b.x[i]; });
}
inline Run operator-(const Run& a, const Run& b) {
  return each([&](int i) { return a.x[i] - b.x[i]; });
}
inline Run operator*(const Run& a, const Run& b) {
  return each([&](int i) { return a.x[i] * b.x[i]; });
}
inline Run operator/(const Run& a, const Run& b) {
  return each([&](int i) { return a.x[i] / b.x[i]; });
}
inline Run operator*(const Run& a, float b) {
  return each([&](int i) { return a.x[i] * b; });
}
inline Run operator*(float a, const Run& b) { return b * a; }
inline Run operator+(const Run& a, float b) {
  return each([&](int i) { return a.x[i] + b; });
}
inline Run root(const Run& a) {
  return each([&](int i) { return root(a.x[i]); });
}

// ---- decoding -------------------------------------------------------------------------------------------------------

inline Run value_at(const DynamicMap& map, const Run& y) {
  const Run piece = each([&](int i) { return (vf)((vu)y.x[i] >> 23); });
  const Run slope = each([&](int i) { return lookup(map.slope, (vu)piece.x[i]); });
  return slope * y + each([&](int i) { return lookup(map.offset, (vu)piece.x[i]); });
}

// As decoded_m() and decoded_v().
struct Arithmetic {
  static Run m(const uint8_t* from, float scale) {
    const Run number = each([&](int i) {
      const vb index = load(from + i * VL) + static_cast<uint8_t>(127);
      return to_real((vi)widen(index)) - 127.0f;
    });
    const Run value = value_at(kSignedMap, each([&](int i) { return real_of(magnitude_bits(number.x[i])) + 0.5f; }));
    return each([&](int i) { return real_of(bits_of(value.x[i]) | (bits_of(number.x[i]) & 0x80000000u)); }) * scale;
  }
  static Run v(const uint8_t* from, float scale) {
    return value_at(kUnsignedMap, each([&](int i) { return to_real((vi)widen(load(from + i * VL))) + 1.5f; })) * scale;
  }
};

#if defined(__AVX512F__)

// All values of a map, from 0 on, one byte of them in each plane.
template <int values>
struct alignas(64) Planes {
  uint8_t byte[4][values];
};

template <int values>
constexpr Planes<values> planes_of(const DynamicMap& map, int lead) {
  Planes<values> planes = {};
  for (int k = 0; k < values; k++) {
    const float y = static_cast<float>(k) + (static_cast<float>(lead) - 0.5f);
    const uint32_t piece = __builtin_bit_cast(uint32_t, y) >> 23 & 7;
    const float product = map.slope[piece] * y, value = product + map.offset[piece];
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    for (int i = 0; i < 4; i++) planes.byte[i][k] = static_cast<uint8_t>(bits >> (8 * i));
  }
  return planes;
}
constexpr Planes<128> kSignedPlanes = planes_of<128>(kSignedMap, kSigned);
constexpr Planes<256> kUnsignedPlanes = planes_of<256>(kUnsignedMap, kUnsigned);

typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(64)));

#define RW_VBMI __attribute__((target("avx512vbmi")))

// The values as tables, for processors that permute bytes (AVX512_VBMI).
struct Tables {
  RW_VBMI static Run m(const uint8_t* from, float scale) {
    const __m512i index = in_planes(from), top = _mm512_set1_epi8(-128);
    // 128 is the value 1, of which bytes 2 and 3 are not 0; the table ends before it
    const __mmask64 one = _mm512_cmpeq_epi8_mask(index, top), minus = _mm512_movepi8_mask(index) & ~one;
    const __m512i number = _mm512_maskz_abs_epi8(~one, index);
    const __m512i upper = plane(kSignedPlanes.byte[2], number), last = plane(kSignedPlanes.byte[3], number);
    return joined(plane(kSignedPlanes.byte[0], number), plane(kSignedPlanes.byte[1], number),
                  _mm512_mask_mov_epi8(upper, one, top),
                  _mm512_mask_add_epi8(_mm512_mask_mov_epi8(last, one, _mm512_set1_epi8(0x3f)), minus, last, top)) *
           scale;
  }
  RW_VBMI static Run v(const uint8_t* from, float scale) {
    const __m512i index = in_planes(from);
    const __mmask64 upper = _mm512_movepi8_mask(index);
    const auto byte = [&](const uint8_t(&table)[256]) RW_VBMI {
      return _mm512_mask_blend_epi8(upper, plane(table, index), plane(table + 128, index));
    };
    return joined(byte(kUnsignedPlanes.byte[0]), byte(kUnsignedPlanes.byte[1]), byte(kUnsignedPlanes.byte[2]),
                  byte(kUnsignedPlanes.byte[3])) *
           scale;
  }

 private:
  // table[index % 128]
  RW_VBMI static __m512i plane(const uint8_t* table, __m512i index) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
  }
  // 64 bytes in the order that joined() undoes.
  RW_VBMI static __m512i in_planes(const uint8_t* from) {
    Bytes order;
    for (int i = 0; i < 64; i++) order[i] = static_cast<uint8_t>(i % 4 + 16 * (i / 4 % 4) + 4 * (i / 16));
    return _mm512_maskz_permutexvar_epi8(~__mmask64{}, (__m512i)order, _mm512_loadu_si512(from));
  }
  static Run joined(__m512i byte0, __m512i byte1, __m512i byte2, __m512i byte3) {
    const __m512i a = _mm512_unpacklo_epi8(byte0, byte1), b = _mm512_unpacklo_epi8(byte2, byte3);
    const __m512i c = _mm512_unpackhi_epi8(byte0, byte1), d = _mm512_unpackhi_epi8(byte2, byte3);
    return {{(vf)_mm512_unpacklo_epi16(a, b), (vf)_mm512_unpackhi_epi16(a, b), (vf)_mm512_unpacklo_epi16(c, d),
             (vf)_mm512_unpackhi_epi16(c, d)}};
  }
};

// ---- encoding with AVX-512 ------------------------------------------------------------------------------------------

constexpr OctaveMap kSignedOctaves = octave_map(kSignedMap, kSigned);
constexpr OctaveMap kUnsignedOctaves = octave_map(kUnsignedMap, kUnsigned);

template <typename T>
inline Run lookup32(const T (&table)[32], const Run& index) {
  const __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16);
  return each([&](int i) { return (vf)_mm512_maskz_permutex2var_ps(0xffff, low, (__m512i)index.x[i], high); });
}

// The y whose whole part nearest() takes, of x from 2^-24 to 1, or of 0.
inline Run nearest_y(const OctaveMap& map, const Run& x) {
  const Run octave = each([&](int i) { return (vf)(bits_of(x.x[i]) >> 23); });
  const Run carry = lookup32(map.carry, octave);
  const Run piece = each([&](int i) { return (vf)((bits_of(x.x[i]) + bits_of(carry.x[i])) >> 23); });
  const Run y = x * lookup32(map.rise, piece) + lookup32(map.shift, piece), last = lookup32(map.last, piece);
  return each([&](int i) { return min(y.x[i], last.x[i]); });
}

inline __m512i whole(vf y) { return _mm512_maskz_cvttps_epi32(0xffff, (__m512)y); }

// Four vectors that packing has left in turn, 128 bits of each, one after the other.
inline void store_packed(uint8_t* to, __m512i packed) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi32(0xffff, order, packed));
}

inline void encode_m(uint8_t* to, const StateScale& s, const Run& m) {
  const Run scaled = m * s.inverse;
  const Run x = each([&](int i) {  // the magnitude, 2^-24 at least
    return (vf)_mm512_maskz_range_ps(0xffff, (__m512)scaled.x[i], _mm512_set1_ps(0x1p-24f), 0b1011);
  });
  const Run y = nearest_y(kSignedOctaves, x);
  // Negated: saturation leaves 1 as it is (-128), and gives -1 (128) the last value there is.
  const Run turned = each([&](int i) { return real_of(bits_of(y.x[i]) | (~bits_of(m.x[i]) & 0x80000000u)); });
  const __m512i low = _mm512_packs_epi32(whole(turned.x[0]), whole(turned.x[1]));
  const __m512i high = _mm512_packs_epi32(whole(turned.x[2]), whole(turned.x[3]));
  store_packed(to, _mm512_sub_epi8(_mm512_setzero_si512(), _mm512_packs_epi16(low, high)));
}

inline void encode_v(uint8_t* to, const StateScale& s, const Run& v) {
  const Run scaled = v * s.inverse;
  const Run x = each([&](int i) {  // where v is not 0 at least 2^-22, which is nearest to the smallest value
    const __mmask16 some = _mm512_test_epi32_mask((__m512i)v.x[i], (__m512i)v.x[i]);
    return (vf)_mm512_maskz_max_ps(some, (__m512)scaled.x[i], _mm512_set1_ps(0x1p-22f));
  });
  const Run y = nearest_y(kUnsignedOctaves, x);
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i low = _mm512_sub_epi16(_mm512_packus_epi32(whole(y.x[0]), whole(y.x[1])), one);
  const __m512i high = _mm512_sub_epi16(_mm512_packus_epi32(whole(y.x[2]), whole(y.x[3])), one);
  store_packed(to, _mm512_packus_epi16(low, high));
}

// ---- weights and gradients with AVX-512 -----------------------------------------------------------------------------

// 16-bit words of 32 elements to floats, those of `lower` below those of `upper`; half 0 or 1 of them.
inline vf interleaved(__m512i lower, __m512i upper, int half) {
  Words index;
  for (int i = 0; i < 32; i++) index[i] = static_cast<uint16_t>(16 * half + i / 2 + 32 * (i % 2));
  return (vf)_mm512_permutex2var_epi16(lower, (__m512i)index, upper);
}
// The lower (0) or upper (1) words of 32 elements.
inline void store_words(uint16_t* to, const vu* bits, int half) {
  Words index;
  for (int i = 0; i < 32; i++) index[i] = static_cast<uint16_t>(2 * i + half);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)bits[0], (__m512i)index, (__m512i)bits[1]));
}

inline Run load_run(const bf16* p) {
  return each([&](int i) { return interleaved(__m512i{}, _mm512_loadu_si512(p + i / 2 * 2 * VL), i % 2); });
}

// master_of() of each.
inline Run load_masters(const uint16_t* upper, const uint16_t* low) {
  return each([&](int i) {
    const __m512i below = _mm512_loadu_si512(low + i / 2 * 2 * VL);
    const __m512i above = _mm512_loadu_si512(upper + i / 2 * 2 * VL);
    return interleaved(below, _mm512_add_epi16(above, _mm512_srai_epi16(below, 15)), i % 2);
  });
}

inline bool any_nan(const Run& x) {
  return _mm512_cmp_ps_mask((__m512)x.x[0], (__m512)x.x[1], _CMP_UNORD_Q) |
         _mm512_cmp_ps_mask((__m512)x.x[2], (__m512)x.x[3], _CMP_UNORD_Q);
}

// upper_half(random_bits()) of each, with one XOR less: what is XORed in first may as well come after the shift.
inline void random_halves(const Stream& stream, int64_t element, vu* random) {
  constexpr uint32_t kUpper = static_cast<uint32_t>(kGolden >> 32);
  const uint32_t first = static_cast<uint32_t>(element), high = static_cast<uint32_t>(element >> 32);
  if (__builtin_expect(first > 0xffffffffu - (kRun - 1), 0)) {  // numbers with different upper halves
    for (int i = 0; i < kVectors; i++) random[i] = upper_half(random_bits(stream, element + i * VL));
    return;
  }
  const vu number = count_from(first), salt = vu{} + (stream.salt + high * kUpper);
  const uint32_t spread = stream.spread ^ (stream.spread >> 16);
  const Run mixed_once = each([&](int i) {
    const vu x = number + static_cast<uint32_t>(i * VL);
    return (vf)((x ^ (x >> 16) ^ spread) * 0x7feb352du + salt);
  });
  for (int i = 0; i < kVectors; i++) {
    const vu x = (vu)mixed_once.x[i];
    random[i] = upper_half((x ^ (x >> 15)) * 0x846ca68bu);
  }
}

template <Keep keep>
inline Run load_weights(const adamw_8bit_args& a, int64_t at) {
  if constexpr (keep == Keep::low) return load_masters(a.p.as<uint16_t>() + at, a.low.as<uint16_t>() + at);
  if constexpr (keep == Keep::stochastic) return load_run(a.p.as<bf16>() + at);
  const auto load_all = [](const auto* p) { return load(p); };
  return each([&](int i) { return load_weight<keep>(a, at + i * VL, load_all); });
}

template <Keep keep>
inline void store_weights(const adamw_8bit_args& a, int64_t at, const Run& weight, const Noise& noise) {
  const int64_t number = static_cast<int64_t>(a.first);
  if constexpr (keep == Keep::f32 || keep == Keep::master) {
    const auto store_all = [](auto* p, auto x) { store(p, x); };
    for (int i = 0; i < kVectors; i++) store_weight<keep>(a, at + i * VL, weight.x[i], noise, number, store_all);
  } else {
    vu bits[kVectors], above[kVectors] = {};
    for (int i = 0; i < kVectors; i++) bits[i] = bits_of(weight.x[i]);
    if (__builtin_expect(any_nan(weight), 0))
      for (int i = 0; i < kVectors; i++) bits[i] = sound_bits(weight.x[i]);
    if constexpr (keep == Keep::low)
      for (vu& x : above) x = vu{} + 0x8000u;  // as upper_of()
    else
      random_halves(noise.weights, number + at, above);
    for (int i = 0; i < kVectors; i++) above[i] += bits[i];
    for (int i = 0; i < kVectors; i += 2) {
      if constexpr (keep == Keep::low) store_words(a.low.as<uint16_t>() + at + i * VL, bits + i, 0);
      store_words(a.p.as<uint16_t>() + at + i * VL, above + i, 1);
    }
  }
}

#else

inline void encode_m(uint8_t* to, const StateScale& s, const Run& m) {
  for (int i = 0; i < kVectors; i++) store(to + i * VL, encoded_m(kSignedMap, s, m.x[i]));
}
inline void encode_v(uint8_t* to, const StateScale& s, const Run& v) {
  for (int i = 0; i < kVectors; i++) store(to + i * VL, encoded_v(kUnsignedMap, s, v.x[i]));
}
inline Run load_run(const bf16* p) {
  return each([&](int i) { return load(p + i * VL); });
}
template <Keep keep>
inline Run load_weights(const adamw_8bit_args& a, int64_t at) {
  const auto load_all = [](const auto* p) { return load(p); };
  return each([&](int i) { return load_weight<keep>(a, at + i * VL, load_all); });
}
template <Keep keep>
inline void store_weights(const adamw_8bit_args& a, int64_t at, const Run& weight, const Noise& noise) {
  const auto store_all = [](auto* p, auto x) { store(p, x); };
  for (int i = 0; i < kVectors; i++)
    store_weight<keep>(a, at + i * VL, weight.x[i], noise, static_cast<int64_t>(a.first), store_all);
}

#endif

inline Run load_run(const float* p) {
  return each([&](int i) { return load(p + i * VL); });
}

}  // namespace rw::cpu::RW_ISA
