// A thread of a kernel is a fiber: its own stack, and a switch of some nanoseconds. The fibers of a block run on one
// thread of the host, warp after warp, each until it waits for others. Blocks run one after the other, or on several
// threads of the host (ROPEWALK_SIMT_THREADS).
//
// ROPEWALK_SIMT_ORDER=forward|reverse|random[:seed] is the order of blocks, warps and lanes.
#include "fiber.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "engine.h"
#include "lint.h"
#include "race.h"
#include "sanitizer.h"

namespace simt {

SIMT_THREAD const Coordinates* coordinates;
SIMT_THREAD Block* block;
SIMT_THREAD Thread* self;

namespace {

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
  bool abandoned = false;  // fibers were left in the middle of their work
  const void* host = nullptr;
  size_t host_bytes = 0;  // the stack of the thread that runs the fibers
  char* get(size_t i) {
    while (all.size() <= i) {
      void* memory = mmap(nullptr, kStack + kStackGuard, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for another fiber's stack");
      mprotect(memory, kStackGuard, PROT_NONE);
      all.push_back(static_cast<char*>(memory));
    }
    return all[i];
  }
};
SIMT_THREAD Stacks* stacks;

// Sets of stacks that no thread uses now.
class StackStore {
 public:
  std::unique_ptr<Stacks> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Stacks>();
    auto result = std::move(free_.back());
    free_.pop_back();
    return result;
  }
  void give(std::unique_ptr<Stacks> set) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(set));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Stacks>> free_;
};
StackStore stack_store;

void leave(State state) {
  Thread& thread = *self;
  thread.state = state;
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &thread.fake_stack, stacks->host, stacks->host_bytes);
  simt_switch(&thread.stack_pointer, block->scheduler);
  __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
}

void run_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &stacks->host, &stacks->host_bytes);
  block->call->run(block->call->arguments.get());
  Warp& warp = block->warps[static_cast<size_t>(self->warp)];
  const uint32_t bit = 1u << self->lane;
  for (const Rendezvous& meeting : warp.pending)
    if (meeting.mask & bit)
      fail("it returns while other lanes wait for it: %s at %s, mask %08x", meeting.what,
           describe_site(meeting.site).c_str(), meeting.mask);
  if (block->barriers[0].arrived > 0)
    fail("it returns while other threads wait for it: __syncthreads at %s",
         describe_site(block->barriers[0].site).c_str());
  warp.alive &= ~bit;
  leave(State::done);
  abort();  // a thread that is done is never resumed
}

void prepare(Thread& thread, size_t i) {
  thread.stack = stacks->get(i);
  // Frames that were never left are still poisoned: the outermost of every fiber, all of abandoned ones.
  const size_t stale = stacks->abandoned ? kStack : 16 * 1024;
  ASAN_UNPOISON_MEMORY_REGION(thread.stack + kStackGuard + kStack - stale, stale);
  // Tops of stacks are staggered: with the same low bits they would all fall into the same sets of the cache.
  char* top = thread.stack + kStackGuard + kStack - (i % 61) * 192;
  auto* words = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--words = nullptr;  // where run_thread would return to; also keeps its frame aligned
  *--words = reinterpret_cast<void*>(run_thread);
  words -= 6;
  memset(words, 0, 6 * sizeof(void*));
  thread.stack_pointer = words;
  thread.fake_stack = nullptr;
}

void resume(Thread& thread) {
  self = &thread;
  coordinates = &thread;
  __sanitizer_start_switch_fiber(&block->fake_stack, thread.stack + kStackGuard, kStack);
  simt_switch(&block->scheduler, thread.stack_pointer);
  __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
  self = nullptr;
}

// Small, and the same on every machine.
struct Random {
  uint64_t state;
  using result_type = uint32_t;
  static constexpr uint32_t min() { return 0; }
  static constexpr uint32_t max() { return UINT32_MAX; }
  uint32_t operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  template <typename T>
  void shuffle(std::vector<T>& x) {
    for (size_t i = x.size(); i > 1; i--) std::swap(x[i - 1], x[operator()() % i]);
  }
};

