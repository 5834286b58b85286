// Finds the GPU that a device is opened on, or says why there is none and what to do about it. For backend.cu.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <string>

#include "device.h"

namespace rw::cuda {

inline std::string size_text(size_t bytes) {
  char text[32];
  const double mib = static_cast<double>(bytes) / (1 << 20);
  std::snprintf(text, sizeof(text), mib < 1024 ? "%.1f MiB" : "%.1f GiB", mib < 1024 ? mib : mib / 1024);
  return text;
}

// 12020 -> 12.2
inline std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// " 535.104.05" where the kernel says which driver it has, else "".
inline std::string driver_release() {
  std::string release;
  if (std::FILE* file = std::fopen("/proc/driver/nvidia/version", "r")) {
    char line[256] = "", number[64] = "";
    // NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023
    if (std::fgets(line, sizeof(line), file))
      for (const char* at = line; *at && number[0] == 0; at++)
        if (at[0] == ' ' && at[1] >= '0' && at[1] <= '9') std::sscanf(at, " %63[0-9.]", number);
    std::fclose(file);
    if (number[0]) release = std::string(" ") + number;
  }
  return release;
}

// The oldest driver that runs programs of this version of the CUDA runtime (CUDA's table of minor version
// compatibility).
inline std::string needed_driver(int runtime) {
  return runtime >= 13000 ? "driver 580 or later" : "driver 525 or later";
}

// "; CUDA_VISIBLE_DEVICES is "1"", where it hides cards.
inline std::string visible_devices() {
  const char* list = std::getenv("CUDA_VISIBLE_DEVICES");
  return list ? std::string(" (CUDA_VISIBLE_DEVICES is \"") + list + "\")" : "";
}

// The oldest cards with the instructions that the kernels use: cp.async, and mma of bf16.
constexpr int kOldestMajor = 8;

// Makes GPU `index` the calling thread's and gives its properties; throws where it cannot be used.
inline cudaDeviceProp choose_gpu(int index) {
  const auto unavailable = [](const std::string& reason) {
    throw std::runtime_error("CUDA backend unavailable: " + reason);
  };
  int driver = 0, runtime = 0, count = 0;
  check(cudaDriverGetVersion(&driver), "asking for the driver's version");
  check(cudaRuntimeGetVersion(&runtime), "asking for the runtime's version");
  if (driver == 0)
    unavailable("this process finds no NVIDIA driver (libcuda.so.1). Install " + needed_driver(runtime) +
                "; in a container, run it with --gpus all. Device \"cpu\" needs none");
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found == cudaErrorInsufficientDriver)
    unavailable("the NVIDIA driver" + driver_release() + " supports CUDA " + cuda_version(driver) +
                ", this library needs CUDA " + cuda_version(runtime) + " (" + needed_driver(runtime) +
                "). Update the driver; or install the package cuda-compat-" + std::to_string(runtime / 1000) + "-" +
                std::to_string(runtime % 1000 / 10) +
                " (data-centre cards); or build with the toolkit you have: " + "npx ropewalk build");
  if (found == cudaErrorNoDevice || (found == cudaSuccess && count == 0))
    unavailable("the NVIDIA driver" + driver_release() + " finds no GPU" + visible_devices() +
                ". nvidia-smi should list one; in a container, run it with --gpus all. Device \"cpu\" needs none");
  check(found, "counting GPUs");
  if (index >= count)
    throw std::runtime_error("there is no GPU " + std::to_string(index) + ": this process sees " +
                             (count == 1 ? "one, number 0" : "0 to " + std::to_string(count - 1)) + visible_devices());
  cudaDeviceProp gpu;
  check(cudaGetDeviceProperties(&gpu, index), "asking for a GPU's properties");
  if (gpu.major < kOldestMajor)
    unavailable("GPU " + std::to_string(index) + " (" + gpu.name + ") has compute capability " +
                std::to_string(gpu.major) + "." + std::to_string(gpu.minor) +
                ", the kernels need 8.0 or later (A100, RTX 30 and newer). Choose another GPU, or device \"cpu\"");
  check(cudaSetDevice(index), "choosing a GPU");
  return gpu;
}

// One line for people: "NVIDIA H200, sm_90 (kernels of sm_90a), 139.8 GiB".
inline std::string describe_gpu(const cudaDeviceProp& gpu) {
  const char* kernels = gpu.major == 8 ? "kernels of sm_80" : gpu.major == 9 ? "kernels of sm_90a" : "kernels from PTX";
  return std::string(gpu.name) + ", sm_" + std::to_string(gpu.major) + std::to_string(gpu.minor) + " (" + kernels +
         "), " + size_text(gpu.totalGlobalMem);
}

}  // namespace rw::cuda
