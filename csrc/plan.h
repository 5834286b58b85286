// Decodes a recorded plan: numbers from JavaScript into argument structs with addresses, each checked to lie inside its
// buffer. Shapes and dtypes were checked where the plan was recorded (lib/runtime/recorder.ts).
#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"

namespace rw {

struct Memory {
  void* base;
  size_t bytes;
};

struct DecodedPlan {
  std::string name;
  std::unique_ptr<std::byte[]> args;
  std::vector<rw_command> commands;
};

// `words`: for each op its opcode; for each tensor the buffer's index (or -1 where absent), byte offset, dtype, rank
// and dims; for each scalar its value. Throws std::runtime_error on anything that does not fit.
DecodedPlan decode_plan(std::string name, const double* words, size_t count, const std::vector<Memory>& buffers);

}  // namespace rw