template <typename T>
std::vector<T> in_order(T count, Order order, Random& random) {
  std::vector<T> result(static_cast<size_t>(count));
  std::iota(result.begin(), result.end(), T{0});
  if (order == Order::reverse) std::reverse(result.begin(), result.end());
  if (order == Order::random) random.shuffle(result);
  return result;
}

std::string deadlock() {
  int waiting = 0;
  std::vector<std::pair<std::string, int>> places;
  for (const Thread& thread : block->threads) {
    if (thread.state != State::waiting) continue;
    waiting++;
    const std::string place =
        std::string(thread.waits_for) + " at " + describe_site(thread.site) + ", for example " + position(thread);
    bool known = false;
    for (auto& [text, count] : places)
      if (text.compare(0, text.find(", for example"), place, 0, place.find(", for example")) == 0)
        count++, known = true;
    if (!known) places.push_back({place, 1});
  }
  std::string text = "deadlock: " + std::to_string(waiting) + " of " + std::to_string(block->threads.size()) +
                     " threads wait for what nobody will do";
  for (const auto& [place, count] : places) text += "; " + std::to_string(count) + " for " + place;
  return text;
}

// Runs the threads of a block until all have returned.
void run_threads(const Settings& settings, Random& random) {
  std::vector<int> warps = in_order(static_cast<int>(block->warps.size()), settings.order, random);
  std::vector<int> lanes = in_order(32, settings.order, random);
  for (;;) {
    bool progress = false, all_done = true;
    for (const int w : warps) {
      Warp& warp = block->warps[static_cast<size_t>(w)];
      bool again = true;
      while (again) {
        again = false;
        for (const int lane : lanes) {
          if (lane >= warp.count) continue;
          Thread& thread = block->threads[static_cast<size_t>(warp.first + lane)];
          if (thread.state != State::ready) continue;
          resume(thread);
          if (!block->error.empty()) return;
          progress = again = true;
        }
        if (settings.order == Order::random) {
          random.shuffle(lanes);
          again = again && random() % 4 != 0;  // sometimes another warp comes first
        }
      }
      all_done &= warp.alive == 0;
    }
    if (all_done) return;
    // Copies by TMA arrive when nobody can go on without them; in random order also earlier.
    const size_t pick = settings.order == Order::random ? random() : settings.order == Order::reverse ? SIZE_MAX : 0;
    if (!progress || (settings.order == Order::random && random() % 8 == 0)) {
      if (!engine_step(pick) && !progress) block->error = deadlock();
      if (!block->error.empty()) return;
    }
    if (settings.order == Order::random) random.shuffle(warps);
  }
}

void run_block(dim3 at, const Settings& settings, Random& random) {
  open_race_block(at);
  fill_shared(block->shared);
  for (Barrier& barrier : block->barriers) {
    barrier.arrived = 0;
    barrier.waiting.clear();
  }
  const size_t count = block->threads.size();
  for (size_t w = 0; w < block->warps.size(); w++) {
    Warp& warp = block->warps[w];
    warp.first = static_cast<int>(32 * w);
    warp.count = static_cast<int>(count - 32 * w < 32 ? count - 32 * w : 32);
    warp.alive = warp.count == 32 ? 0xffffffffu : (1u << warp.count) - 1;
    warp.pending.clear();
  }
  for (size_t i = 0; i < count; i++) {
    Thread& thread = block->threads[i];
    thread.block = {at.x, at.y, at.z};
    thread.state = State::ready;
    thread.group = 0;
    thread.proxy.epoch = 0;
    prepare(thread, i);
  }
  stacks->abandoned = false;
  try {
    run_threads(settings, random);
  } catch (const std::runtime_error& error) {
    block->error = error.what();
  }
  if (lint_wanted()) lint_block_ends();
  std::string undone = close_engine();
  for (Thread& thread : block->threads) {
    // Nothing says that the shared memory is not another block's by the time they land.
    if (!thread.copies.empty() && undone.empty() && block->error.empty())
      undone = "the block ended while a copy by cp.async was under way, issued at " +
               describe_site(thread.copies.front().site);
    for (const PendingCopy& copy : thread.copies) dropped(copy.to, static_cast<size_t>(copy.bytes));
    thread.copies.clear();
  }
  if (block->error.empty()) {
    block->error = undone.empty() ? check_red_zones(block->shared) : undone;
    if (!block->error.empty() && block->error.rfind("block (", 0) != 0)
      block->error = "block (" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) +
                     "): " + block->error;
  } else {
    stacks->abandoned = true;
  }
}

}  // namespace

