// The instructions of sm_90a: barriers in shared memory, copies by the tensor memory accelerator (TMA), and matrix
// products of a warpgroup (wgmma), each with the twin that simt executes. Layouts follow the PTX ISA ("Asynchronous
// warpgroup level matrix instructions", "Tensors") and CUTLASS's canonical layouts. Kernels that use them are built for
// sm_90a; for another architecture their code stops at once, and the host never launches it there.
//
// The asynchronous proxy (TMA, wgmma's reads of shared memory) sees what threads wrote only after fence_proxy_async().
#pragma once
#include "ptx.h"

#ifdef __CUDACC__
#include <cuda.h>
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RW_SM90(device, twin) device
#elif defined(__CUDACC__)
#define RW_SM90(device, twin) __trap()
#else
#define RW_SM90(device, twin) twin
#endif

namespace rw::cuda {

// ---- barriers in shared memory
// ----------------------------------------------------------------------------------------

// Counts arrivals and bytes; when both are complete its phase ends, and the next one, of the other parity, begins. The
// first phase has parity 0; waiting for parity 1 on a new barrier returns at once.
struct alignas(8) MBarrier {
  uint64_t state;
};

// By one thread, for `arrivals` arrivals a phase; then mbarrier_init_fence() and a barrier before anyone else uses it.
__device__ __forceinline__ void mbarrier_init(MBarrier& barrier, int arrivals) {
  RW_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
                       : "memory"),
          simt::mbarrier_init(&barrier, arrivals));
}

__device__ __forceinline__ void mbarrier_init_fence() {
  RW_SM90(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"), simt::fence_mbarrier_init());
}

__device__ __forceinline__ void mbarrier_arrive(MBarrier& barrier) {
  RW_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
                       : "memory"),
          simt::mbarrier_arrive(&barrier, 0));
}

// Arrives, and has this phase wait for `bytes` more bytes of copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(MBarrier& barrier, int bytes) {
  RW_SM90(
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                   : "memory"),
      simt::mbarrier_arrive(&barrier, bytes));
}

// Waits for the end of the phase of this parity.
__device__ __forceinline__ void mbarrier_wait(MBarrier& barrier, int parity) {
  RW_SM90(asm volatile("{\n"
                       ".reg .pred done;\n"
                       "again:\n"
                       "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                       "@!done bra again;\n"
                       "}" ::"r"(shared_address(&barrier)),
                       "r"(parity)
                       : "memory"),
          simt::mbarrier_wait(&barrier, parity));
}

// What this thread wrote to shared memory becomes visible to the asynchronous proxy.
__device__ __forceinline__ void fence_proxy_async() {
  RW_SM90(asm volatile("fence.proxy.async.shared::cta;" ::: "memory"), simt::fence_proxy_async());
}

// ---- tensor maps
// ------------------------------------------------------------------------------------------------------

// A tensor in device memory of up to four dimensions and the box that one copy moves. A kernel takes it as a parameter
// `const __grid_constant__ TensorMap map`.
#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = simt::TensorMap;
#endif

struct TensorShape {
  int rank;             // 2, 3 or 4
  uint64_t dims[4];     // elements, the contiguous dimension first
  uint64_t strides[3];  // bytes from one element to the next along dims[1], dims[2], dims[3]: multiples of 16
  uint32_t box[4];      // elements of the box, each at most 256
  bool swizzled;        // 128-byte rows in shared memory, their 16-byte chunks XORed by the row: box[0] is 128 bytes
};

// For bf16 or f32. Throws where the tensor memory accelerator cannot do it.
template <typename T>
TensorMap make_tensor_map(const T* data, const TensorShape& shape) {
#ifdef __CUDACC__
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
        "looking for cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found),
        "looking for cuTensorMapEncodeTiled");
#endif
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map, std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
      static_cast<cuuint32_t>(shape.rank), const_cast<T*>(data), shape.dims, shape.strides, shape.box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, shape.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled refuses a tensor map: error " + std::to_string(result));
  return map;
#else
  return simt::make_tensor_map(data, sizeof(T), shape.rank, shape.dims, shape.strides, shape.box, shape.swizzled);
#endif
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  RW_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"), static_cast<void>(map));
}

// ---- copies by the tensor memory accelerator
// --------------------------------------------------------------------------

