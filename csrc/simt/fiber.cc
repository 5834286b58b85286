// A thread of a kernel is a fiber: its own stack, and a switch of some nanoseconds. The fibers of a block run on one thread
// of the host, warp after warp, each until it waits for others. Blocks do not run at the same time.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "warp.h"

namespace simt {

thread_local __attribute__((tls_model("initial-exec"))) const Coordinates* coordinates;
thread_local Block* block;
thread_local Thread* self;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;

// Saves what a function must preserve and the stack pointer to *from, and goes on where `to` was saved.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

// Stacks are kept between launches: each is mapped once, with a page below it that must not be touched.
struct Stacks {
  std::vector<char*> all;
  char* get(size_t i) {
    while (all.size() <= i) {
      void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                          -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for another fiber's stack");
      mprotect(memory, kGuard, PROT_NONE);
      all.push_back(static_cast<char*>(memory));
    }
    return all[i];
  }
};
thread_local Stacks stacks;

void leave(State state) {
  self->state = state;
  simt_switch(&self->stack_pointer, block->scheduler);
}

void run_thread() {
  (*block->body)();
  Warp& warp = block->warps[self->warp];
  warp.alive &= ~(1u << self->lane);
  leave(State::done);
  abort();  // a thread that is done is never resumed
}

void prepare(Thread& thread, size_t i) {
  thread.stack = stacks.get(i);
  // Tops of stacks are staggered: with the same low bits they would all fall into the same sets of the cache.
  char* top = thread.stack + kGuard + kStack - (i % 61) * 192;
  auto* words = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--words = nullptr;  // where run_thread would return to; also keeps its frame aligned
  *--words = reinterpret_cast<void*>(run_thread);
  words -= 6;
  memset(words, 0, 6 * sizeof(void*));
  thread.stack_pointer = words;
}

void resume(Thread& thread) {
  self = &thread;
  coordinates = &thread;
  simt_switch(&block->scheduler, thread.stack_pointer);
}

std::string position(const Thread& thread) {
  char text[96];
  snprintf(text, sizeof(text), "block (%u,%u,%u) thread (%u,%u,%u)", thread.block.x, thread.block.y, thread.block.z,
           thread.thread.x, thread.thread.y, thread.thread.z);
  return text;
}

void run_block() {
  for (;;) {
    bool progress = false, all_done = true;
    for (Warp& warp : block->warps) {
      bool again = true;
      while (again) {
        again = false;
        for (int i = warp.first; i < warp.first + warp.count; i++) {
          Thread& thread = block->threads[i];
          if (thread.state != State::ready) continue;
          resume(thread);
          if (!block->error.empty()) return;
          progress = again = true;
        }
      }
      all_done &= warp.alive == 0;
    }
    if (all_done) return;
    if (progress) continue;
    int waiting = 0;
    const Thread* example = nullptr;
    for (const Thread& thread : block->threads)
      if (thread.state == State::waiting) {
        waiting++;
        if (!example) example = &thread;
      }
    block->error = "deadlock: " + std::to_string(waiting) + " of " + std::to_string(block->threads.size()) +
                   " threads wait, for example " + position(*example) + " for " + example->waits_for + " at " +
                   describe_site(example->site);
    return;
  }
}

struct Free {
  void operator()(void* p) const { free(p); }
};

}  // namespace

void wait(const char* what, const void* site) {
  self->waits_for = what;
  self->site = site;
  leave(State::waiting);
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  block->error = position(*self) + ": " + text;
  leave(State::done);
  abort();  // a block with an error is never resumed
}

std::string describe_site(const void* site) {
  char text[32];
  snprintf(text, sizeof(text), "%p", site);
  return text;
}

