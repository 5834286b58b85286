// What every kernel file may use: the execution model of CUDA (nvcc's own, or that of simt/ when a host compiler builds
// the same files), launches, shared memory, dtypes, 16-byte accesses and reductions.
//
// This is the one place beside ptx.h that knows which compiler it is. Kernel files
// - launch with launch(), never <<<>>>; take shared memory from dyn_smem() or static_smem(), never __shared__;
// - put REDZONE between the arrays of a shared-memory struct: no bytes on a GPU, guarded bytes under simt;
// - synchronise only through the functions of CUDA and of ptx.h, and never spin on memory;
// - use inline PTX only through ptx.h, and no std containers, exceptions or function-local statics in kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define REDZONE(name)
#define RW_BACKEND_NAME "cuda"
#else
#include "../simt/warp.h"
#define REDZONE(name) simt::Redzone name
#define RW_BACKEND_NAME "simt"
#endif

#include "../ops.h"

namespace rw::cuda {

// ---- errors ---------------------------------------------------------------------------------------------------------

// An error of the CUDA runtime: "<what> failed: <CUDA's text> (<name>), <file>:<line>". backend.cu catches it.
struct CudaError : std::runtime_error {
  cudaError_t code;
  CudaError(cudaError_t code, const std::string& message) : std::runtime_error(message), code(code) {}
};

[[noreturn]] void throw_cuda_error(cudaError_t error, const char* what, const char* file, int line);

inline void check(cudaError_t error, const char* what, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (error != cudaSuccess) throw_cuda_error(error, what, file, line);
}

// ---- launches -------------------------------------------------------------------------------------------------------

struct Launch {
  dim3 grid, block;
  size_t smem;       // bytes of dyn_smem
  size_t most_smem;  // of any launch of this kernel
  cudaStream_t stream;
  const char* file;
  int line;

  Launch(dim3 grid, dim3 block, size_t smem, cudaStream_t stream, const char* file = __builtin_FILE(),
         int line = __builtin_LINE())
      : grid(grid), block(block), smem(smem), most_smem(smem), stream(stream), file(file), line(line) {}
};

// A block has 48 KB of shared memory, its static variables included, unless its kernel has asked for more. No kernel
// has so many static variables that one with less than this would have to ask.
constexpr size_t kPlainSmem = 32 * 1024;

// What a kernel has asked for is kept for all its launches, and threads may launch it at the same time: where launches
// differ, each asks for the most. The L1 gets the least of what the two share, or fewer blocks would fit an SM.
inline void ask_for_smem(const void* kernel, const Launch& at) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(at.most_smem));
  if (error == cudaErrorInvalidValue)
    throw CudaError(error, "it needs " + std::to_string(at.most_smem) +
                               " bytes of shared memory for a block, more than this GPU has: use dtype bfloat16");
  check(error, "asking for shared memory", at.file, at.line);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "asking for shared memory", at.file, at.line);
}

// launch({grid, block, sizeof(Smem), context.stream}, kernel<T>, arguments...): errors of the launch itself are thrown
// here, those of the kernel at the next synchronisation.
template <typename... Parameters, typename... Arguments>
void launch(const Launch& at, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (at.smem > kPlainSmem) ask_for_smem(function, at);
#ifdef __CUDACC__
  kernel<<<at.grid, at.block, at.smem, at.stream>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), "a launch", at.file, at.line);
#else
  simt::launch(at.grid, at.block, at.smem, at.stream, at.file, at.line, function,
               [kernel, values = std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)] {
                 std::apply(kernel, values);
               });
#endif
}

// For the emulator: kernels launched from now on may touch only these tensors, of the memory that holds them.
inline void limit_to_tensors([[maybe_unused]] const OpInfo& op, [[maybe_unused]] const void* args) {
#ifndef __CUDACC__
  simt::Range tensors[32];
  size_t count = 0;
  const auto* field = static_cast<const char*>(args);
  for (size_t i = 0; i < op.field_count; i++) {
    const bool scalar = op.fields[i].field == Field::integer || op.fields[i].field == Field::real;
    const auto* tensor = reinterpret_cast<const Tensor*>(field);
    if (!scalar && *tensor) tensors[count++] = {tensor->data, static_cast<size_t>(tensor->bytes())};
    field += scalar ? sizeof(int64_t) : sizeof(Tensor);
  }
  simt::limit_device_memory(tensors, count);
#endif
}

// ---- shared memory --------------------------------------------------------------------------------------------------

