// The access lint: for each line of a kernel, how often shared memory must be looked at for a request of a warp
// (wavefronts; more than needed are bank conflicts), and how many 32-byte sectors of device memory it moves.
//
// ROPEWALK_SIMT_LINT=<file> has it written at the end of the process, as a table, or as JSON if the name ends in .json.
// Needs kernels that report their accesses (the race flavour).
#pragma once
#include "fiber.h"

namespace simt {

bool lint_wanted();
void lint(const Thread& thread, const char* p, size_t bytes, bool writes, bool shared, const void* site);
void lint_block_ends();

}  // namespace simt
