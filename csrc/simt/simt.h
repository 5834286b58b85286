// CUDA for a host compiler: the keywords, built-in variables, vector types, intrinsics and runtime calls that the files
// of cuda/ use, with the meaning they have on a GPU. A thread is a fiber (fiber.cc), device memory is host memory
// (memory.cc); warp-wide functions are in warp.h, asynchronous copies and barriers of sm_90 in async.h.
//
// For tests only. Everything here is as strict as the documentation of CUDA, not as forgiving as a GPU: a barrier that
// not all threads reach, a lane missing from a mask, memory read before it was written are errors.
#pragma once
#include <math.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __grid_constant__

// ---- vector types ---------------------------------------------------------------------------------------------------

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- built-in variables ---------------------------------------------------------------------------------------------

namespace simt {

// What a kernel sees of the thread that runs it.
struct Coordinates {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern __thread __attribute__((tls_model("initial-exec"))) const Coordinates* coordinates;

}  // namespace simt

#define threadIdx (::simt::coordinates->thread)
#define blockIdx (::simt::coordinates->block)
#define blockDim (::simt::coordinates->block_dim)
#define gridDim (::simt::coordinates->grid_dim)
constexpr int warpSize = 32;

// ---- arithmetic -----------------------------------------------------------------------------------------------------

inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
template <typename T>
inline T __ldg(const T* p) {
  return *p;
}

// ---- atomics --------------------------------------------------------------------------------------------------------

inline int atomicAdd(int* p, int x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* p, unsigned x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
inline int atomicMax(int* p, int x) {
  int seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (seen < x && !__atomic_compare_exchange_n(p, &seen, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
inline int atomicMin(int* p, int x) {
  int seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (seen > x && !__atomic_compare_exchange_n(p, &seen, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

// ---- runtime (runtime.cc, memory.cc) --------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorIllegalAddress = 700,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureUnjoined = 904,
  cudaErrorStreamCaptureIsolation = 905,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
constexpr unsigned cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;
constexpr unsigned cudaHostAllocDefault = 0;
struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlockOptin;
  int major, minor, multiProcessorCount;
};
typedef struct simt_stream* cudaStream_t;
typedef struct simt_event* cudaEvent_t;
typedef struct simt_graph* cudaGraph_t;
typedef struct simt_graph_exec* cudaGraphExec_t;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int index);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes);
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

namespace simt {

// The tensors of an op: where one of them lies in an allocation, kernels launched from now on may touch nothing else of
// it. No tensors: everything.
struct Range {
  const void* begin;
  size_t bytes;
};
void limit_device_memory(const Range* tensors, size_t count);

// What a launch calls for each thread. The arguments lie in memory that kernels may read, but not write.
struct Call {
  std::shared_ptr<const void> arguments;
  size_t bytes;
  void (*run)(const void* arguments);
  std::shared_ptr<const std::vector<Range>> tensors = nullptr;  // limit_device_memory
};
void submit(dim3 grid, dim3 block, size_t smem, cudaStream_t stream, const char* file, int line, const void* kernel,
            const Call& call);

// Runs the grid when it is its turn in the stream, and returns when all is done. Throws std::runtime_error with what
// the kernel did wrong.
template <typename Body>
void launch(dim3 grid, dim3 block, size_t smem, cudaStream_t stream, const char* file, int line, const void* kernel,
            const Body& body) {
  submit(grid, block, smem, stream, file, line, kernel,
         {std::make_shared<const Body>(body), sizeof(Body),
          [](const void* arguments) { (*static_cast<const Body*>(arguments))(); }, nullptr});
}

// Nothing may touch these bytes of shared memory.
void red_zone(const void* begin, size_t bytes);

// Between the arrays of a struct in shared memory.
struct alignas(16) Redzone {
  unsigned char bytes[16];
  Redzone() { red_zone(bytes, sizeof(bytes)); }
};

// The running block's dynamic shared memory. `bytes` is what the kernel believes to have; `construct` is called once
// for a layout.
void* dynamic_shared(size_t bytes, const void* layout = nullptr, void (*construct)(void*) = nullptr);

template <typename T>
T& dynamic_struct() {
  static const char layout = 0;
  void (*construct)(void*) = nullptr;
  // Default-initialised: this writes nothing, but red zones make themselves known.
  if constexpr (std::is_default_constructible_v<T>) construct = [](void* memory) { new (memory) T; };
  return *static_cast<T*>(dynamic_shared(sizeof(T), &layout, construct));
}

// A static variable; `key` says which.
void* static_shared(const void* key, size_t bytes, size_t alignment);

// Ends the block, and the launch with this error. Does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt

void __syncthreads();
