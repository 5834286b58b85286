// Quantised elements as floats, for the kernels that read them.
#pragma once
#include "cpu.h"
#include "simd.h"

#include "../quantized.h"

namespace rw::cpu::RW_ISA {

namespace {

// Of the elements in a word of nf4 and, for vectors of four, in its second half.
constexpr uint32_t kShifts[24] = {4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24};

// All elements of a block, each a code times the block's scale.
inline void dequantize_block(DType dtype, const Quantized& q, int64_t block, float* to) {
  if (dtype == DType::int8) {
    const uint8_t* codes = q.codes + block * kQuantBlock;
    for (int64_t i = 0; i < kQuantBlock; i += VL) {
      const vi code = (vi)(widen(load(codes + i)) << 24) >> 24;
      store(to + i, __builtin_convertvector(code, vf) * q.scales[block]);
    }
    return;
  }
  const float scale = kept_absmax(kQuantizedMaps.absmax, q, block);
  uint32_t words[kQuantBlock / 8];
  memcpy(words, q.codes + block * kQuantBlock / 2, sizeof(words));
  for (int64_t i = 0; i < kQuantBlock; i += VL) {
    vu word, shift;
    for (int64_t lane = 0; lane < VL; lane++) word[lane] = words[(i + lane) / 8];
    memcpy(&shift, kShifts + i % 8, sizeof(shift));
    store(to + i, lookup16(kQuantizedMaps.nf4, word >> shift & 15u) * scale);
  }
}

// `count` elements from `at` on, rounded to bf16 where `dtype` (of the result) is that.
inline void dequantize_run(DType from, const Quantized& q, int64_t at, int64_t count, DType dtype, float* to) {
  for (int64_t end = at + count; at < end;) {
    const int64_t block = at / kQuantBlock, first = at % kQuantBlock;
    const int64_t left = end - at, part = left < kQuantBlock - first ? left : kQuantBlock - first;
    float values[kQuantBlock];
    float* whole = part == kQuantBlock ? to : values;
    dequantize_block(from, q, block, whole);
    if (dtype == DType::bf16)
      for (int64_t i = 0; i < kQuantBlock; i += VL) {
        bf16 rounded[VL];
        store(rounded, load(whole + i));
        store(whole + i, load(rounded));
      }
    if (whole == values) memcpy(to, values + first, static_cast<size_t>(part) * sizeof(float));
    at += part;
    to += part;
  }
}

}  // namespace
}  // namespace rw::cpu::RW_ISA
