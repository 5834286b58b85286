#include "loader.h"

#include <stdexcept>

#include "cpu/backend.h"
#include "ops.h"

namespace rw {
namespace {

const char* const kNoCuda =
    "this version of ropewalk has no CUDA backend yet; the CPU backend does everything, slower: use device \"cpu\"";
const char* const kNoSimt = "the simt backend runs CUDA kernels on the CPU for tests; this build does not contain it";

const rw_backend* checked(const rw_backend* backend) {
  if (backend->abi != RW_BACKEND_ABI)
    throw std::runtime_error(std::string("backend ") + backend->name + " speaks ABI " + std::to_string(backend->abi) +
                             ", this addon " + std::to_string(RW_BACKEND_ABI) + ": rebuild with `npx ropewalk build`");
  if (backend->table_hash != table_hash)
    throw std::runtime_error(std::string("backend ") + backend->name +
                             " was built from another op table: rebuild with `npx ropewalk build`");
  return backend;
}

}  // namespace

const rw_backend* find_backend(const std::string& name) {
  if (name == "cpu") return checked(cpu::backend());
  if (name == "cuda") throw std::runtime_error(std::string("CUDA backend unavailable: ") + kNoCuda);
  if (name == "simt") throw std::runtime_error(std::string("simt backend unavailable: ") + kNoSimt);
  throw std::runtime_error("no backend is called \"" + name + "\"");
}

std::vector<BackendStatus> list_backends() {
  std::vector<BackendStatus> list;
  for (const char* name : {"cpu", "cuda", "simt"}) {
    try {
      const rw_backend* backend = find_backend(name);
      const rw_open_options options = {0, 0};
      rw_device* device = nullptr;
      if (backend->open(&options, &device) != RW_OK) throw std::runtime_error(backend->last_error());
      list.push_back({name, true, backend->describe(device)});
      backend->close(device);
    } catch (const std::exception& error) {
      list.push_back({name, false, error.what()});
    }
  }
  return list;
}

}  // namespace rw
