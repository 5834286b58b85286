// The state of a running block, for the files of simt/ only.
#pragma once
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

enum class State : uint8_t { ready, waiting, done };

// A copy by cp.async that has been issued and not yet waited for.
struct PendingCopy {
  void* to;
  const void* from;
  int bytes, valid, group;
};

struct Thread : Coordinates {
  void* stack_pointer;
  char* stack;
  int index, lane, warp;
  State state;
  const char* waits_for;
  const void* site;  // the caller's address, for messages
  std::vector<PendingCopy> copies;
  int group;  // cp.async groups that were committed
};

// Lanes of a warp that wait for each other.
struct Rendezvous {
  uint32_t mask, arrived;
  const char* what;
  void (*compute)(void* const*, uint32_t);
  void* slots[32];
};

struct Warp {
  int first, count;  // threads
  uint32_t alive;    // lanes that have not returned
  std::vector<Rendezvous> pending;
};

struct Barrier {
  int arrived = 0, expected = 0;
};

struct StaticVariable {
  const void* key;
  void* memory;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  char* shared = nullptr;  // dynamic shared memory
  size_t shared_bytes = 0;
  std::vector<StaticVariable> statics;
  const std::function<void()>* body = nullptr;
  void* scheduler = nullptr;  // stack pointer of the scheduler while a fiber runs
  std::string error;
};

extern thread_local Block* block;
extern thread_local Thread* self;

// launch(), once it is the grid's turn in its stream (runtime.cc).
void run_grid(dim3 grid, dim3 block, size_t smem, const char* file, int line, const void* kernel,
              const std::function<void()>& body);

// Sets what cudaGetLastError gives.
cudaError_t failed(cudaError_t error);

// Why memory cannot be allocated now: this thread captures a stream, or the device is lost. cudaSuccess if it can.
cudaError_t may_allocate();

// Bytes of device memory that the simulated card has, and those in use now.
size_t memory_total();
size_t memory_used();

// Puts work into a stream. `late`: it is done when somebody waits for it or something else follows on the stream, as a
// copy by DMA may be.
void enqueue(cudaStream_t stream, bool late, std::function<void()> work);

// Does all late copies of all streams, as whoever frees memory must.
void finish_copies();

// Whether this is memory of cudaHostAlloc.
bool pinned(const void* memory);

// Gives the processor to another fiber until someone makes this one ready.
void wait(const char* what, const void* site);

// Where a code address lies in the source, as far as the debug information tells.
std::string describe_site(const void* site);

}  // namespace simt
