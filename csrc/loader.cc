#include "loader.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>

#include <dlfcn.h>
#include <unistd.h>
#ifdef __linux__
#include <elf.h>
#endif

#include "cpu/backend.h"
#include "ops.h"

namespace rw {
namespace {

const rw_backend* checked(const rw_backend* backend, const std::string& where) {
  const char* const remedy =
      ". It belongs to another version of ropewalk: reinstall ropewalk, or rebuild with `npx ropewalk build`";
  if (backend->abi != RW_BACKEND_ABI)
    throw std::runtime_error(where + " speaks ABI " + std::to_string(backend->abi) + ", this addon " +
                             std::to_string(RW_BACKEND_ABI) + remedy);
  if (backend->table_hash != table_hash) throw std::runtime_error(where + " was built from another op table" + remedy);
  return backend;
}

// Throws where a library is damaged: the loader of Linux crashes on a truncated file.
void check_whole(const std::string& path) {
#ifdef __linux__
  const auto close = [](std::FILE* file) { std::fclose(file); };
  const std::unique_ptr<std::FILE, decltype(close)> file(std::fopen(path.c_str(), "rb"), close);
  if (!file) throw std::runtime_error(path + " cannot be read");
  Elf64_Ehdr header = {};
  const bool read = std::fread(&header, sizeof(header), 1, file.get()) == 1;
  if (!read || std::string(reinterpret_cast<const char*>(header.e_ident), SELFMAG) != ELFMAG)
    throw std::runtime_error(path + " is damaged: it is no ELF file");
  // The table of sections comes last in the file.
  const uint64_t end = header.e_shoff + uint64_t{header.e_shnum} * header.e_shentsize;
  std::fseek(file.get(), 0, SEEK_END);
  const auto bytes = static_cast<uint64_t>(std::ftell(file.get()));
  if (bytes < end)
    throw std::runtime_error(path + " is damaged: it has " + std::to_string(bytes) + " of " + std::to_string(end) +
                             " bytes");
#else
  (void)path;
#endif
}

const rw_backend* open_library(const std::string& path) {
  check_whole(path);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  using Function = const rw_backend* (*)();
  const auto function = reinterpret_cast<Function>(dlsym(library, "ropewalk_backend"));
  if (!function) throw std::runtime_error(path + " is not a backend of ropewalk");
  return checked(function(), path);
}

// The folder of the addon, with a slash.
std::string own_folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&own_folder), &info) || !info.dli_fname) return "";
  const std::string file = info.dli_fname;
  return file.substr(0, file.rfind('/') + 1);
}

struct CudaLibrary {
  std::string path, fault;
};

std::mutex cuda_library_mutex;  // workers set it too
CudaLibrary cuda_library;

const rw_backend* find_cuda() {
  const char* named = std::getenv("ROPEWALK_CUDA_LIBRARY");
  const bool chosen = named && *named;
  CudaLibrary shipped;
  {
    const std::lock_guard<std::mutex> lock(cuda_library_mutex);
    shipped = cuda_library;
  }
  if (shipped.path.empty()) shipped.path = own_folder() + "libropewalk_cuda.so";
  const std::string path = chosen ? named : shipped.path;
  try {
    if (!chosen && !shipped.fault.empty()) throw std::runtime_error(path + " " + shipped.fault);
    if (access(path.c_str(), F_OK) != 0)
      throw std::runtime_error(
          "there is no " + path +
          (chosen ? ", which ROPEWALK_CUDA_LIBRARY names"
                  : ". This installation has no CUDA library: build one with `npx ropewalk build` where there is nvcc "
                    "(in a clone: npm run build:cuda), or name one with ROPEWALK_CUDA_LIBRARY. Device \"cpu\" needs "
                    "none"));
    return open_library(path);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("CUDA backend unavailable: ") + error.what());
  }
}

const rw_backend* find_simt() {
  const char* path = std::getenv("ROPEWALK_SIMT_LIBRARY");
  try {
    if (!path || !*path)
      throw std::runtime_error(
          "it runs the CUDA kernels on the CPU for tests; ROPEWALK_SIMT_LIBRARY must name its library (see "
          "CONTRIBUTING)");
    return open_library(path);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("simt backend unavailable: ") + error.what());
  }
}

// What there is to say about one device. Throws where it cannot be opened.
BackendStatus look_at(const rw_backend* backend, const std::string& name, int index) {
  const rw_open_options options = {index, 0};
  rw_device* device = nullptr;
  if (backend->open(&options, &device) != RW_OK) throw std::runtime_error(backend->last_error());
  BackendStatus status = {name, true, backend->describe(device)};
  backend->memory(device, &status.free_bytes, &status.total_bytes);
  backend->close(device);
  return status;
}

}  // namespace

void set_cuda_library(const std::string& path, const std::string& fault) {
  const std::lock_guard<std::mutex> lock(cuda_library_mutex);
  cuda_library = {path, fault};
}

const rw_backend* find_backend(const std::string& name) {
  if (name == "cpu") return checked(cpu::backend(), "backend cpu");
  if (name == "cuda") return find_cuda();
  if (name == "simt") return find_simt();
  throw std::runtime_error("no backend is called \"" + name + "\"");
}

std::vector<BackendStatus> list_backends() {
  std::vector<BackendStatus> list;
  for (const std::string name : {"cpu", "cuda", "simt"}) {
    try {
      const rw_backend* backend = find_backend(name);
      list.push_back(look_at(backend, name, 0));
      for (int index = 1; name == "cuda"; index++)
        list.push_back(look_at(backend, "cuda:" + std::to_string(index), index));
    } catch (const std::exception& error) {
      // one index after the last GPU is no news
      if (list.empty() || list.back().name.substr(0, 4) != name) list.push_back({name, false, error.what()});
    }
  }
  return list;
}

}  // namespace rw