std::string position(const Thread& thread) {
  char text[128];
  if (thread.index >= static_cast<int>(block->threads.size())) {
    snprintf(text, sizeof(text), "block (%u,%u,%u) a copy by TMA", thread.block.x, thread.block.y, thread.block.z);
    return text;
  }
  snprintf(text, sizeof(text), "block (%u,%u,%u) thread (%u,%u,%u), warp %d lane %d", thread.block.x, thread.block.y,
           thread.block.z, thread.thread.x, thread.thread.y, thread.thread.z, thread.warp, thread.lane);
  return text;
}

void wait(const char* what, const void* site) {
  self->waits_for = what;
  self->site = site;
  leave(State::waiting);
}

void fail_as(const Thread& thread, const std::string& problem) {
  quiet++;  // until the launch ends
  const std::string text = position(thread) + ": " + problem;
  if (!self) throw std::runtime_error(text);  // work that no thread does (engine_step)
  block->error = text;
  leave(State::done);
  abort();  // a block with an error is never resumed
}

void fail(const char* format, ...) {
  quiet++;
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (!self) throw std::runtime_error(text);
  fail_as(*self, text);
}

void run_grid(dim3 grid, dim3 dims, size_t smem, const char* file, int line, const void* kernel, const Call& call) {
  const size_t count = size_t{dims.x} * dims.y * dims.z;
  const std::string where = std::string(file) + ":" + std::to_string(line) + ": ";
  if (count < 1 || count > 1024) throw std::runtime_error(where + std::to_string(count) + " threads in a block");
  const size_t limit = shared_limit(kernel, smem);
  if (smem > limit)
    throw std::runtime_error(where + std::to_string(smem) +
                             " bytes of shared memory: a block of this kernel may have " + std::to_string(limit));
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
    throw std::runtime_error(where + "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                             std::to_string(grid.z) + " blocks");
  const Settings settings = read_settings();
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  Random random = {settings.seed};
  const std::vector<size_t> order = in_order(blocks, settings.order, random);
  const std::shared_ptr<const Regions> regions = memory_regions();
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::string error;

  const auto work = [&](uint64_t worker) {
    Block state;
    block = &state;
    std::unique_ptr<Stacks> own_stacks = stack_store.take();
    stacks = own_stacks.get();
    state.call = &call;
    state.kernel = kernel;
    state.settings = &settings;
    state.regions = regions;
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
    open_shared(state.shared, smem, limit);
    Random own_random = {random.state + worker};
    while (state.error.empty()) {
      const size_t i = next++;
      if (i >= blocks) break;
      const size_t at = order[i];
      run_block({static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                 static_cast<unsigned>(at / grid.x / grid.y)},
                settings, own_random);
    }
    close_shared(state.shared);
    block = nullptr;
    quiet = 0;
    stack_store.give(std::move(own_stacks));
    if (state.error.empty()) return;
    next = blocks;
    const std::lock_guard<std::mutex> lock(mutex);
    if (error.empty()) error = state.error;
  };

  // The race detector knows one thread of the host.
  const size_t workers = instrumented ? 1 : std::min(static_cast<size_t>(settings.threads), blocks);
  open_race_launch();
  std::vector<std::thread> others;
  for (size_t i = 1; i < workers; i++) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
  if (error.empty()) return;
  if (settings.order == Order::random) error += " (order random:" + std::to_string(settings.seed) + ")";
  throw std::runtime_error(where + describe_function(kernel) + ": " + error);
}

int lane() { return self->lane; }

}  // namespace simt
