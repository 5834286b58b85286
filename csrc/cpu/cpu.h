// What every CPU kernel file may use: the context with its thread pool, and the slots of the op table.
//
// Each kernel file is compiled once per instruction set (RW_ISA = baseline, avx2, avx512; see CMakeLists.txt) into a
// namespace of its own, and chosen at run time. So that no AVX code leaks into the baseline through merged inline
// functions, kernel files use no standard containers or algorithms: plain pointers, simd.h and this header.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../ops.h"

namespace rw::cpu {

// Calls body(data, task, thread) for every task in [0, tasks); returns when all are done. Threads take tasks in any
// order: a task must write what no other task writes, so that results do not depend on the number of threads.
using TaskBody = void (*)(void* data, int64_t task, int thread);

struct Context {
  virtual int threads() const = 0;
  virtual void run_tasks(int64_t tasks, TaskBody body, void* data) = 0;
  // Scratch memory of a thread, 64-byte aligned, at least `bytes` long, kept and reused between ops. Its content is
  // arbitrary. A call may move it, so ask once an op, for the sum of what is needed.
  virtual void* scratch(int thread, size_t bytes) = 0;
  // Whether kernels of AVX-512 may use AVX512_VBMI, too.
  virtual bool permutes_bytes() const = 0;
  // Whether they may use AMX with bf16.
  virtual bool has_tiles() const = 0;

 protected:
  ~Context() = default;
};

template <typename Body>
inline void parallel(Context& context, int64_t tasks, Body&& body) {
  context.run_tasks(
      tasks,
      [](void* data, int64_t task, int thread) { (*static_cast<std::remove_reference_t<Body>*>(data))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// A backend's row of kernels, one for each op of the table: a missing one does not link.
using Kernel = void (*)(Context& context, const void* args);
struct Kernels {
  bool use_tiles;  // whether this compilation knows AMX
  Kernel run[static_cast<size_t>(Op::count)];
};

#define IN(name, dtype, dims)
#define OP(name, row) void name(Context& context, const name##_args& args);
#define FLOPS(expression)
namespace baseline {
#include "../ops.def"
extern const Kernels kernels;
}  // namespace baseline
namespace avx2 {
#include "../ops.def"
extern const Kernels kernels;
}  // namespace avx2
namespace avx512 {
#include "../ops.def"
extern const Kernels kernels;
}  // namespace avx512
#undef IN
#undef OP
#undef FLOPS

}  // namespace rw::cpu
