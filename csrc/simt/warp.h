// What the lanes of a warp do together: shuffles, votes, and the matrix instructions of ptx.h. Each is a rendezvous: a
// lane waits until all lanes of the mask are there, the last one computes for all. None but __syncwarp orders accesses
// to memory.
#pragma once
#include <cstring>
#include <type_traits>

#include "simt.h"

namespace simt {

// Waits for the lanes of `mask`, then runs compute(slots, mask) once, slots[lane] being what each lane gave. All must
// give the same `compute`. `site`: the kernel's address in messages, the caller's own if null; `together`: all lanes
// must come from the same place in the source.
using Compute = void (*)(void* const* slots, uint32_t mask);
void collective(uint32_t mask, const char* what, void* slot, Compute compute, const void* site = nullptr,
                bool together = false);

int lane();

struct Exchange {
  uint64_t value, result;
  int source;  // lane to take the value of
};
void exchange(void* const* slots, uint32_t mask);

template <typename T>
__forceinline__ T shuffle(uint32_t mask, const char* what, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "shuffles move 32 or 64 bits");
  Exchange own = {0, 0, source};
  memcpy(&own.value, &value, sizeof(T));
  collective(mask, what, &own, exchange);
  T result;
  memcpy(&result, &own.result, sizeof(T));
  return result;
}

void ldmatrix(uint32_t* r, int count, const void* row, bool transposed);
void mma_16x8x16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
uint32_t movmatrix_trans(uint32_t x);

// Among some warps of the block.
void named_barrier(int id, int threads);
void named_barrier_arrive(int id, int threads);  // does not wait

}  // namespace simt

template <typename T>
__forceinline__ T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int lane = simt::lane();
  return simt::shuffle(mask, "__shfl_sync", value, (lane & ~(width - 1)) | (source & (width - 1)));
}

template <typename T>
__forceinline__ T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32) {
  const int lane = simt::lane(), source = lane ^ lane_mask;
  return simt::shuffle(mask, "__shfl_xor_sync", value, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source);
}

template <typename T>
__forceinline__ T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::lane(), source = lane + static_cast<int>(delta);
  return simt::shuffle(mask, "__shfl_down_sync", value,
                       (lane & (width - 1)) + static_cast<int>(delta) < width ? source : lane);
}

template <typename T>
__forceinline__ T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::lane(), source = lane - static_cast<int>(delta);
  return simt::shuffle(mask, "__shfl_up_sync", value, (lane & (width - 1)) >= static_cast<int>(delta) ? source : lane);
}

inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  for (int step = 16; step > 0; step /= 2) {
    const uint32_t other = simt::shuffle(mask, "__reduce_max_sync", value, simt::lane() ^ step);
    if (other > value) value = other;
  }
  return value;
}

uint32_t __ballot_sync(uint32_t mask, int predicate);
int __any_sync(uint32_t mask, int predicate);
int __all_sync(uint32_t mask, int predicate);
void __syncwarp(uint32_t mask = 0xffffffffu);