// All are issued by one thread. Loads count their bytes (those of the whole box) on the barrier; what lies outside of
// the tensor arrives as zeros. `to` is a multiple of 128 bytes.
__device__ __forceinline__ void tma_load(void* to, const TensorMap& map, MBarrier& barrier, int c0, int c1) {
  RW_SM90(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                       "%4}], [%2];" ::"r"(shared_address(to)),
                       "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1)
                       : "memory"),
          simt::tma_load(to, map, &barrier, 2, c0, c1, 0, 0));
}
__device__ __forceinline__ void tma_load(void* to, const TensorMap& map, MBarrier& barrier, int c0, int c1, int c2) {
  RW_SM90(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                       "%4, %5}], [%2];" ::"r"(shared_address(to)),
                       "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2)
                       : "memory"),
          simt::tma_load(to, map, &barrier, 3, c0, c1, c2, 0));
}
__device__ __forceinline__ void tma_load(void* to, const TensorMap& map, MBarrier& barrier, int c0, int c1, int c2,
                                         int c3) {
  RW_SM90(asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
                       "%4, %5, %6}], [%2];" ::"r"(shared_address(to)),
                       "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                       : "memory"),
          simt::tma_load(to, map, &barrier, 4, c0, c1, c2, c3));
}

// Stores; what lies outside of the tensor is not written. After bulk_commit() and bulk_wait_read() the shared memory
// may be used again, after bulk_wait() the result is there.
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* from, int c0, int c1) {
  RW_SM90(asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                       "r"(shared_address(from)), "r"(c0), "r"(c1)
                       : "memory"),
          simt::tma_store(map, from, 2, c0, c1, 0, 0));
}
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* from, int c0, int c1, int c2) {
  RW_SM90(asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                       "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2)
                       : "memory"),
          simt::tma_store(map, from, 3, c0, c1, c2, 0));
}
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* from, int c0, int c1, int c2, int c3) {
  RW_SM90(
      asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                   "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                   : "memory"),
      simt::tma_store(map, from, 4, c0, c1, c2, c3));
}

// The same for contiguous bytes: addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_load(void* to, const void* from, int bytes, MBarrier& barrier) {
  RW_SM90(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                           shared_address(to)),
                       "l"(from), "r"(bytes), "r"(shared_address(&barrier))
                       : "memory"),
          simt::bulk_load(to, from, bytes, &barrier));
}
__device__ __forceinline__ void bulk_store(void* to, const void* from, int bytes) {
  RW_SM90(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                       "r"(shared_address(from)), "r"(bytes)
                       : "memory"),
          simt::bulk_store(to, from, bytes, false));
}
// Adds to what is there. The order of the additions of several blocks is not fixed.
__device__ __forceinline__ void bulk_add(float* to, const float* from, int bytes) {
  RW_SM90(asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                       "r"(shared_address(from)), "r"(bytes)
                       : "memory"),
          simt::bulk_store(to, from, bytes, true));
}

// Ends a group of this thread's stores; waits until at most N of the newest groups still read their shared memory, or
// are under way at all.
__device__ __forceinline__ void bulk_commit() {
  RW_SM90(asm volatile("cp.async.bulk.commit_group;" ::: "memory"), simt::bulk_commit());
}
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
  RW_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"), simt::bulk_wait(N, true));
}
template <int N>
__device__ __forceinline__ void bulk_wait() {
  RW_SM90(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"), simt::bulk_wait(N, false));
}

// ---- registers of a warpgroup
// -----------------------------------------------------------------------------------------

// Every warp of a warpgroup gives registers back, or takes them: 24 to 256 a thread, in steps of 8.
template <int Registers>
__device__ __forceinline__ void release_registers() {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0, "setmaxnreg takes 24, 32, .. 256");
  RW_SM90(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers)), simt::set_registers(Registers, false));
}
template <int Registers>
__device__ __forceinline__ void acquire_registers() {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0, "setmaxnreg takes 24, 32, .. 256");
  RW_SM90(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers)), simt::set_registers(Registers, true));
}

// ---- matrix products of a warpgroup
// -----------------------------------------------------------------------------------

// Describes a matrix of bf16 in shared memory for wgmma, in 128-byte rows swizzled as tma_load does: rows of 64
// elements, eight rows are 1024 bytes, 1024-byte aligned.
//   K-major: a row is 64 elements of K of one m or n. `eight_rows`: bytes to the next eight rows. The next 16 of K are
//   32
//     bytes on: advance the descriptor's matrix by 16 elements.
//   MN-major: a row is 64 elements of m or n of one k. `eight_rows`: bytes to the next eight k; `next_64`: bytes to the
//     next 64 of m or n.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* matrix, int eight_rows = 1024, int next_64 = 16) {
#ifdef __CUDACC__
  const uint32_t address = shared_address(matrix);
#else
  const uint32_t address = simt::shared_offset(matrix);
