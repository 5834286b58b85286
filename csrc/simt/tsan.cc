// The hooks that -fsanitize=thread puts before every access to memory of a kernel file. libtsan is not linked: these
// take its place. An access of the kernel's own stack is nobody else's business; everything else goes to race.cc.
#include "race.h"

#if !defined(__SANITIZE_ADDRESS__)  // which is another flavour

namespace simt {
namespace {

// As on a GPU, an access of 2, 4, 8 or 16 bytes needs an address that is a multiple of that, if `aligned`.
inline void hook(const void* p, size_t bytes, Access kind, const void* site, bool aligned = false) {
  const Thread* thread = self;
  if (!thread) return host_access(p, bytes, site);
  if (reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(thread->stack) < kStack + kStackGuard || quiet)
    return;
  access(*thread, p, bytes, kind, site, 1u << thread->lane);
  if (!aligned || reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  // Of a launch's arguments the host's compiler copies what lies side by side, which says nothing of a GPU.
  const size_t argument = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(block->call->arguments.get());
  if (argument < block->call->bytes) return;
  const Quiet silence;
  fail_as(*thread, std::string(kind < Access::write ? "read" : "write") + " of " + std::to_string(bytes) +
                       " bytes at " + describe_site(site) + ": the address is not a multiple of " +
                       std::to_string(bytes));
}

inline void aligned_hook(const void* p, size_t bytes, Access kind, const void* site) {
  hook(p, bytes, kind, site, true);
}

}  // namespace
}  // namespace simt

using simt::Access;

#define SITE __builtin_return_address(0)

extern "C" {
#pragma GCC visibility push(hidden)

void __tsan_init() { simt::instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define PLAIN(bytes)                                                                                \
  void __tsan_read##bytes(void* p) { simt::aligned_hook(p, bytes, Access::read, SITE); }            \
  void __tsan_write##bytes(void* p) { simt::aligned_hook(p, bytes, Access::write, SITE); }          \
  void __tsan_volatile_read##bytes(void* p) { simt::aligned_hook(p, bytes, Access::read, SITE); }   \
  void __tsan_volatile_write##bytes(void* p) { simt::aligned_hook(p, bytes, Access::write, SITE); } \
  void __tsan_unaligned_read##bytes(void* p) { simt::hook(p, bytes, Access::read, SITE); }          \
  void __tsan_unaligned_write##bytes(void* p) { simt::hook(p, bytes, Access::write, SITE); }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)
#undef PLAIN
void __tsan_read_range(void* p, size_t bytes) { simt::hook(p, bytes, Access::copy, SITE); }
void __tsan_write_range(void* p, size_t bytes) { simt::hook(p, bytes, Access::write, SITE); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// The order of memory is that of sequential consistency here; the detector takes none of them for a barrier.
#define ATOMIC(bits, T)                                                                        \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {                                     \
    simt::aligned_hook(const_cast<const T*>(p), bits / 8, Access::atomic, SITE);               \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                               \
  }                                                                                            \
  void __tsan_atomic##bits##_store(volatile T* p, T x, int) {                                  \
    simt::aligned_hook(const_cast<T*>(p), bits / 8, Access::write, SITE);                      \
    __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                            \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* seen, T x, int, int) {   \
    simt::aligned_hook(const_cast<T*>(p), bits / 8, Access::atomic, SITE);                     \
    return __atomic_compare_exchange_n(p, seen, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                            \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* seen, T x, int, int) {     \
    simt::aligned_hook(const_cast<T*>(p), bits / 8, Access::atomic, SITE);                     \
    return __atomic_compare_exchange_n(p, seen, x, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }                                                                                            \
  T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T seen, T x, int, int) {         \
    simt::aligned_hook(const_cast<T*>(p), bits / 8, Access::atomic, SITE);                     \
    __atomic_compare_exchange_n(p, &seen, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
    return seen;                                                                               \
  }
#define MODIFY(bits, T, name, builtin)                                     \
  T __tsan_atomic##bits##_##name(volatile T* p, T x, int) {                \
    simt::aligned_hook(const_cast<T*>(p), bits / 8, Access::atomic, SITE); \
    return builtin(p, x, __ATOMIC_SEQ_CST);                                \
  }
#define ATOMICS(bits, T)                         \
  ATOMIC(bits, T)                                \
  MODIFY(bits, T, exchange, __atomic_exchange_n) \
  MODIFY(bits, T, fetch_add, __atomic_fetch_add) \
  MODIFY(bits, T, fetch_sub, __atomic_fetch_sub) \
  MODIFY(bits, T, fetch_and, __atomic_fetch_and) \
  MODIFY(bits, T, fetch_or, __atomic_fetch_or)   \
  MODIFY(bits, T, fetch_xor, __atomic_fetch_xor) \
  MODIFY(bits, T, fetch_nand, __atomic_fetch_nand)
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
#undef ATOMICS
#undef MODIFY
#undef ATOMIC
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}

#pragma GCC visibility pop
}

#endif
