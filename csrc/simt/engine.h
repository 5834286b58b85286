// What runs beside the threads of a block on sm_90: barriers in shared memory, copies by the tensor memory accelerator,
// matrix products of warpgroups. For the files of simt/ only.
#pragma once
#include <deque>
#include <map>

#include "async.h"
#include "fiber.h"

namespace simt {

struct MBarrierState {
  const void* at;
  int arrivals, pending;  // of a phase; still to come in this one
  int64_t bytes;          // still to come
  int parity;             // of the phase that is under way
  Clock clock, done;      // what those know that have arrived in this phase; that arrived in the last one
  uint32_t epoch;         // when it was made: see Moment
  int maker;
  uint16_t maker_clock;
  bool fenced;          // the asynchronous proxy knows it
  bool loaded, unseen;  // a load has landed in this phase; in one that ended, and nobody has waited for it yet
  struct Waiter {
    Thread* thread;
    int parity;
  };
  std::vector<Waiter> waiting;
};

// One row of bytes of a copy, at an offset in shared memory; chunks of 16 bytes may lie elsewhere when swizzled.
struct Row {
  char* device;  // null: outside of the tensor
  size_t shared, bytes;
};

struct Transfer {
  std::vector<Row> rows;
  bool swizzled, adds;
  MBarrierState* barrier;  // of a load
  int group;               // of a store
  Thread* agent;           // in whose name it is done
  const void* site;
  bool read = false;  // a store has read its shared memory
};

// Accumulators of a warp while products into them are under way: the 16 rows of the warp.
struct Accumulators {
  float* d[32];
  int n, pending;
  std::vector<float> value;
};

struct WarpProduct {
  std::vector<float> a;  // from registers; else empty
  uint64_t a_descriptor, b_descriptor;
  int n, group;
  bool mn_major_a, mn_major_b, accumulate;
  const void* accumulators;
  const void* site;
};

struct WarpEngine {
  bool fenced = false;
  int group = 0, issued = 0, registers = 0;
  std::deque<WarpProduct> products;
  std::map<const void*, Accumulators> accumulators;  // by the address in lane 0
};

struct Engine {
  std::vector<Thread> agents;  // 32: copy i is done in the name of agent i % 32, a thread of a warp of its own
  int issued = 0;
  std::deque<MBarrierState> barriers;
  std::deque<Transfer> loads;
  std::map<const Thread*, std::deque<Transfer>> stores;
  std::map<const Thread*, int> groups;
  std::vector<WarpEngine> warps;
};

// The block's, made when it is first needed.
Engine& engine();

// The mbarrier at this address, which `what` uses.
MBarrierState& use_barrier(const void* at, const char* what, const void* site);

// Ends the phase if nothing is to come any more.
void complete(MBarrierState& state);

// Completes one load that is under way, the `pick`-th modulo their number. False if there is none.
bool engine_step(size_t pick);

// When all threads have returned: what they left undone.
std::string close_engine();

// What the wgmma of a warp left undone.
std::string unfinished_products(const Engine& engine);

bool is_mbarrier(const void* p);

// "; mbarrier at smem+512: 1 of 4 arrivals and 8192 bytes to come" for a thread that waits for it.
std::string describe_mbarrier(const Thread& thread);

// The address in shared memory with the 16-byte chunks of 128-byte rows swizzled.
inline size_t swizzle_128(size_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

}  // namespace simt
