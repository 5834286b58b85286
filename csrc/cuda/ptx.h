// All inline PTX, and for each instruction the twin that simt executes. Nothing else in the project contains asm for a
// GPU. Fragment layouts: PTX ISA, "Matrix multiply-accumulate operation using mma instruction"; g = lane / 4, t = lane
// % 4.
#pragma once
#include "device.h"
#ifndef __CUDACC__
#include "../simt/async.h"
#endif

namespace rw::cuda {

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// ---- asynchronous copies (sm_80) ------------------------------------------------------------------------------------

// Copies 16 bytes from global to shared memory, both 16-byte aligned, past the L1; zeros where not `valid` (then
// nothing is read, and `from` may lie beyond the tensor). Seen by this thread after cp_async_wait(), by others after a
// barrier on top of that.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  simt::cp_async(to, from, 16, valid ? 16 : 0);
#endif
}

// The same with 4 bytes, through the L1.
__device__ __forceinline__ void cp_async_4(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
#else
  simt::cp_async(to, from, 4, valid ? 4 : 0);
#endif
}

// Ends a group of copies of this thread.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit();
#endif
}

// Waits until at most N of this thread's newest groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  simt::cp_async_wait(N);
#endif
}

// ---- matrix fragments (sm_80) ---------------------------------------------------------------------------------------

// Loads four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes,
// aligned); r[i] of lane (g, t) gets the elements (g, 2t) and (g, 2t + 1) of matrix i, the first in the lower half.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  simt::ldmatrix(r, 4, row, false);
#endif
}

// The same, each matrix transposed: r[i] of lane (g, t) gets the elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  simt::ldmatrix(r, 4, row, true);
#endif
}

// d += a b: a 16x16 bf16, b 16x8 bf16, d 16x8 f32.
// a[0] (g, 2t..), a[1] (g + 8, 2t..), a[2] (g, 2t + 8..), a[3] (g + 8, 2t + 8..); b[0] (2t.., g), b[1] (2t + 8.., g);
// d[0], d[1] (g, 2t..), d[2], d[3] (g + 8, 2t..).
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  simt::mma_16x8x16(d, a, b0, b1);
#endif
}

// Transposes an 8x8 matrix of 16-bit elements held as one fragment register.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
#ifdef __CUDACC__
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
#else
  return simt::movmatrix_trans(x);
#endif
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// Two floats rounded to bf16 (to nearest, ties to even; NaN stays NaN), `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
#endif
}

// 2^x with an error of 2 units in the last place; 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

// 1 / x with an error of 1 unit in the last place; 0 where the result would be denormal.
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = 1 / (fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x);
  return fabsf(y) < 0x1p-126f ? copysignf(0.0f, y) : y;
#endif
}

// threadIdx.x, read anew wherever it is asked for: what is computed from it does not stay in registers across a loop.
__device__ __forceinline__ int thread_index_anew() {
#ifdef __CUDACC__
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#else
  return threadIdx.x;
#endif
}

// ---- barriers -------------------------------------------------------------------------------------------------------

// Barrier `id` (1 .. 15; 0 is __syncthreads) among `threads` threads of the block, a multiple of 32.
__device__ __forceinline__ void named_barrier(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  simt::named_barrier(id, threads);
#endif
}

// ---- notes ----------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
template <size_t Bytes>
__device__ __forceinline__ void note_dyn_smem() {
  asm volatile("// dyn_smem %0" ::"n"(Bytes));
}
#endif

}  // namespace rw::cuda
