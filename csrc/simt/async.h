// Copies that happen later: cp.async here; mbarrier, TMA and wgmma of sm_90 below. What is under way holds NaN until it
// is waited for, so that a wait that is missing or comes too early shows in the numbers.
#pragma once
#include "simt.h"

namespace simt {

// Copies `valid` bytes and zeros up to `bytes`, at the wait that ends it.
void cp_async(void* to, const void* from, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(int groups);

}  // namespace simt
