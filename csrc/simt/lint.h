// The access lint: how many times shared memory has to be looked at, and how many 32-byte sectors of device memory are
// moved, for each line of a kernel (lint.cc).
#pragma once
#include "fiber.h"

namespace simt {

bool lint_wanted();
void lint(const Thread& thread, const char* p, size_t bytes, bool writes, bool shared, const void* site);

}  // namespace simt
