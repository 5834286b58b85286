// The state of a running block and what the files of simt/ know of each other.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

// ---- the running block
// ------------------------------------------------------------------------------------------------

enum class State : uint8_t { ready, waiting, done };

// A copy by cp.async that has been issued and not yet waited for. It delivers what the source held when it was issued.
struct PendingCopy {
  char* to;
  const char* from;
  int bytes, valid, group;
  char data[16];
  const void* site;
};

// What someone knows of the threads of a block (race.cc): what thread i did before its time seen[i]. Counted anew after
// every __syncthreads, which orders everything. A type of its own: see Quiet.
struct Time {
  uint16_t ticks = 0;
};
struct Clock {
  uint32_t epoch = 0;
  std::vector<Time> seen;
};

struct Thread : Coordinates {
  void* stack_pointer;
  char* stack;
  void* fake_stack;  // of the address sanitizer
  int index, lane, warp;
  State state;
  const char* waits_for;
  const void* site;  // the caller's address, for messages
  std::vector<PendingCopy> copies;
  int group;  // cp.async groups that were committed
  Clock clock;
  Clock proxy;  // what it knew when it last executed fence.proxy.async
};

// Lanes of a warp that wait for each other.
struct Rendezvous {
  uint32_t mask, arrived;
  const char* what;
  const void* site;
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
  const void* site = nullptr;
  std::vector<Thread*> waiting;
  Clock clock;  // of those that have arrived
};

// A part of shared memory with a meaning of its own: a static variable (`key` says which) or a red zone.
struct Part {
  const void* key;
  size_t offset, bytes;
};

// Shared memory of a block: `dynamic` bytes as the launch says, a red zone, then static variables.
struct Shared {
  char* memory = nullptr;
  size_t dynamic = 0, used = 0, bytes = 0;
  size_t limit = 0;  // of the dynamic part and the static variables, without red zones
  std::vector<Part> statics, red_zones;
  const void* layout = nullptr;  // of the dynamic part: whose red zones these are
};

// Device memory of cudaMalloc.
struct Region {
  char* begin;
  size_t bytes;
  struct Shadow* shadow;  // shadow.h
};
using Regions = std::vector<Region>;  // sorted by address

enum class Order { forward, reverse, random };
struct Settings {
  Order order = Order::forward;  // ROPEWALK_SIMT_ORDER
  uint64_t seed = 1;
  int threads = 1;              // ROPEWALK_SIMT_THREADS
  int skip = 0;                 // ROPEWALK_SIMT_SKIP: the barrier to leave out
  const char* sites = nullptr;  // ROPEWALK_SIMT_SITES: the file that lists all barriers
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  Shared shared;
  std::shared_ptr<const Regions> regions;
  std::shared_ptr<struct Engine> engine;  // engine.h; null where nothing of sm_90 is used
  const Call* call = nullptr;
  const void* kernel = nullptr;
  const Settings* settings = nullptr;
  void* scheduler = nullptr;  // stack pointer of the scheduler while a fiber runs
  void* fake_stack = nullptr;
  std::string error;
};

// Of the host's thread. Found without a call, which the general model of a shared library would need each time.
#define SIMT_THREAD __thread __attribute__((tls_model("initial-exec")))
extern SIMT_THREAD Block* block;
extern SIMT_THREAD Thread* self;  // null while no thread of a kernel runs

// While it lives, hooks do nothing. The linker keeps one copy of a function of the standard library for the emulator
// and the kernels, which may be the one that reports what it does: where the emulator uses such functions in a thread
// of a kernel, they must not be taken for the kernel's own accesses.
extern SIMT_THREAD int quiet;
struct Quiet {
  Quiet() { quiet++; }
  ~Quiet() { quiet--; }
};

constexpr size_t kStack = 256 * 1024;
constexpr size_t kStackGuard = 4096;

// Gives the processor to another fiber until someone makes this one ready.
void wait(const char* what, const void* site);

// launch(), once it is the grid's turn in its stream (runtime.cc).
void run_grid(dim3 grid, dim3 block, size_t smem, const char* file, int line, const void* kernel, const Call& call);

// "block (0,1,0) thread (33,0,0) of warp 1"
std::string position(const Thread& thread);

// fail(), named after another thread.
[[noreturn]] void fail_as(const Thread& thread, const std::string& problem);

// ---- shared memory (shared.cc)
// ----------------------------------------------------------------------------------------

void open_shared(Shared& shared, size_t dynamic, size_t limit);
// What a block of a kernel with so much dynamic memory may have in all (runtime.cc).
size_t shared_limit(const void* kernel, size_t dynamic);
void fill_shared(Shared& shared);             // before each block
std::string check_red_zones(Shared& shared);  // after each block: what is wrong
void close_shared(Shared& shared);

// Ends the block unless all of [p, p + bytes) is shared memory, or device memory, that the kernel may use.
void require_shared(const void* p, size_t bytes, const char* what, const void* site);
void require_device(const void* p, size_t bytes, const char* what, const void* site);

// ---- call sites and settings (site.cc)
// --------------------------------------------------------------------------------

// "ptx.h:62 from matmul.cu:140": where a code address lies in the source, as far as the debug information tells.
std::string describe_site(const void* site);

// The name of the function at this address, without template arguments.
std::string describe_function(const void* address);

// Whether two addresses are the same place in the source: a compiler copies code.
bool same_site(const void* a, const void* b);

// Whether this is constant data of the library that the kernels are in.
bool is_constant(const void* p, size_t bytes);

// Whether this barrier is the one to leave out. Every barrier asks.
bool skipped(const char* what, const void* site);

// Read anew for each launch: a test leaves out one barrier after the other.
Settings read_settings();

// ---- the runtime's calls (runtime.cc, memory.cc)
// ----------------------------------------------------------------------

// Sets what cudaGetLastError gives.
cudaError_t failed(cudaError_t error);

// Why memory cannot be allocated now: this thread captures a stream, or the device is lost. cudaSuccess if it can.
cudaError_t may_allocate();

// Bytes of device memory that the simulated card has, and those in use now.
size_t memory_total();
size_t memory_used();

// All device memory; what is allocated later is not in it.
std::shared_ptr<const Regions> memory_regions();

// The allocation that holds p, or the nearest one below it, or null.
const Region* find_region(const Regions& regions, const void* p);

// Puts work into a stream. `late`: it is done when somebody waits for it or something else follows on the stream, as a
// copy by DMA may be.
void enqueue(cudaStream_t stream, bool late, std::function<void()> work);

// Does all late copies of all streams, as whoever frees memory must.
void finish_copies();

// Whether this is memory of cudaHostAlloc.
bool pinned(const void* memory);

}  // namespace simt
