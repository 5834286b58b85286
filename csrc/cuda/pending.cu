// Development only: lets the library link while some ops are still being written. Removed once all are there.
#include "device.h"

namespace rw::cuda {
#define IN(name, dtype, dims)
#define FLOPS(expression)
#define OP(name, row)                                                    \
  __attribute__((weak)) void name(Context&, const name##_args&) {        \
    throw std::runtime_error(#name " is not written yet for this backend"); \
  }
#include "../ops.def"
}  // namespace rw::cuda
