#pragma once
#include "../backend.h"

namespace rw::cpu {

// Built into the addon, always there.
const rw_backend* backend();

// Whether the tile unit of AMX is there and the system lets this process use its registers, which it has to be asked
// for: they make the frames of signals 8 KB larger, and it says no where a thread's signal stack is too small for that.
bool enable_tiles();

}  // namespace rw::cpu