// Leaves a kernel's dynamic shared memory in its PTX as a comment, for scripts/cuda-check.js: no instruction. (ptx.h)
template <size_t Bytes>
__device__ __forceinline__ void note_dyn_smem();

// The block's dynamic shared memory as a struct; its size is given at the launch. Uninitialised, 1024-byte aligned.
template <typename T>
__device__ __forceinline__ T& dyn_smem() {
#ifdef __CUDACC__
  note_dyn_smem<sizeof(T)>();
  extern __shared__ __align__(1024) unsigned char rw_dynamic_smem[];
  return *reinterpret_cast<T*>(rw_dynamic_smem);
#else
  return simt::dynamic_struct<T>();
#endif
}

// A small variable shared by the block; `Tag` (any local type) tells variables of one type apart.
template <typename T, typename Tag>
__device__ __forceinline__ T& static_smem() {
#ifdef __CUDACC__
  __shared__ T variable;
  return variable;
#else
  static const char key = 0;
  return *static_cast<T*>(simt::static_shared(&key, sizeof(T), alignof(T)));
#endif
}

// ---- dtypes ---------------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return to_bf16(x);
  else
    return x;
}

// Calls f with a value of the C++ type of a dtype: with_float_type(t.dtype, [&](auto zero) { using T = decltype(zero);
// })
template <typename F>
void with_float_type(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::bf16) return f(bf16{});
  throw std::runtime_error("a tensor of integers was given where f32 or bf16 is needed");
}

// ---- memory ---------------------------------------------------------------------------------------------------------

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Elements in a 16-byte access.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// 16 bytes of elements as floats, and back.
template <typename T>
__device__ __forceinline__ void load_vector(const T* p, float (&x)[kVector<T>]) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < kVector<T>; i++) {
    if constexpr (std::is_same_v<T, bf16>)
      x[i] = __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    else
      x[i] = __uint_as_float(word[i]);
  }
}

template <typename T>
__device__ __forceinline__ void store_vector(T* p, const float (&x)[kVector<T>]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (std::is_same_v<T, bf16>)
      word[i] = to_bf16(x[2 * i]).bits | static_cast<uint32_t>(to_bf16(x[2 * i + 1]).bits) << 16;
    else
      word[i] = __float_as_uint(x[i]);
  }
  *reinterpret_cast<uint4*>(p) = make_uint4(word[0], word[1], word[2], word[3]);
}

// ---- reductions -----------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kWarp; }

// The same bits in every lane, always summed in the same order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

template <int Warps>
struct WarpValues {
  float value[Warps];
};

// Sum over a block of `Warps` whole warps, the same bits in every thread. Every thread must call it; `Tag` tells two
// calls of one kernel apart. Between two calls with the same tag, as in a loop, a barrier is needed.
template <int Warps, typename Tag>
__device__ __forceinline__ float block_sum(float x) {
  x = warp_sum(x);
  if constexpr (Warps == 1) return x;
  auto& parts = static_smem<WarpValues<Warps>, Tag>();
  if (lane_index() == 0) parts.value[warp_index()] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int warp = 0; warp < Warps; warp++) x += parts.value[warp];
  return x;
}

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// ---- the context of an op -------------------------------------------------------------------------------------------

// What an op's host function gets beside its arguments. Everything it launches goes to `stream`, in order; it must not
// allocate, synchronise or read device memory, because it may be captured into a CUDA graph.
struct Context {
  cudaStream_t stream = nullptr;
  int sm_count = 0;
  size_t max_smem = 0;  // bytes of dynamic shared memory that a block may have

  char* workspace = nullptr;  // of a fixed size, so that no op changes what a plan needs
  size_t workspace_bytes = 0;

  // Copies that go on beside the operations on `stream`: see copy.cu.
  struct {
    cudaStream_t stream = nullptr;
    cudaEvent_t fork = nullptr, join = nullptr;
    bool pending = false;
  } copies;

  // What is submitted from now on comes after the copies that were started.
  void wait_for_copies();

  // Device memory that no other op uses at the same time, 256-byte aligned, content arbitrary. Ask once an op, for no
  // more than workspace_bytes: an op whose need grows with shapes takes a TMP of its row instead.
  void* scratch(size_t bytes) const;
};

// A backend's row of kernels, one for each op of the table: a missing one does not link.
#define IN(name, dtype, dims)
#define OP(name, row) void name(Context& context, const name##_args& args);
#define FLOPS(expression)
#include "../ops.def"
#undef IN
#undef OP
#undef FLOPS

}  // namespace rw::cuda

#include "ptx.h"
