// Copies between the host's pageable memory and the device, through two pinned buffers: while one piece travels by DMA,
// the processor copies the next one. (A copy from pageable memory would do the same inside the driver, but holds up the
// thread and shares the driver's buffer with everybody else.) For backend.cu.
#pragma once
#include <algorithm>
#include <cstring>

#include "device.h"

namespace rw::cuda {

class Staging {
 public:
  ~Staging() {
    for (const Slot& slot : slots_) {
      if (slot.copied) cudaEventDestroy(slot.copied);
      if (slot.memory) cudaFreeHost(slot.memory);
    }
  }

  // Returns when `from` has been read; the last pieces may still be on their way, in the order of the stream.
  void upload(cudaStream_t stream, void* to, const void* from, size_t bytes) {
    for (size_t at = 0; at < bytes; at += kPiece) {
      const size_t part = std::min(kPiece, bytes - at);
      Slot& slot = next_slot();
      std::memcpy(slot.memory, static_cast<const char*>(from) + at, part);
      check(cudaMemcpyAsync(static_cast<char*>(to) + at, slot.memory, part, cudaMemcpyHostToDevice, stream),
            "an upload");
      check(cudaEventRecord(slot.copied, stream), "an upload");
    }
  }

  // Returns when `to` holds the data.
  void download(cudaStream_t stream, void* to, const void* from, size_t bytes) {
    const auto fetch = [&](size_t at) {
      Slot& slot = next_slot();
      check(cudaMemcpyAsync(slot.memory, static_cast<const char*>(from) + at, std::min(kPiece, bytes - at),
                            cudaMemcpyDeviceToHost, stream),
            "a download");
      check(cudaEventRecord(slot.copied, stream), "a download");
      return &slot;
    };
    Slot* ahead = bytes > 0 ? fetch(0) : nullptr;
    for (size_t at = 0; at < bytes; at += kPiece) {
      Slot* slot = ahead;
      if (at + kPiece < bytes) ahead = fetch(at + kPiece);
      check(cudaEventSynchronize(slot->copied), "a download");
      std::memcpy(static_cast<char*>(to) + at, slot->memory, std::min(kPiece, bytes - at));
    }
  }

 private:
  // JavaScript sends and takes 16 MB at a time: four pieces, of which all but the first overlap with the one before.
  static constexpr size_t kPiece = size_t{4} << 20;

  struct Slot {
    void* memory = nullptr;
    cudaEvent_t copied = nullptr;
  };

  // The buffer that was used longest ago, once its piece has been copied.
  Slot& next_slot() {
    Slot& slot = slots_[turn_ ^= 1];
    if (!slot.memory) {
      check(cudaHostAlloc(&slot.memory, kPiece, cudaHostAllocDefault), "allocating pinned host memory");
      check(cudaEventCreateWithFlags(&slot.copied, cudaEventBlockingSync | cudaEventDisableTiming),
            "creating an event");
    }
    check(cudaEventSynchronize(slot.copied), "a copy");
    return slot;
  }

  Slot slots_[2];
  int turn_ = 0;
};

}  // namespace rw::cuda