void run_grid(dim3 grid, dim3 dims, size_t smem, const char* file, int line, const void*,
              const std::function<void()>& body) {
  const size_t count = size_t{dims.x} * dims.y * dims.z;
  const std::string where = std::string(file) + ":" + std::to_string(line) + ": ";
  if (count < 1 || count > 1024) throw std::runtime_error(where + std::to_string(count) + " threads in a block");
  if (smem > 227 * 1024) throw std::runtime_error(where + std::to_string(smem) + " bytes of shared memory");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
    throw std::runtime_error(where + "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                             std::to_string(grid.z) + " blocks");
  Block state;
  block = &state;
  const std::unique_ptr<char, Free> shared(static_cast<char*>(aligned_alloc(1024, (smem + 1024) / 1024 * 1024)));
  state.shared = shared.get();
  state.shared_bytes = smem;
  state.body = &body;
  state.threads.resize(count);
  state.warps.resize((count + 31) / 32);
  for (size_t i = 0; i < count; i++) {
    Thread& thread = state.threads[i];
    thread.index = static_cast<int>(i);
    thread.lane = static_cast<int>(i % 32);
    thread.warp = static_cast<int>(i / 32);
    thread.thread = {static_cast<unsigned>(i % dims.x), static_cast<unsigned>(i / dims.x % dims.y),
                     static_cast<unsigned>(i / dims.x / dims.y)};
    thread.block_dim = dims;
    thread.grid_dim = grid;
  }
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        memset(state.shared, 0xff, smem);
        state.statics.clear();
        for (Barrier& barrier : state.barriers) barrier = {};
        for (size_t w = 0; w < state.warps.size(); w++) {
          Warp& warp = state.warps[w];
          warp.first = static_cast<int>(32 * w);
          warp.count = static_cast<int>(count - 32 * w < 32 ? count - 32 * w : 32);
          warp.alive = warp.count == 32 ? 0xffffffffu : (1u << warp.count) - 1;
          warp.pending.clear();
        }
        for (size_t i = 0; i < count; i++) {
          Thread& thread = state.threads[i];
          thread.block = {x, y, z};
          thread.state = State::ready;
          thread.copies.clear();
          thread.group = 0;
          prepare(thread, i);
        }
        run_block();
        for (StaticVariable& variable : state.statics) free(variable.memory);
        if (!state.error.empty()) {
          block = nullptr;
          throw std::runtime_error(where + state.error);
        }
      }
  block = nullptr;
}

void* dynamic_shared(size_t bytes) {
  if (bytes > block->shared_bytes)
    fail("the kernel uses %zu bytes of shared memory, the launch gave %zu", bytes, block->shared_bytes);
  return block->shared;
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  for (const StaticVariable& variable : block->statics)
    if (variable.key == key) return variable.memory;
  void* memory = aligned_alloc(alignment < 16 ? 16 : alignment, (bytes + 63) / 64 * 64);
  memset(memory, 0xff, bytes);
  block->statics.push_back({key, memory});
  return memory;
}

int lane() { return self->lane; }

void collective(uint32_t mask, const char* what, void* slot, Compute compute) {
  Warp& warp = block->warps[self->warp];
  const uint32_t bit = 1u << self->lane;
  if (!(mask & bit)) fail("%s: lane %d is not in its own mask %08x", what, self->lane, mask);
  if (mask & ~warp.alive) fail("%s: mask %08x names lanes that have returned (alive are %08x)", what, mask, warp.alive);
  size_t i = 0;
  while (i < warp.pending.size() && (warp.pending[i].mask != mask || warp.pending[i].arrived & bit)) i++;
  if (i == warp.pending.size()) warp.pending.push_back({mask, 0, what, compute, {}});
  Rendezvous& meeting = warp.pending[i];
  if (meeting.compute != compute)
    fail("%s: lane %d meets lanes that execute %s with the same mask", what, self->lane, meeting.what);
  meeting.slots[self->lane] = slot;
  meeting.arrived |= bit;
  if (meeting.arrived != mask) return wait(what, __builtin_return_address(0));
  compute(meeting.slots, mask);
  for (int l = 0; l < warp.count; l++)
    if (mask & ~bit & (1u << l)) block->threads[warp.first + l].state = State::ready;
  warp.pending.erase(warp.pending.begin() + static_cast<std::ptrdiff_t>(i));
}

// Shared by __syncthreads (0) and named barriers.
static void arrive(int id, int threads, const char* what, const void* site) {
  Barrier& barrier = block->barriers[id];
  if (barrier.arrived > 0 && barrier.expected != threads)
    fail("%s: barrier %d is used for %d and for %d threads at the same time", what, id, barrier.expected, threads);
  barrier.expected = threads;
  if (++barrier.arrived < threads) return wait(what, site);
  barrier.arrived = 0;
  for (Thread& thread : block->threads)
    if (thread.state == State::waiting && thread.waits_for == what && &thread != self) thread.state = State::ready;
}

void named_barrier(int id, int threads) {
  static const char* const names[16] = {
      nullptr,      "barrier 1",  "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
      "barrier 8",  "barrier 9",  "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  if (id < 1 || id > 15) fail("barrier %d: named barriers are 1 to 15", id);
  if (threads < 32 || threads % 32 || threads > static_cast<int>(block->threads.size()))
    fail("barrier %d: %d threads, of a block of %zu", id, threads, block->threads.size());
  arrive(id, threads, names[id], __builtin_return_address(0));
}

}  // namespace simt

void __syncthreads() {
  using namespace simt;
  static const char* const what = "__syncthreads";
  for (const Warp& warp : block->warps) {
    const uint32_t all = warp.count == 32 ? 0xffffffffu : (1u << warp.count) - 1;
    if (warp.alive != all) fail("__syncthreads: some threads of the block have returned");
  }
  arrive(0, static_cast<int>(block->threads.size()), what, __builtin_return_address(0));
}
