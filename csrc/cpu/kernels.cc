// The kernels of one instruction set, in the order of the table.
#include "cpu.h"
#include "tiles.h"

namespace rw::cpu::RW_ISA {

const Kernels kernels = {
#ifdef RW_HAS_TILES
    true,
#else
    false,
#endif
    {
#define IN(name, dtype, dims)
#define OP(name, row) \
  [](Context& context, const void* args) { RW_ISA::name(context, *static_cast<const name##_args*>(args)); },
#define FLOPS(expression)
#include "../ops.def"
#undef OP
#undef IN
#undef FLOPS
    },
};

}  // namespace rw::cpu::RW_ISA
