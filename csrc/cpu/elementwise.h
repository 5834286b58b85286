// One loop for the ops that treat flat tensors element by element: blocks of kBlock elements are tasks, whole vectors
// first, then the tail through a padded copy, so that a body is written once, for vectors.
#pragma once
#include "cpu.h"
#include "simd.h"

namespace rw::cpu::RW_ISA {

constexpr int64_t kBlock = 16384;  // 64 KB of f32: long enough to hide the hand-out of tasks, short enough for balance

// A lane-wise view of `count` <= VL elements at p, for tails.
template <typename T>
inline vf load_some(const T* p, int64_t count) {
  float lane[VL] = {};
  for (int64_t i = 0; i < count; i++) lane[i] = to_float(p[i]);
  return load(lane);
}
inline vu load_some(const uint16_t* p, int64_t count) {
  vu x = {};
  for (int64_t i = 0; i < count; i++) x[i] = p[i];
  return x;
}
template <typename T>
inline void store_some(T* p, vf x, int64_t count) {
  float lane[VL];
  store(lane, x);
  for (int64_t i = 0; i < count; i++) store_one(p + i, lane[i]);
}
inline void store_some(uint16_t* p, vu x, int64_t count) {
  for (int64_t i = 0; i < count; i++) p[i] = static_cast<uint16_t>(x[i]);
}

// body(at, load, store): `load(pointer)` and `store(pointer, vector)` touch only what exists.
template <typename Body>
inline void for_each_vector(Context& context, int64_t size, Body&& body) {
  parallel(context, (size + kBlock - 1) / kBlock, [&](int64_t task, int) {
    const int64_t end = task * kBlock + kBlock < size ? task * kBlock + kBlock : size;
    int64_t at = task * kBlock;
    for (; at + VL <= end; at += VL)
      body(
          at, [](const auto* p) { return load(p); }, [](auto* p, auto x) { store(p, x); });
    const int64_t rest = end - at;
    if (rest > 0)
      body(
          at, [rest](const auto* p) { return load_some(p, rest); },
          [rest](auto* p, auto x) { store_some(p, x, rest); });
  });
}

}  // namespace rw::cpu::RW_ISA
