// Copies and products that happen later: cp.async of sm_80; barriers in shared memory, copies by the tensor memory
// accelerator and matrix products of warpgroups of sm_90a. What is under way holds NaN until it is waited for, so that
// a wait that is missing or comes too early shows in the numbers.
#pragma once
#include "simt.h"

namespace simt {

// Copies `valid` bytes and zeros up to `bytes`, at the wait that ends it.
void cp_async(void* to, const void* from, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(int groups);

// What the functions of ptx90.h of the same names do; described there.
void mbarrier_init(void* barrier, int arrivals);
void mbarrier_arrive(void* barrier, int bytes);
void mbarrier_wait(void* barrier, int parity);
void fence_mbarrier_init();
void fence_proxy_async();

struct TensorMap {
  char* data;
  size_t element;
  int rank;
  uint64_t dims[4], strides[4];  // strides in bytes
  uint32_t box[4];
  bool swizzled;
};
TensorMap make_tensor_map(const void* data, size_t element, int rank, const uint64_t* dims, const uint64_t* strides,
                          const uint32_t* box, bool swizzled);

void tma_load(void* to, const TensorMap& map, void* barrier, int rank, int c0, int c1, int c2, int c3);
void tma_store(const TensorMap& map, const void* from, int rank, int c0, int c1, int c2, int c3);
void bulk_load(void* to, const void* from, int bytes, void* barrier);
void bulk_store(void* to, const void* from, int bytes, bool adds);
void bulk_commit();
void bulk_wait(int groups, bool read);

void set_registers(int count, bool acquire);

// Address within the block's shared memory, as descriptors hold it.
uint32_t shared_offset(const void* p);

// `a_registers`: null if a is in shared memory too.
void wgmma(float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool mn_major_a, bool mn_major_b,
           bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);

}  // namespace simt
