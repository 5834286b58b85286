// Finds the backend of a device name.
#pragma once
#include <string>
#include <vector>

#include "backend.h"

namespace rw {

struct BackendStatus {
  std::string name;
  bool available;
  std::string detail;  // what it is, or why it is not there and what to do
};

// The backend called `name` (cpu, cuda, simt); throws std::runtime_error that says why it is not there and the remedy.
const rw_backend* find_backend(const std::string& name);

// Every backend this build knows, for `ropewalk doctor`.
std::vector<BackendStatus> list_backends();

}  // namespace rw
