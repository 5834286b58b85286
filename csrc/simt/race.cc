#include "race.h"

#include <algorithm>
#include <stdexcept>

#include "engine.h"
#include "lint.h"
#include "shadow.h"

namespace simt {

bool instrumented = false;

namespace {

// One launch runs at a time in this flavour, on one thread.
uint32_t epoch = 1, block_epoch = 1, launch_epoch = 1;
struct BlockStart {
  uint32_t epoch;
  dim3 at;
};
std::vector<BlockStart> block_starts;
std::vector<Cell> shared_cells;
std::vector<Reader> pool(1);
thread_local std::string host_error;

// Code addresses, as the distance from this library's own code.
uint32_t pack(const void* site) {
  return static_cast<uint32_t>(static_cast<const char*>(site) - reinterpret_cast<const char*>(order_all));
}
const void* unpack(uint32_t pc) { return reinterpret_cast<const char*>(order_all) + static_cast<int32_t>(pc); }

void next_epoch() {
  if (++epoch == 0) throw std::runtime_error("simt: the race detector has run out of epochs; restart the process");
  pool.resize(1);
}

// A clock of an earlier epoch knows nothing of this one.
void refresh(Clock& clock) {
  if (clock.epoch == epoch) return;
  clock.epoch = epoch;
  clock.seen.assign(32 * (block->warps.size() + 1), Time{});  // the last warp stands for copies by TMA (engine.h)
}

void merge(Clock& to, const Clock& from) {
  for (size_t i = 0; i < to.seen.size(); i++)
    if (to.seen[i].ticks < from.seen[i].ticks) to.seen[i] = from.seen[i];
}

uint16_t own_clock(const Thread& thread) {
  return thread.clock.epoch == epoch ? thread.clock.seen[static_cast<size_t>(thread.index)].ticks : 0;
}

bool has_seen(const Thread& thread, int other, uint16_t clock) {
  if (other == thread.index) return true;
  return thread.clock.epoch == epoch && thread.clock.seen[static_cast<size_t>(other)].ticks > clock;
}

// Who accesses: a thread, or some lanes of its warp together.
struct Accessor {
  const Thread& thread;  // the one that is named
  uint32_t lanes;
  const void* site;
  uint32_t pc;
  bool asynchronous;
  bool together;
  // The lanes by their clocks, which are mostly the same.
  struct Group {
    uint32_t lanes;
    uint16_t clock;
  };
  int groups = 0;
  Group group[32];

  Accessor(const Thread& thread, uint32_t lanes, const void* site, bool asynchronous)
      : thread(thread),
        lanes(lanes),
        site(site),
        pc(pack(site)),
        asynchronous(asynchronous),
        together((lanes & (lanes - 1)) != 0) {
    if (!together) {
      group[groups++] = {lanes, own_clock(thread)};
      return;
    }
    const Thread* const first = &thread - thread.lane;
    for (uint32_t left = lanes; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const uint16_t clock = own_clock(first[lane]);
      int i = 0;
      while (i < groups && group[i].clock != clock) i++;
      if (i == groups) group[groups++] = {0, clock};
      group[i].lanes |= 1u << lane;
    }
  }

