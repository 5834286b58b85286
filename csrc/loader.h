// Finds the backend of a device name.
#pragma once
#include <string>
#include <vector>

#include "backend.h"

namespace rw {

struct BackendStatus {
  std::string name;
  bool available;
  std::string detail;       // what it is, or why it is not there and what to do
  uint64_t free_bytes = 0;  // of memory of its own; 0 where it uses the host's
  uint64_t total_bytes = 0;
};

// Where the CUDA library is, and, unless it is empty, why it must not be opened. Without this call it is beside the
// addon; ROPEWALK_CUDA_LIBRARY goes before both.
void set_cuda_library(const std::string& path, const std::string& fault);

// The backend called `name` (cpu, cuda, simt); one of a library of its own stays open until the process ends. Throws
// std::runtime_error that says why it is not there and the remedy.
const rw_backend* find_backend(const std::string& name);

// Every backend this build knows, and every further GPU (cuda:1 ...), for `ropewalk doctor`.
std::vector<BackendStatus> list_backends();

}  // namespace rw
