// The CPU backend: its thread pool, its memory, the choice of instruction set, and the C ABI of backend.h.
#include "../backend.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "backend.h"
#include "cpu.h"

namespace rw::cpu {

bool enable_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7, edx
  constexpr unsigned kVectorsOfBf16 = 1u << 5;            // of its subleaf 1, eax: AVX512_BF16, to round what comes out
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kBf16) || !(edx & kTile)) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kVectorsOfBf16) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

namespace {

constexpr size_t kAlignment = 64;

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

int available_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads that take tasks of one parallel loop at a time from a shared counter. A worker that runs out of work watches
// for the next loop for some microseconds, because ops follow each other closely, and then sleeps.
class Pool final : public Context {
 public:
  Pool(int threads, bool permutes_bytes, bool has_tiles)
      : scratch_(threads), permutes_bytes_(permutes_bytes), has_tiles_(has_tiles) {
    for (int i = 1; i < threads; i++) {
      try {
        workers_.emplace_back([this, i] { work(i); });
      } catch (const std::system_error& error) {
        end();
        throw std::runtime_error("thread " + std::to_string(i + 1) + " of " + std::to_string(threads) +
                                 " could not be started (" + error.what() + "): use fewer threads");
      }
    }
  }
  ~Pool() { end(); }

  int threads() const override { return static_cast<int>(workers_.size()) + 1; }
  bool permutes_bytes() const override { return permutes_bytes_; }
  bool has_tiles() const override { return has_tiles_; }

