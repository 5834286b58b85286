#include "blas.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>

namespace rw::blas {
namespace {

constexpr int kRowMajor = 101, kNoTranspose = 111, kTranspose = 112;  // cblas.h

using Sgemm = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a,
                       int lda, const float* b, int ldb, float beta, float* c, int ldc);

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory in huge pages where the system has them, as a device's is; reused as long as it is large enough.
class Block {
 public:
  // True where the memory is new, with arbitrary content.
  bool reserve(size_t bytes) {
    if (bytes <= bytes_) return false;
    constexpr size_t kPage = size_t{2} << 20;
    memory_.reset();
    bytes_ = 0;
    const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
    memory_.reset(std::aligned_alloc(kPage, rounded));
    if (!memory_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory_.get(), rounded, MADV_HUGEPAGE);
#endif
    bytes_ = rounded;
    return true;
  }
  char* bytes() const { return static_cast<char*>(memory_.get()); }
  float* floats() const { return static_cast<float*>(memory_.get()); }
  void fill(size_t bytes) {
    reserve(bytes);
    uint32_t state = 1;
    for (size_t i = 0; i < bytes / sizeof(float); i++) {
      state = state * 1664525u + 1013904223u;
      floats()[i] = static_cast<float>(static_cast<int32_t>(state)) * 4.656612873e-10f;  // (-1, 1)
    }
  }

 private:
  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0;
};

// One library and one set of buffers for the process; worker threads take turns.
struct State {
  std::mutex mutex;
  Library library;
  Sgemm sgemm = nullptr;
  void (*set_threads)(int) = nullptr;
  Block a, b, c, from, to;
};

State& state() {
  static State* const only = new State();  // never destroyed: threads of the library may outlive main
  return *only;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string text(void* library, const char* symbol) {
  auto function = reinterpret_cast<char* (*)()>(dlsym(library, symbol));
  return function ? function() : "";
}

}  // namespace

const Library& open(const std::string& path) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.sgemm) return s.library;
  std::vector<std::string> names = {path};
  if (path.empty()) names = {"libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0", "libopenblas.dylib"};
  std::string reason = "OpenBLAS is not installed";
  for (const std::string& name : names) {
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      if (!path.empty()) reason = dlerror();
      continue;
    }
    s.sgemm = reinterpret_cast<Sgemm>(dlsym(library, "cblas_sgemm"));
    if (!s.sgemm) {
      reason = name + " has no cblas_sgemm";
      dlclose(library);
      continue;
    }
    s.set_threads = reinterpret_cast<void (*)(int)>(dlsym(library, "openblas_set_num_threads"));
    s.library = {name, text(library, "openblas_get_config"), text(library, "openblas_get_corename")};
    return s.library;
  }
  throw std::runtime_error(reason);
}

double sgemm(bool transpose_a, bool transpose_b, int m, int n, int k, int repeats, int threads) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.sgemm) throw std::runtime_error("OpenBLAS is not open");
  const size_t a_bytes = sizeof(float) * m * k, b_bytes = sizeof(float) * k * n, c_bytes = sizeof(float) * m * n;
  if (s.a.reserve(a_bytes)) s.a.fill(a_bytes);
  if (s.b.reserve(b_bytes)) s.b.fill(b_bytes);
  if (s.c.reserve(c_bytes)) s.c.fill(c_bytes);
  if (s.set_threads) s.set_threads(threads);
  const int lda = transpose_a ? m : k, ldb = transpose_b ? k : n;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; i++)
    s.sgemm(kRowMajor, transpose_a ? kTranspose : kNoTranspose, transpose_b ? kTranspose : kNoTranspose, m, n, k, 1.0f,
            s.a.floats(), lda, s.b.floats(), ldb, 0.0f, s.c.floats(), n);
  return seconds_since(start);
}

// Seconds that threads take to do `work(first byte, count)` `repeats` times, each for its share.
template <typename Work>
static double seconds_of(size_t bytes, int repeats, int threads, Work&& work) {
  const size_t part = bytes / static_cast<size_t>(threads);
  const auto share = [&](int thread) {
    const size_t at = part * static_cast<size_t>(thread);
    for (int i = 0; i < repeats; i++) work(at, thread + 1 < threads ? part : bytes - at);
  };
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; thread++) others.emplace_back(share, thread);
  share(0);
  for (std::thread& other : others) other.join();
  return seconds_since(start);
}

double copy(size_t bytes, int repeats, int threads) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.from.reserve(bytes)) s.from.fill(bytes);
  if (s.to.reserve(bytes)) s.to.fill(bytes);
  return seconds_of(bytes, repeats, threads,
                    [&](size_t at, size_t count) { std::memcpy(s.to.bytes() + at, s.from.bytes() + at, count); });
}

double read(size_t bytes, int repeats, int threads) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.from.reserve(bytes)) s.from.fill(bytes);
  std::atomic<uint64_t> all{0};  // so that no load is superfluous
  const double seconds = seconds_of(bytes, repeats, threads, [&](size_t at, size_t count) {
    constexpr size_t line = 8;  // words
    constexpr size_t ahead = 8192;
    const auto* words = reinterpret_cast<const uint64_t*>(s.from.bytes() + at / 64 * 64);
    uint64_t sums[line] = {};
    for (size_t i = 0; i + line <= count / sizeof(uint64_t); i += line) {
      __builtin_prefetch(reinterpret_cast<const char*>(words + i) + ahead, 0, 2);
      for (size_t j = 0; j < line; j++) sums[j] ^= words[i + j];
    }
    for (uint64_t sum : sums) all ^= sum;
  });
  return seconds;
}

}  // namespace rw::blas
