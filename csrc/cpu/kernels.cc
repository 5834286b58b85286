// The kernels of one instruction set, in the order of the table.
#include "cpu.h"

namespace rw::cpu::RW_ISA {

#define RW_STRING(x) #x
#define RW_NAME(x) RW_STRING(x)

const Kernels kernels = {
    RW_NAME(RW_ISA),
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
