// What the programs of this folder share: counters, random numbers, device memory. They compile with nvcc as well,
// where they run on a GPU.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/ptx.h"

namespace rw::cuda {

// As in backend.cu, which is not part of these programs.
inline void throw_cuda_error(cudaError_t error, const char* what, const char* file, int line) {
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error) + ", " + file + ":" +
                           std::to_string(line));
}

}  // namespace rw::cuda

namespace {

using namespace rw::cuda;

int passed = 0, failed = 0, skipped = 0;

[[maybe_unused]] void verify(bool ok, const std::string& what) {
  ok ? passed++ : failed++;
  if (!ok) std::printf("FAILED %s\n", what.c_str());
}

// The last line of a program, and its exit code.
[[maybe_unused]] int summary(const char* name) {
  std::printf("%s: %d passed, %d failed, %d skipped\n", name, passed, failed, skipped);
  return failed > 0;
}

struct Random {
  uint64_t state;
  uint32_t operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  int below(int n) { return static_cast<int>(operator()() % static_cast<uint32_t>(n)); }
};

// An array in device memory.
template <typename T>
class Array {
 public:
  explicit Array(size_t size) : size_(size) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, size * sizeof(T)), "cudaMalloc");
    data_ = static_cast<T*>(memory);
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    check(cudaMemcpyAsync(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice, nullptr), "an upload");
    check(cudaStreamSynchronize(nullptr), "an upload");
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { cudaFree(data_); }

  T* get() const { return data_; }
  operator T*() const { return data_; }

  std::vector<T> values() const {
    std::vector<T> result(size_);
    check(cudaStreamSynchronize(nullptr), "a kernel");
    check(cudaMemcpyAsync(result.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost, nullptr), "a download");
    check(cudaStreamSynchronize(nullptr), "a download");
    return result;
  }

 private:
  T* data_;
  size_t size_;
};

// Whole numbers that bf16 holds exactly, so that products and sums of them have one right value in any order.
[[maybe_unused]] std::vector<bf16> small_integers(size_t size, uint64_t seed) {
  Random random{seed};
  std::vector<bf16> result(size);
  for (bf16& x : result) {
    const float value = static_cast<float>(random.below(17) - 8);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    x.bits = static_cast<uint16_t>(bits >> 16);
  }
  return result;
}

[[maybe_unused]] float value_of(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace
