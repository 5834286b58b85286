#pragma once
#include "../backend.h"

namespace rw::cpu {

// Built into the addon, always there.
const rw_backend* backend();

}  // namespace rw::cpu
