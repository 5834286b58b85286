// copy_start: y = x, at once: all memory is the host's. copy_wait: nothing is left to wait for.
//
// x, y (N), f32 or bf16, copied as bytes: N elements are read and written once.
#include "cpu.h"

namespace rw::cpu::RW_ISA {

void copy_start(Context& context, const copy_start_args& a) {
  constexpr int64_t piece = 1 << 20;
  const int64_t bytes = a.x.size() * dtype_bytes(a.x.dtype);
  parallel(context, (bytes + piece - 1) / piece, [&](int64_t task, int) {
    const int64_t at = task * piece, left = bytes - at;
    __builtin_memcpy(a.y.as<char>() + at, a.x.as<char>() + at, left < piece ? left : piece);
  });
}

void copy_wait(Context&, const copy_wait_args&) {}

}  // namespace rw::cpu::RW_ISA
