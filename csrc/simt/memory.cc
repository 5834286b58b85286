// Device memory. It starts as 0xff bytes (NaN in f32 and bf16), between guards that are checked when it is freed.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "race.h"
#include "sanitizer.h"

using simt::failed;

namespace {

constexpr size_t kGuard = 256;
constexpr unsigned char kGuardByte = 0xfd;

std::mutex mutex;
// Replaced, never changed: a launch goes on with those that were there when it began.
std::shared_ptr<const simt::Regions> allocations = std::make_shared<simt::Regions>();
std::atomic<size_t> used{0};

// What is copied or set must lie in one allocation.
simt::Region device_range(const void* p, size_t bytes) {
  const auto all = simt::memory_regions();
  const simt::Region* region = simt::find_region(*all, p);
  if (!region || static_cast<const char*>(p) + bytes > region->begin + region->bytes) return {nullptr, 0, nullptr};
  return *region;
}

size_t offset_in(const simt::Region& region, const void* p) {
  return static_cast<size_t>(static_cast<const char*>(p) - region.begin);
}

}  // namespace

namespace simt {

size_t memory_used() { return used; }

std::shared_ptr<const Regions> memory_regions() {
  std::lock_guard<std::mutex> lock(mutex);
  return allocations;
}

const Region* find_region(const Regions& regions, const void* p) {
  size_t low = 0, high = regions.size();
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (regions[middle].begin <= static_cast<const char*>(p))
      low = middle + 1;
    else
      high = middle;
  }
  return low ? &regions[low - 1] : nullptr;
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
  ASAN_POISON_MEMORY_REGION(raw, kGuard);
  ASAN_POISON_MEMORY_REGION(raw + kGuard + bytes, kGuard);
  *memory = raw + kGuard;
  const simt::Region added = {static_cast<char*>(*memory), bytes, simt::new_shadow(bytes)};
  std::lock_guard<std::mutex> lock(mutex);
  auto regions = std::make_shared<simt::Regions>(*allocations);
  const auto after = [&](const simt::Region& region) { return region.begin > added.begin; };
  regions->insert(std::find_if(regions->begin(), regions->end(), after), added);
  allocations = std::move(regions);
  used += bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (!memory) return cudaSuccess;
  simt::finish_copies();
  simt::Region freed;
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto regions = std::make_shared<simt::Regions>(*allocations);
    const auto same = [&](const simt::Region& region) { return region.begin == memory; };
    const auto found = std::find_if(regions->begin(), regions->end(), same);
    if (found == regions->end()) return failed(cudaErrorInvalidValue);
    freed = *found;
    regions->erase(found);
    allocations = std::move(regions);
    used -= freed.bytes;
  }
  auto* raw = static_cast<unsigned char*>(memory) - kGuard;
  ASAN_UNPOISON_MEMORY_REGION(raw, kGuard);
  ASAN_UNPOISON_MEMORY_REGION(raw + kGuard + freed.bytes, kGuard);
  bool whole = true;
  for (size_t i = 0; i < kGuard; i++) whole &= raw[i] == kGuardByte && raw[kGuard + freed.bytes + i] == kGuardByte;
  free(raw);
  simt::delete_shadow(freed.shadow);
  return whole ? cudaSuccess : failed(cudaErrorIllegalAddress);
}

// Pageable memory is copied at once, as on a GPU, where the call returns when it has been read.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind == cudaMemcpyDefault) {  // by where the two are
    const bool to_device = device_range(to, bytes).begin, from_device = device_range(from, bytes).begin;
    if (!to_device && !from_device) return failed(cudaErrorInvalidValue);
    kind = !to_device ? cudaMemcpyDeviceToHost : from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
  }
  const bool late = kind != cudaMemcpyDeviceToDevice && simt::pinned(kind == cudaMemcpyHostToDevice ? from : to);
  simt::Region target = {}, source = {};
  if (kind != cudaMemcpyDeviceToHost && !(target = device_range(to, bytes)).begin) return failed(cudaErrorInvalidValue);
  if (kind != cudaMemcpyHostToDevice && !(source = device_range(from, bytes)).begin)
    return failed(cudaErrorInvalidValue);
  simt::enqueue(stream, late, [=] {
    memcpy(to, from, bytes);
    if (kind == cudaMemcpyHostToDevice) simt::host_wrote(target.shadow, offset_in(target, to), bytes);
    if (kind == cudaMemcpyDeviceToDevice)
      simt::host_copied(target.shadow, offset_in(target, to), source.shadow, offset_in(source, from), bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const simt::Region target = device_range(to, bytes);
  if (!target.begin) return failed(cudaErrorInvalidValue);
  simt::enqueue(stream, false, [=] {
    memset(to, value, bytes);
    simt::host_wrote(target.shadow, offset_in(target, to), bytes);
  });
  return cudaSuccess;
}