#endif
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | static_cast<uint64_t>(next_64 >> 4) << 16 |
         static_cast<uint64_t>(eight_rows >> 4) << 32 | 1ull << 62;
}

// Before the first wgmma, and after registers of its operands were read or written.
__device__ __forceinline__ void wgmma_fence() {
  RW_SM90(asm volatile("wgmma.fence.sync.aligned;" ::: "memory"), simt::wgmma_fence());
}
__device__ __forceinline__ void wgmma_commit() {
  RW_SM90(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"), simt::wgmma_commit());
}
// Waits until at most N of the newest groups are under way. Their accumulators must not be touched before.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  RW_SM90(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"), simt::wgmma_wait(N));
}

#define RW_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define RW_R1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RW_R2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define RW_R3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RW_R4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define RW_R5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define RW_R6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define RW_R7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RW_R32 RW_R0
#define RW_R64 RW_R0 ", " RW_R1
#define RW_R96 RW_R64 ", " RW_R2
#define RW_R128 RW_R96 ", " RW_R3
#define RW_R192 RW_R128 ", " RW_R4 ", " RW_R5
#define RW_R256 RW_R192 ", " RW_R6 ", " RW_R7
#define RW_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RW_D16(i) RW_D4(i), RW_D4(i + 4), RW_D4(i + 8), RW_D4(i + 12)
#define RW_D32 RW_D16(0)
#define RW_D64 RW_D32, RW_D16(16)
#define RW_D96 RW_D64, RW_D16(32)
#define RW_D128 RW_D96, RW_D16(48)
#define RW_D192 RW_D128, RW_D16(64), RW_D16(80)
#define RW_D256 RW_D192, RW_D16(96), RW_D16(112)

// One instruction; i0 .. i5 are the numbers of the operands behind the accumulators, as text.
#define RW_WGMMA_SS(n, i0, i1, i2, i3, i4)                                                                            \
  if constexpr (N == n)                                                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i2                                                                \
               ", 0;\n"                                                                                               \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" RW_R##n "}, %" i0 ", %" i1                \
                                                                                    ", p, 1, 1, %" i3 ", %" i4 ";\n}" \
               : RW_D##n                                                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(MnMajorA), "n"(MnMajorB))
#define RW_WGMMA_RS(n, i0, i1, i2, i3, i4, i5, i6)                                      \
  if constexpr (N == n)                                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i5                                  \
               ", 0;\n"                                                                 \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" RW_R##n     \
               "}, {%" i0 ", %" i1 ", %" i2 ", %" i3 "}, %" i4 ", p, 1, 1, %" i6 ";\n}" \
               : RW_D##n                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(MnMajorB))

// d = a b, or d += a b: a 64x16 bf16, b 16xN bf16, both in shared memory, d 64xN f32. Warp w of the warpgroup holds the
// rows 16 w ..; d[4 j + i] of lane (g, t) is the element (16 w + g + 8 (i / 2), 8 j + 2 t + i % 2). Asynchronous: d is
// there after wgmma_wait().
template <int N, bool MnMajorA = false, bool MnMajorB = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "no wgmma of this width here");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  RW_WGMMA_SS(32, "16", "17", "18", "19", "20");
  RW_WGMMA_SS(64, "32", "33", "34", "35", "36");
  RW_WGMMA_SS(96, "48", "49", "50", "51", "52");
  RW_WGMMA_SS(128, "64", "65", "66", "67", "68");
  RW_WGMMA_SS(192, "96", "97", "98", "99", "100");
  RW_WGMMA_SS(256, "128", "129", "130", "131", "132");
#else
  RW_SM90(, simt::wgmma(d, N, nullptr, a, b, MnMajorA, MnMajorB, accumulate));
#endif
}

// The same with a in registers: those of mma_16x8x16, of the 16 rows of this warp. They must not be changed before
// wgmma_wait() either.
template <int N, bool MnMajorB = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "no wgmma of this width here");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  RW_WGMMA_RS(32, "16", "17", "18", "19", "20", "21", "22");
  RW_WGMMA_RS(64, "32", "33", "34", "35", "36", "37", "38");
  RW_WGMMA_RS(96, "48", "49", "50", "51", "52", "53", "54");
  RW_WGMMA_RS(128, "64", "65", "66", "67", "68", "69", "70");
  RW_WGMMA_RS(192, "96", "97", "98", "99", "100", "101", "102");
  RW_WGMMA_RS(256, "128", "129", "130", "131", "132", "133", "134");
#else
  RW_SM90(, simt::wgmma(d, N, a, 0, b, false, MnMajorB, accumulate));
#endif
}

#undef RW_WGMMA_SS
#undef RW_WGMMA_RS

}  // namespace rw::cuda
