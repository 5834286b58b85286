// Device memory. It starts as 0xff bytes (NaN in f32 and bf16), between guards that are
// checked when it is freed.
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "fiber.h"
#include "simt.h"

using simt::failed;

namespace {

constexpr size_t kGuard = 256;
constexpr unsigned char kGuardByte = 0xfd;

std::mutex mutex;
std::unordered_map<void*, size_t> allocations;
size_t used = 0;

}  // namespace

namespace simt {

size_t memory_used() {
  std::lock_guard<std::mutex> lock(mutex);
  return used;
}

}  // namespace simt

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (const cudaError_t error = simt::may_allocate()) return error;
  if (simt::memory_used() + bytes > simt::memory_total()) return failed(cudaErrorMemoryAllocation);
  auto* raw = static_cast<unsigned char*>(aligned_alloc(kGuard, (bytes + 3 * kGuard - 1) / kGuard * kGuard));
  if (!raw) return failed(cudaErrorMemoryAllocation);
  memset(raw, kGuardByte, kGuard);
  memset(raw + kGuard, 0xff, bytes);
  memset(raw + kGuard + bytes, kGuardByte, kGuard);
  *memory = raw + kGuard;
  std::lock_guard<std::mutex> lock(mutex);
  allocations[*memory] = bytes;
  used += bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (!memory) return cudaSuccess;
  simt::finish_copies();
  size_t bytes;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = allocations.find(memory);
    if (found == allocations.end()) return failed(cudaErrorInvalidValue);
    bytes = found->second;
    allocations.erase(found);
    used -= bytes;
  }
  auto* raw = static_cast<unsigned char*>(memory) - kGuard;
  bool whole = true;
  for (size_t i = 0; i < kGuard; i++) whole &= raw[i] == kGuardByte && raw[kGuard + bytes + i] == kGuardByte;
  free(raw);
  return whole ? cudaSuccess : failed(cudaErrorIllegalAddress);
}

// Pageable memory is copied at once, as on a GPU, where the call returns when it has been read.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const bool late = kind != cudaMemcpyDeviceToDevice && simt::pinned(kind == cudaMemcpyHostToDevice ? from : to);
  simt::enqueue(stream, late, [=] { memcpy(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  simt::enqueue(stream, false, [=] { memset(to, value, bytes); });
  return cudaSuccess;
}