  void run_tasks(int64_t tasks, TaskBody body, void* data) override {
    if (tasks <= 1 || workers_.empty()) {
      for (int64_t task = 0; task < tasks; task++) body(data, task, 0);
      return;
    }
    body_ = body;
    data_ = data;
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    take(0);
    for (int spin = 0; busy_.load(std::memory_order_acquire) > 0; spin++) {
      if (spin < kSpins)
        pause();
      else
        std::this_thread::yield();
    }
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  void* scratch(int thread, size_t bytes) override {
    Scratch& own = scratch_[thread];
    if (own.bytes < bytes) {
      own.memory.reset();
      own.bytes = 0;
      const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      own.memory.reset(std::aligned_alloc(kAlignment, rounded));
      if (!own.memory) throw std::bad_alloc();
      own.bytes = rounded;
    }
    return own.memory.get();
  }

 private:
  static constexpr int kSpins = 4000;  // about 40 us

  struct alignas(kAlignment) Scratch {
    std::unique_ptr<void, FreeDeleter> memory;
    size_t bytes = 0;
  };

  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  // Of several failures the first is kept, and the remaining tasks are dropped.
  void take(int thread) {
    try {
      for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) body_(data_, task, thread);
    } catch (...) {
      next_.store(tasks_, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; spin++) pause();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        sleeping_.fetch_sub(1);
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) return;
      take(thread);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::vector<Scratch> scratch_;
  const bool permutes_bytes_, has_tiles_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> busy_{0};
  std::atomic<int64_t> next_{0};
  bool stop_ = false;
  TaskBody body_ = nullptr;
  void* data_ = nullptr;
  int64_t tasks_ = 0;
  std::exception_ptr failure_;
};

// The instruction sets of this processor, up to the one that ROPEWALK_ISA names: kernels, and what those of AVX-512 may
// use beside it.
struct Isa {
  const Kernels* kernels = &baseline::kernels;
  const char* name = "baseline";
  bool permutes_bytes = false, has_tiles = false;
};

Isa choose_isa() {
  const char* setting = std::getenv("ROPEWALK_ISA");
  const std::string wanted = setting ? setting : "";
  if (wanted != "" && wanted != "baseline" && wanted != "avx2" && wanted != "avx512" && wanted != "amx")
    throw std::runtime_error("ROPEWALK_ISA is \"" + wanted + "\": expected baseline, avx2, avx512 or amx");
  Isa isa;
#if defined(__x86_64__)
  const bool any = wanted == "";
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_amx = has_avx512 && (any || wanted == "amx") && avx512::kernels.use_tiles && enable_tiles();
  if (wanted == "avx2" && !has_avx2)
    throw std::runtime_error("ROPEWALK_ISA is avx2, but this processor has no AVX2 with FMA");
  if (wanted == "avx512" && !has_avx512)
    throw std::runtime_error("ROPEWALK_ISA is avx512, but this processor has no AVX-512 (F, BW, VL, DQ)");
  if (wanted == "amx" && !has_amx)
    throw std::runtime_error(
        "ROPEWALK_ISA is amx, but this processor has no AMX with bf16, or Linux does not let it be used");
  if (has_avx2 && wanted != "baseline") isa = {&avx2::kernels, "avx2"};
  if (has_avx512 && wanted != "baseline" && wanted != "avx2") {
    isa = {&avx512::kernels, has_amx ? "amx" : "avx512"};
    isa.permutes_bytes = (any || has_amx) && __builtin_cpu_supports("avx512vbmi");
    isa.has_tiles = has_amx;
  }
#else
  if (wanted != "" && wanted != "baseline")
    throw std::runtime_error("ROPEWALK_ISA is " + wanted + ", but this is not an x86-64 processor");
#endif
  return isa;
}

struct Device {
  explicit Device(int threads) : isa(choose_isa()), pool(threads, isa.permutes_bytes, isa.has_tiles) {
    description = std::string(isa.name) + ", " + std::to_string(threads) + (threads == 1 ? " thread" : " threads");
  }
  const Isa isa;
  Pool pool;
  std::string description;
};

thread_local std::string last_error;

// Backend code throws inside; nothing leaves the C ABI but a code and a message.
template <typename Body>
int guarded(Body&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return RW_ERROR;
}

Device* from(rw_device* device) { return reinterpret_cast<Device*>(device); }

int open(const rw_open_options* options, rw_device** device) {
  return guarded([&] {
    if (options->index != 0) throw std::runtime_error("there is one cpu device, \"cpu\"");
    const int threads = options->threads > 0 ? options->threads : available_cores();
    *device = reinterpret_cast<rw_device*>(new Device(threads));
    return RW_OK;
  });
}

void close(rw_device* device) { delete from(device); }

const char* describe(rw_device* device) { return from(device)->description.c_str(); }

int alloc(rw_device*, size_t bytes, void** memory) {
  return guarded([&] {
    const size_t rounded = std::max<size_t>(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (rounded < bytes) throw std::bad_alloc();
    // Large blocks start on a huge page, so that the kernel can back them with few of them. Those of a few MB would
    // lose too much by that; they share huge pages with what lies beside them.
    constexpr size_t kHuge = size_t{2} << 20, kPage = 4096;
    const bool huge = rounded >= 4 * kHuge;
    *memory = std::aligned_alloc(huge ? kHuge : kAlignment, huge ? (rounded + kHuge - 1) / kHuge * kHuge : rounded);
    if (!*memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    const uintptr_t start = (reinterpret_cast<uintptr_t>(*memory) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(*memory) + rounded) / kPage * kPage;
    if (rounded >= kHuge / 2) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
    return RW_OK;
  });
}

void release(rw_device*, void* memory) { std::free(memory); }

int copy(rw_device*, void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return RW_OK;
}

int host_visible(rw_device*) { return 1; }

int memory(rw_device*, uint64_t* free_bytes, uint64_t* total_bytes) {
  *free_bytes = *total_bytes = 0;
  return RW_OK;
}

int run(rw_device* device, const char* plan, const rw_command* commands, size_t count, const int32_t* cancel) {
  size_t at = 0;
  const int code = guarded([&] {
    const auto* flag = reinterpret_cast<const volatile int32_t*>(cancel);
    for (; at < count; at++) {
      if (flag && *flag) return RW_CANCELLED;
      from(device)->isa.kernels->run[commands[at].op](from(device)->pool, commands[at].args);
    }
    return RW_OK;
  });
  if (code == RW_ERROR)
    last_error = std::string(op_info[commands[at].op].name) + " (#" + std::to_string(at) + " of plan \"" + plan +
                 "\"): " + last_error;
  return code;
}

void forget(rw_device*, const rw_command*) {}

const char* error() { return last_error.c_str(); }

const rw_backend backend_functions = {RW_BACKEND_ABI, table_hash, "cpu",  0,       open,    close,  describe,
                                      alloc,          release,    alloc,  release, copy,    copy,   host_visible,
                                      memory,         run,        forget, error,   nullptr, nullptr};

}  // namespace

const rw_backend* backend() { return &backend_functions; }

}  // namespace rw::cpu
