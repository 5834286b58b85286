// What an AdamW step computes, written once: for the floats of a GPU's thread and for the vectors of the CPU. Nothing
// but correctly rounded operations in a fixed order, and the files that include it are compiled without contraction to
// fused ones (CMakeLists.txt), so that cpu, cuda and simt give the same bits, those of stochastic rounding included.
//
// Below, Real is a float or a vector of them, Bits and Whole are unsigned and signed integers of the same shape.
#pragma once
#include "ops.h"

#ifdef RW_ISA

#define RW_STEP inline
#define RW_MAP

namespace rw::cpu::RW_ISA {

using Real = vf;
using Bits = vu;
using Whole = vi;

RW_STEP Bits bits_of(Real x) { return (vu)x; }
RW_STEP Real real_of(Bits x) { return (vf)x; }
RW_STEP Real to_real(Whole x) { return __builtin_convertvector(x, vf); }
RW_STEP Whole to_whole(Real x) { return __builtin_convertvector(x, vi); }  // towards zero
RW_STEP Bits only_where(vi mask, uint32_t x) { return (vu)mask & x; }      // else 0
RW_STEP Bits next_where(vi mask, Bits x) { return x - (vu)mask; }          // x + 1, else x
RW_STEP Real least(Real a, Real b) { return min(a, b); }                   // b where one is NaN
// octave 77, octave < 851: 16 bits hold it.
RW_STEP Bits times_77(Bits octave) {
  typedef uint16_t Words __attribute__((vector_size(RW_VECTOR_BYTES)));
  return (Bits)((Words)octave * static_cast<uint16_t>(77));
}
RW_STEP Real root(Real x) {
  for (int64_t i = 0; i < VL; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
// first, first + 1, ...
RW_STEP Bits count_from(uint32_t first) {
  vu lanes;
  for (int64_t i = 0; i < VL; i++) lanes[i] = static_cast<uint32_t>(i);
  return lanes + first;
}
RW_STEP Real lookup(const float (&table)[8], Bits index) { return lookup8(table, index); }
RW_STEP float root_of(float x) { return __builtin_sqrtf(x); }
RW_STEP uint32_t bits_of_one(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
RW_STEP float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

#else

#define RW_STEP __device__ __forceinline__
#define RW_MAP __host__ __device__

namespace rw::cuda {

using Real = float;
using Bits = uint32_t;
using Whole = int32_t;

RW_STEP Bits bits_of(Real x) { return __float_as_uint(x); }
RW_STEP Real real_of(Bits x) { return __uint_as_float(x); }
RW_STEP Real to_real(Whole x) { return static_cast<float>(x); }
RW_STEP Whole to_whole(Real x) { return static_cast<int32_t>(x); }       // towards zero
RW_STEP Bits only_where(bool mask, uint32_t x) { return mask ? x : 0; }  // else 0
RW_STEP Bits next_where(bool mask, Bits x) { return x + mask; }          // x + 1, else x
RW_STEP Real least(Real a, Real b) { return a < b ? a : b; }             // b where one is NaN
RW_STEP Bits times_77(Bits octave) { return octave * 77u; }
RW_STEP Real root(Real x) { return sqrtf(x); }
RW_STEP Bits count_from(uint32_t first) { return first; }
RW_STEP Real lookup(const float (&table)[8], Bits index) { return table[index & 7]; }
RW_STEP float root_of(float x) { return sqrtf(x); }
RW_STEP uint32_t bits_of_one(float x) { return __float_as_uint(x); }
RW_STEP float float_of(uint32_t bits) { return __uint_as_float(bits); }

#endif

// ---- the step -------------------------------------------------------------------------------------------------------

enum Hyper { kRate, kCorrection1, kCorrection2, kMaxNorm, kScale, kNorm, kApply, kStep };

// What a row of the table says, as the kernels need it.
struct AdamWSettings {
  double weight_decay;
  float beta2, eps, rest1, rest2;  // rest = 1 - beta, taken in f64: 1 - 0.999f is off by 1.3e-5 of itself
  int64_t seed, first;
};

template <typename Args>
AdamWSettings adamw_settings(const Args& args) {
  return {args.weight_decay,
          static_cast<float>(args.beta2),
          static_cast<float>(args.eps),
          static_cast<float>(1.0 - args.beta1),
          static_cast<float>(1.0 - args.beta2),
          static_cast<int64_t>(args.seed),
          static_cast<int64_t>(args.first)};
}

struct AdamWStep {
  float scale, keep, step, inverse_root, beta2, eps, rest1, rest2;
};

RW_STEP AdamWStep adamw_step(const AdamWSettings& s, const float* hyper) {
  return {hyper[kScale],
          static_cast<float>(1.0 - hyper[kRate] * s.weight_decay),
          hyper[kRate] / hyper[kCorrection1],
          1.0f / root_of(hyper[kCorrection2]),
          s.beta2,
          s.eps,
          s.rest1,
          s.rest2};
}

// Real: also several vectors of the CPU.
template <typename Real>
RW_STEP void update(const AdamWStep& s, Real gradient, Real& weight, Real& m, Real& v) {
  const Real g = gradient * s.scale;
  m = m + s.rest1 * (g - m);
  v = s.beta2 * v + s.rest2 * (g * g);
  weight = weight * s.keep - s.step * (m / (root(v) * s.inverse_root + s.eps));
}

// ---- rounding to 16 bits --------------------------------------------------------------------------------------------

// How weights are kept: in f32, in bf16 with f32 masters, with the masters' lower 16 bits, or in bf16 alone.
enum class Keep { f32, master, low, stochastic };

constexpr uint32_t kNaN = 0x7fc00000u;

// The bits of x, those of any NaN replaced: with others, what is added below would turn it into a number.
RW_STEP Bits sound_bits(Real x) {
  const Bits bits = bits_of(x);
  return x != x ? Bits{} + kNaN : bits;
}

// The upper 16 of 32 bits, rounded half away from zero: the master is then (upper << 16) + low as a signed number.
RW_STEP Bits upper_of(Bits master) { return (master + 0x8000u) >> 16; }
RW_STEP Bits master_of(Bits upper, Bits low) { return (upper << 16) + (low ^ 0x8000u) - 0x8000u; }

// Of 16 random bits: to the next larger magnitude with the probability that unbiased rounding needs. Infinity stays.
RW_STEP Bits round_stochastically(Real x, Bits random) { return (sound_bits(x) + random) >> 16; }

// ---- random bits ----------------------------------------------------------------------------------------------------
// A hash of two rounds (multipliers of C. Wellons' lowbias32) over the number of the element, keyed twice: `spread` is
// XORed in first, `salt` is added between the rounds, so that no two streams are permutations of one sequence. The keys
// are made from seed, step and the use of the bits by the finalizer of splitmix64 (D. Stafford's mix 13).

struct Stream {
  uint32_t spread, salt;
};
// 16 bits an element each: the weights' from the upper half of their stream, m and v share the other one.
struct Noise {
  Stream weights, moments;
};

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

RW_STEP uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

RW_STEP Stream stream_of(uint64_t key) { return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}; }

RW_STEP Noise noise_of(int64_t seed, float step) {
  const uint64_t key = mixed(static_cast<uint64_t>(seed) + kGolden) + bits_of_one(step) * kGolden;
  return {stream_of(mixed(key)), stream_of(mixed(key + 1))};
}

// 32 bits for the element of this number, and for those behind it in the lanes of a vector. The lower 16 are random
// only as lower_half() gives them.
RW_STEP Bits random_bits(const Stream& stream, int64_t element) {
  constexpr uint32_t kUpper = static_cast<uint32_t>(kGolden >> 32);
  const uint32_t low = static_cast<uint32_t>(element), high = static_cast<uint32_t>(element >> 32);
  const Bits number = count_from(low);
  const Bits wrapped = only_where(number < low, kUpper);  // lanes whose number has the next upper half
  Bits x = number ^ stream.spread;
  x = (x ^ (x >> 16)) * 0x7feb352du + (stream.salt + high * kUpper + wrapped);
  return (x ^ (x >> 15)) * 0x846ca68bu;
}
RW_STEP Bits upper_half(Bits random) { return random >> 16; }
RW_STEP Bits lower_half(Bits random) { return (random ^ (random >> 16)) & 0xffffu; }

// ---- states of 8 bits -----------------------------------------------------------------------------------------------
// The dynamic map (T. Dettmers, arXiv 1511.04561, 2110.02861; bitsandbytes' create_dynamic_map) without a table of its
// 256 values. Decade i of 0 .. 6 has n = lead 2^i of them, 10^(i - 6) (0.1 + 0.9 (j + 0.5) / n), j < n; lead is 2 in
// the unsigned map, 1 for each sign of the signed one. The k-th value from 0 on is known by y = k + lead - 0.5: that is
// n + j
// + 0.5 in decade i, so that the exponent of y tells the decade, and the value is linear in y there. The values 0 and 1
// have exponents of y that differ by 8, and lie on a line, too: eight pieces are all there is, by the exponent
// modulo 8.

constexpr int kStateBlock = 256;  // elements that share a scale

struct DynamicMap {
  float slope[8], offset[8];  // value = slope y + offset
  float rise[8], shift[8];    // y = rise value + shift
  float last[8];              // y below the next piece's
  float end[8];               // from this value on the next piece is nearer
};

// Powers of ten and linear steps in f64, rounded once.
RW_MAP constexpr DynamicMap dynamic_map(int lead) {
  DynamicMap map = {};
  double ten = 1e-6, n = lead, below = 0;  // `below`: the last value of the piece before
  for (int i = 0; i < 7; i++, ten *= 10, n *= 2) {
    const int piece = (127 + i + lead - 1) & 7;
    map.slope[piece] = static_cast<float>(0.9 * ten / n);
    map.offset[piece] = static_cast<float>(-0.8 * ten);
    map.rise[piece] = static_cast<float>(n / (0.9 * ten));
    map.shift[piece] = static_cast<float>(n * 0.8 / 0.9);
    map.last[piece] = static_cast<float>(2 * n - 0.5);
    map.end[(piece + 7) & 7] = static_cast<float>((below + ten * (0.1 + 0.45 / n)) / 2);
    below = ten * (1 - 0.45 / n);
  }
  const int ends = (126 + lead - 1) & 7;
  const float values = lead == 1 ? 128.0f : 255.0f, zero = lead - 0.5f;
  map.slope[ends] = 1 / values;
  map.offset[ends] = -(zero * map.slope[ends]);
  map.rise[ends] = values;
  map.shift[ends] = zero;
  map.last[ends] = values + zero;
  map.end[(ends + 7) & 7] = static_cast<float>((below + 1) / 2);
  return map;
}

constexpr int kSigned = 1, kUnsigned = 2;

// The same by the octave of x, its exponent modulo 32, for machines that look up 32 numbers as easily. The end of a
// piece lies within an octave: `carry`, added to the bits of x, is what brings those from the end on into the next
// octave, where the next piece holds already. The entry of octave 0 is that of x = 0.
struct OctaveMap {
  uint32_t carry[32];
  float rise[32], shift[32], last[32];
};

constexpr int kFirstOctave = 103, kLastOctave = 127;  // of 2^-24, where all is 0, and of 1

RW_MAP constexpr OctaveMap octave_map(const DynamicMap& map, int lead) {
  OctaveMap of = {};
  float start = 0x1p-24f;
  for (int octave = kFirstOctave; octave <= kLastOctave; octave++, start *= 2) {
    int piece = (octave * 77 + 24386 + 256 * (lead - 1)) >> 8 & 7;  // as nearest() has it
    bool ends = map.end[piece] < 2 * start;
    if (ends && map.end[piece] <= start && octave > kFirstOctave) {
      piece = (piece + 1) & 7;
      ends = false;
    }
    const int at = octave % 32;
    if (ends) of.carry[at] = static_cast<uint32_t>((2 * start - map.end[piece]) / start * 0x1p23f);
    of.rise[at] = map.rise[piece];
    of.shift[at] = map.shift[piece];
    of.last[at] = map.last[piece];
  }
  of.shift[0] = of.last[0] = static_cast<float>(lead) - 0.5f;
  return of;
}

// The value of the map at y.
RW_STEP Real value_at(const DynamicMap& map, Real y) {
  const Bits piece = bits_of(y) >> 23;
  return lookup(map.slope, piece) * y + lookup(map.offset, piece);
}

// The number, from 0 on, of the map's value that is nearest to x of 0 .. 1.
template <int lead>
RW_STEP Whole nearest(const DynamicMap& map, Real x) {
  // The piece of x or the one before it: a decade has 3.32 octaves. 103 is the exponent of 2^-24, where all is 0.
  const Bits octave = bits_of(x) >> 23, first = Bits{} + 103u;
  Bits piece = (times_77(octave > first ? octave : first) + (24386u + 256u * (lead - 1))) >> 8;
  piece = next_where(x >= lookup(map.end, piece), piece);
  // Between the last value of a decade and the end of its piece, y belongs to the next one already.
  const Real y = least(x * lookup(map.rise, piece) + lookup(map.shift, piece), lookup(map.last, piece));
  return to_whole(y) - (lead - 1);
}

// The scale of a block and its reciprocal.
struct StateScale {
  float scale, inverse;
  float lift;  // what makes the reciprocal of a tiny scale finite
  bool odd;    // the states need tame() before they are encoded
};

// Of the largest magnitude's bits. Infinity becomes the largest number; NaN stays, and makes all of the block NaN.
RW_STEP StateScale state_scale(uint32_t largest) {
  const float scale = float_of(largest > 0x7f800000u ? kNaN : largest == 0x7f800000u ? 0x7f7fffffu : largest);
  const float lift = scale < 0x1p-100f ? 0x1p100f : 1.0f;
  return {scale, scale > 0.0f ? 1.0f / (scale * lift) : 0.0f, lift, largest >= 0x7f800000u || lift > 1.0f};
}

// A state as its scale expects it: no infinity, no NaN, lifted.
RW_STEP Real tame(const StateScale& s, Real x) {
  const bool number = s.inverse > 0.0f;  // else all is 0, or NaN
  const Bits sign = bits_of(x) & (number ? 0x80000000u : 0u);
  const Real most = Real{} + (number ? s.scale * s.lift : 0.0f);
  return real_of(bits_of(least(real_of(bits_of(x) & 0x7fffffffu) * s.lift, most)) | sign);
}

RW_STEP Bits magnitude_bits(Real x) { return bits_of(x) & 0x7fffffffu; }

// `index` is that of the sorted map, the byte + 127 modulo 256.
RW_STEP Real decoded_m(const DynamicMap& map, float scale, Bits index) {
  const Real number = to_real((Whole)index) - 127.0f;
  const Real value = value_at(map, real_of(magnitude_bits(number)) + 0.5f);
  return real_of(bits_of(value) | (bits_of(number) & 0x80000000u)) * scale;
}

RW_STEP Real decoded_v(const DynamicMap& map, float scale, Bits byte) {
  return value_at(map, to_real((Whole)byte) + 1.5f) * scale;
}

// Of the result the lower 8 bits count.
RW_STEP Bits encoded_m(const DynamicMap& map, const StateScale& s, Real m) {
  const Whole number = nearest<kSigned>(map, real_of(magnitude_bits(m)) * s.inverse);
  const Whole negative = (Whole)bits_of(m) >> 31;  // -1 or 0
  const Whole most = negative + 128;               // there is no -1
  return (Bits)(((number < most ? number : most) ^ negative) - negative);
}

RW_STEP Bits encoded_v(const DynamicMap& map, const StateScale& s, Real v) {
  const Bits number = (Bits)nearest<kUnsigned>(map, v * s.inverse);
  const Bits one = Bits{} + 1u, bits = bits_of(v);
  const Bits fewest = bits < one ? bits : one;  // not 0 as the divisor of an m that is not 0
  return number > fewest ? number : fewest;
}

#ifdef RW_ISA
}  // namespace rw::cpu::RW_ISA
#else
}  // namespace rw::cuda
#endif