  // Whether what thread `other` did at this date came before.
  bool after(uint32_t when, int other, uint16_t clock) const {
    if (when != epoch) return when >= block_epoch || when < launch_epoch;
    if (!together) return has_seen(thread, other, clock);
    const Thread* const first = &thread - thread.lane;
    for (uint32_t left = lanes; left; left &= left - 1)
      if (!has_seen(first[__builtin_ctz(left)], other, clock)) return false;
    return true;
  }
};

struct Place {
  const char* memory;
  size_t offset;
  size_t bytes;  // of the access
};

std::string warp_and_lane(int thread) {
  if (thread >= static_cast<int>(32 * block->warps.size())) return "a copy by TMA";
  return "warp " + std::to_string(thread / 32) + " lane " + std::to_string(thread % 32);
}

std::string block_of(uint32_t when) {
  for (size_t i = block_starts.size(); i-- > 0;)
    if (block_starts[i].epoch <= when) {
      const dim3 at = block_starts[i].at;
      return "block (" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
    }
  return "another block";
}

[[noreturn]] void report(const Accessor& who, const Place& place, Access kind, const std::string& problem) {
  const char* const what = kind == Access::write ? "write" : kind == Access::atomic ? "atomic operation" : "read";
  fail_as(who.thread, std::string(what) + " of " + std::to_string(place.bytes) + " bytes of " + place.memory + "+" +
                          std::to_string(place.offset) + (who.together ? " by all lanes together" : "") + " at " +
                          describe_site(who.site) + ": " + problem);
}

std::string unordered(uint32_t when, int thread, uint32_t pc, const char* what) {
  const bool same_block = when >= block_epoch;
  return std::string("race with the ") + what + " by " + (same_block ? warp_and_lane(thread) : block_of(when)) +
         " at " + describe_site(unpack(pc)) +
         (same_block ? ", which no barrier orders" : ": the blocks of a launch run in any order");
}

// Whether what a thread wrote may be seen by the asynchronous proxy: it has executed the fence since, or whoever reads
// has.
bool fenced(const Cell& cell, const Accessor& who) {
  if (cell.asynchronous || cell.write_epoch < block_epoch) return true;
  const Thread* const writer = cell.writer < block->threads.size() ? &block->threads[cell.writer] : nullptr;
  for (const Thread* thread : {writer, &who.thread}) {
    if (!thread) continue;
    const Clock& proxy = thread->proxy;
    if (proxy.epoch > cell.write_epoch) return true;
    if (proxy.epoch == cell.write_epoch && proxy.seen[cell.writer].ticks > cell.write_clock) return true;
  }
  return false;
}

// Readers of a cell, the newest clock of each thread.
void add_reader(Cell& cell, uint8_t halves, uint16_t warp, uint32_t lanes, uint16_t clock, uint32_t pc) {
  if (cell.read_epoch != epoch) {
    if (cell.read_epoch >= launch_epoch && cell.read_epoch < block_epoch) {
      cell.earlier_epoch = cell.read_epoch;
      cell.earlier_pc = cell.reader.pc;
      cell.earlier_halves = cell.read_halves;
    }
    cell.read_epoch = epoch;
    cell.read_halves = halves;
    cell.reader = {pc, lanes, 0, clock, warp, halves};
    return;
  }
  cell.read_halves |= halves;
  Reader* reader = &cell.reader;
  Reader *same = nullptr, *empty = nullptr;
  for (;;) {
    if (reader->warp == warp && reader->halves == halves) {
      if (reader->clock == clock)
        same = reader;
      else
        reader->mask &= ~lanes;
    }
    if (!reader->mask) empty = reader;
    if (!reader->next) break;
    reader = &pool[reader->next];
  }
  if (same) {
    same->mask |= lanes;
    same->pc = pc;
  } else if (empty) {
    *empty = {pc, lanes, empty->next, clock, warp, halves};
  } else {
    reader->next = static_cast<uint32_t>(pool.size());
    pool.push_back({pc, lanes, 0, clock, warp, halves});
  }
}

void read_cell(Cell& cell, uint8_t halves, const Accessor& who, const Place& place) {
  if (cell.write_epoch && cell.write_halves & halves && !who.after(cell.write_epoch, cell.writer, cell.write_clock))
    report(who, place, Access::read, unordered(cell.write_epoch, cell.writer, cell.write_pc, "write"));
  for (int i = 0; i < who.groups; i++)
    add_reader(cell, halves, static_cast<uint16_t>(who.thread.warp), who.group[i].lanes, who.group[i].clock, who.pc);
}

void check_readers(const Cell& cell, uint8_t halves, const Accessor& who, const Place& place, Access kind) {
  uint32_t when = cell.read_halves & halves ? cell.read_epoch : 0, pc = cell.reader.pc;
  if (cell.earlier_epoch >= launch_epoch && cell.earlier_halves & halves) {
    when = cell.earlier_epoch;
    pc = cell.earlier_pc;
  }
  if (when >= launch_epoch && when < block_epoch) report(who, place, kind, unordered(when, 0, pc, "read"));
  if (cell.read_epoch != epoch) return;
  const Reader* reader = &cell.reader;
  for (;;) {
    for (uint32_t left = reader->halves & halves ? reader->mask : 0; left; left &= left - 1) {
      const int thread = 32 * reader->warp + __builtin_ctz(left);
      if (!who.after(epoch, thread, reader->clock))
        report(who, place, kind, unordered(epoch, thread, reader->pc, "read"));
    }
    if (!reader->next) return;
    reader = &pool[reader->next];
  }
}

void write_cell(Cell& cell, uint8_t halves, const Accessor& who, const Place& place, Access kind) {
  const bool both_atomic = kind == Access::atomic && cell.atomic;
  if (cell.write_epoch && cell.write_halves & halves && !both_atomic &&
      !who.after(cell.write_epoch, cell.writer, cell.write_clock))
    report(who, place, kind,
           unordered(cell.write_epoch, cell.writer, cell.write_pc, cell.atomic ? "atomic operation" : "write"));
  check_readers(cell, halves, who, place, kind);
  cell.write_epoch = epoch;
  cell.write_pc = who.pc;
  cell.writer = static_cast<uint16_t>(who.thread.index);
  cell.write_clock = who.group[0].clock;
  cell.write_halves = halves;
  cell.atomic = kind == Access::atomic;
  cell.asynchronous = who.asynchronous;
  cell.read_epoch = cell.earlier_epoch = 0;
}

std::string what_is_guarded(size_t offset) {
  const Shared& shared = block->shared;
  if (is_mbarrier(shared.memory + offset)) return "this is an mbarrier";
  if (offset < shared.dynamic || offset >= shared.dynamic + 64) return "this is a red zone behind an array";
  return "the block has " + std::to_string(shared.dynamic) + " bytes of dynamic shared memory";
}

// `by_host`: of device memory; null for shared memory, which is not the same memory in the next block.
void touch(Cell* cells, const uint8_t* by_host, const Accessor& who, const Place& place, Access kind) {
  size_t unwritten = 0;
  const size_t end = place.offset + place.bytes;
  for (size_t i = place.offset / 2; 2 * i < end; i++) {
    Cell& cell = cells[i];
    const auto halves = static_cast<uint8_t>((2 * i >= place.offset ? 1 : 0) | (2 * i + 1 < end ? 2 : 0));
    if (!by_host && cell.write_epoch < block_epoch) cell.write_epoch = 0;
    if (!by_host && cell.read_epoch < block_epoch) cell.read_epoch = 0;
    if (cell.guard) report(who, place, kind, what_is_guarded(2 * i));
    if (cell.flying)
      report(who, place, kind,
             "the asynchronous copy of " + warp_and_lane(cell.writer) + " issued at " +
                 describe_site(unpack(cell.write_pc)) + " is under way here and has not been waited for");
    if (who.asynchronous && !by_host && cell.write_epoch && !fenced(cell, who))
      report(who, place, kind,
             "no fence.proxy.async after the write by " + warp_and_lane(cell.writer) + " at " +
                 describe_site(unpack(cell.write_pc)));
    const bool written = cell.write_epoch || (by_host && by_host[i / 8] >> i % 8 & 1);
    unwritten += written ? 0 : 2;
    // Padding is smaller than the largest alignment.
    const bool padding = kind == Access::copy && unwritten < std::min(place.bytes, size_t{16});
    if (!written && kind != Access::write && !padding)
      report(who, place, kind, "nobody has written this memory before");
    if (kind == Access::read || kind == Access::copy)
      read_cell(cell, halves, who, place);
    else
      write_cell(cell, halves, who, place, kind);
  }
}

void set_flying(const void* to, size_t bytes, bool flying) {
  const size_t first = static_cast<size_t>(static_cast<const char*>(to) - block->shared.memory) / 2;
  for (size_t i = first; i < first + bytes / 2; i++) shared_cells[i].flying = flying;
}

// Whether the bytes lie in one of these, or none of these is in the same allocation.
bool in_tensor(const std::vector<Range>& tensors, const Region& region, const char* p, size_t bytes) {
  static size_t last = 0;
  const auto holds = [&](const Range& tensor) {
    const auto* begin = static_cast<const char*>(tensor.begin);
    return p >= begin && p + bytes <= begin + tensor.bytes;
  };
  if (last < tensors.size() && holds(tensors[last])) return true;
  bool concerned = false;
  for (size_t i = 0; i < tensors.size(); i++) {
    if (holds(tensors[i])) {
      last = i;
      return true;
    }
    concerned |= tensors[i].begin >= region.begin && tensors[i].begin < region.begin + region.bytes;
  }
  return !concerned;
}

// Memory that is no device's, but that kernels may read: their arguments, constants, threadIdx and the like.
bool readable(const Thread& thread, const char* p, size_t bytes) {
  const auto within = [&](const void* begin, size_t size) {
    return p >= static_cast<const char*>(begin) && p + bytes <= static_cast<const char*>(begin) + size;
  };
  return within(static_cast<const Coordinates*>(&thread), sizeof(Coordinates)) ||
         within(block->call->arguments.get(), block->call->bytes) || within(&coordinates, sizeof(coordinates)) ||
         is_constant(p, bytes);
}

}  // namespace

void access(const Thread& thread, const void* p, size_t bytes, Access kind, const void* site, uint32_t lanes,
            bool asynchronous) {
  if (!instrumented) return;
  const Quiet silence;
  const auto* at = static_cast<const char*>(p);
  const Shared& shared = block->shared;
  const Accessor who(thread, lanes, site, asynchronous);
  if (at >= shared.memory && at < shared.memory + shared.bytes) {
    const Place place = {"shared memory", static_cast<size_t>(at - shared.memory), bytes};
    if (place.offset + bytes > shared.used) report(who, place, kind, "this is beyond all variables of the block");
    if (lint_wanted()) lint(thread, at, bytes, kind >= Access::write, true, site);
    return touch(shared_cells.data(), nullptr, who, place, kind);
  }
  const Region* region = find_region(*block->regions, p);
  const Place place = {"device memory", region ? static_cast<size_t>(at - region->begin) : 0, bytes};
  if (region && place.offset + bytes <= region->bytes) {
    if (block->call->tensors && !in_tensor(*block->call->tensors, *region, at, bytes))
      report(who, place, kind, "this is in none of the op's tensors");
    if (lint_wanted()) lint(thread, at, bytes, kind >= Access::write, false, site);
    return touch(region->shadow->cells, region->shadow->by_host, who, place, kind);
  }
  if (kind < Access::write && readable(thread, at, bytes)) return;
  if (region && place.offset < region->bytes + 4096)
    report(who, place, kind, "the allocation has " + std::to_string(region->bytes) + " bytes");
  report(who, {"address ", reinterpret_cast<uintptr_t>(p), bytes}, kind,
         "this is neither shared memory nor in any allocation of device memory");
}

void host_access(const void* p, size_t bytes, const void* site) {
  if (memory_used() == 0) return;
  const auto regions = memory_regions();
  const Region* region = find_region(*regions, p);
  if (!region || static_cast<const char*>(p) >= region->begin + region->bytes || !host_error.empty()) return;
  host_error =
      "code of the host accesses " + std::to_string(bytes) + " bytes of device memory at " + describe_site(site);
}

void in_flight(const Thread& thread, const void* to, size_t bytes, const void* site, bool asynchronous) {
  if (!instrumented) return;
  access(thread, to, bytes, Access::write, site, 1u << thread.lane, asynchronous);
  set_flying(to, bytes, true);
}

void landed(const Thread& thread, const void* to, size_t bytes, const void* site, bool asynchronous) {
  if (!instrumented) return;
  const Quiet silence;
  set_flying(to, bytes, false);
  const auto offset = static_cast<size_t>(static_cast<const char*>(to) - block->shared.memory);
  const Accessor who(thread, 1u << thread.lane, site, asynchronous);
  touch(shared_cells.data(), nullptr, who, {"shared memory", offset, bytes}, Access::write);
}

void release(Thread& thread, Clock& to) {
  if (!instrumented) return;
  refresh(thread.clock);
  refresh(to);
  uint16_t& own = thread.clock.seen[static_cast<size_t>(thread.index)].ticks;
  if (++own == 0) fail("the race detector counts up to 65535 barriers of a thread between two __syncthreads");
  merge(to, thread.clock);
}

void acquire(Thread& thread, const Clock& from) {
  if (!instrumented || from.epoch != epoch) return;
  refresh(thread.clock);
  merge(thread.clock, from);
}

void order_all() {
  if (instrumented) next_epoch();
}

void fence_proxy(Thread& thread) {
  if (!instrumented) return;
  refresh(thread.clock);
  uint16_t& own = thread.clock.seen[static_cast<size_t>(thread.index)].ticks;
  own++;
  thread.proxy = thread.clock;
}

Moment now(const Thread& thread) { return {epoch, thread.index, own_clock(thread)}; }

bool has_seen(const Thread& thread, const Moment& moment) {
  return !instrumented || moment.epoch < epoch || has_seen(thread, moment.thread, moment.clock);
}

void open_race_launch() {
  if (!host_error.empty()) {
    const std::string error = std::move(host_error);
    host_error.clear();
    throw std::runtime_error(error);
  }
  if (!instrumented) return;
  next_epoch();
  launch_epoch = epoch;
  block_starts.clear();
}

void shadow_shared(size_t bytes) {
  if (instrumented) shared_cells.assign((bytes + 1) / 2, Cell{});
}

void open_race_block(dim3 at) {
  if (!instrumented) return;
  next_epoch();
  block_epoch = epoch;
  block_starts.push_back({epoch, at});
}

void dropped(const void* to, size_t bytes) {
  if (instrumented) set_flying(to, bytes, false);
}

void guard_shared(size_t offset, size_t bytes, bool guarded) {
  if (!instrumented) return;
  for (size_t i = (offset + 1) / 2; i < (offset + bytes) / 2; i++) shared_cells[i].guard = guarded;
}

}  // namespace simt
