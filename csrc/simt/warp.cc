#include "warp.h"

#include "race.h"

namespace simt {

void collective(uint32_t mask, const char* what, void* slot, Compute compute, const void* site, bool together) {
  Warp& warp = block->warps[static_cast<size_t>(self->warp)];
  const uint32_t bit = 1u << self->lane;
  const void* const at = site ? site : __builtin_return_address(0);
  if (!(mask & bit))
    fail("%s at %s: lane %d is not in its own mask %08x", what, describe_site(at).c_str(), self->lane, mask);
  if (mask & ~warp.alive)
    fail("%s at %s: mask %08x names lanes that have returned or never were (alive are %08x)", what,
         describe_site(at).c_str(), mask, warp.alive);
  size_t i = 0;
  while (i < warp.pending.size() && (warp.pending[i].mask != mask || warp.pending[i].arrived & bit)) i++;
  if (i == warp.pending.size()) warp.pending.push_back({mask, 0, what, at, compute, {}});
  Rendezvous& meeting = warp.pending[i];
  if (meeting.compute != compute || (together && !same_site(meeting.site, at)))
    fail("%s at %s: other lanes with the same mask are at %s at %s", what, describe_site(at).c_str(), meeting.what,
         describe_site(meeting.site).c_str());
  meeting.slots[self->lane] = slot;
  meeting.arrived |= bit;
  if (meeting.arrived != mask) return wait(what, at);
  compute(meeting.slots, mask);
  for (int l = 0; l < warp.count; l++)
    if (mask & ~bit & (1u << l)) block->threads[static_cast<size_t>(warp.first + l)].state = State::ready;
  warp.pending.erase(warp.pending.begin() + static_cast<std::ptrdiff_t>(i));
}

void exchange(void* const* slots, uint32_t mask) {
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask & (1u << lane))) continue;
    auto* own = static_cast<Exchange*>(slots[lane]);
    if (own->source < 0 || own->source > 31 || !(mask & (1u << own->source)))
      fail("a shuffle takes the value of lane %d, which is not in mask %08x", own->source, mask);
    own->result = static_cast<Exchange*>(slots[own->source])->value;
  }
}

namespace {

constexpr uint32_t kAll = 0xffffffffu;

struct Vote {
  int predicate;
  uint32_t ballot;
};

void vote(void* const* slots, uint32_t mask) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; lane++)
    if (mask & (1u << lane) && static_cast<Vote*>(slots[lane])->predicate) ballot |= 1u << lane;
  for (int lane = 0; lane < 32; lane++)
    if (mask & (1u << lane)) static_cast<Vote*>(slots[lane])->ballot = ballot;
}

uint32_t ballot_of(uint32_t mask, const char* what, int predicate, const void* site) {
  Vote own = {predicate, 0};
  collective(mask, what, &own, vote, site);
  return own.ballot;
}

struct Matrices {
  uint32_t* r;
  int count;
  const void* row;
  bool transposed;
  const void* site;
};

// All lanes read each row together: each must come after whoever wrote it.
void load_matrices(void* const* slots, uint32_t) {
  const auto* first = static_cast<Matrices*>(slots[0]);
  for (int lane = 0; instrumented && lane < 8 * first->count; lane++) {
    const auto* own = static_cast<Matrices*>(slots[lane]);
    const Thread& thread = block->threads[static_cast<size_t>(self->index - self->lane + lane)];
    access(thread, own->row, 16, Access::read, own->site, kAll);
  }
  for (int m = 0; m < first->count; m++) {
    uint16_t x[8][8];
    for (int row = 0; row < 8; row++) memcpy(x[row], static_cast<Matrices*>(slots[8 * m + row])->row, 16);
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4;
      const auto* own = static_cast<Matrices*>(slots[lane]);
      const uint32_t low = own->transposed ? x[2 * t][g] : x[g][2 * t];
      const uint32_t high = own->transposed ? x[2 * t + 1][g] : x[g][2 * t + 1];
      own->r[m] = low | high << 16;
    }
  }
}

float low_half(uint32_t x) { return __uint_as_float(x << 16); }
float high_half(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};

void multiply(void* const* slots, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    const auto* own = static_cast<Product*>(slots[lane]);
    for (int i = 0; i < 4; i++) {
      const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
      a[row][column] = low_half(own->a[i]);
      a[row][column + 1] = high_half(own->a[i]);
    }
    b[2 * t][g] = low_half(own->b0);
    b[2 * t + 1][g] = high_half(own->b0);
    b[2 * t + 8][g] = low_half(own->b1);
    b[2 * t + 9][g] = high_half(own->b1);
  }
  float d[16][8] = {};
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    float* own = static_cast<Product*>(slots[lane])->d;
    own[0] += d[g][2 * t];
    own[1] += d[g][2 * t + 1];
    own[2] += d[g + 8][2 * t];
    own[3] += d[g + 8][2 * t + 1];
  }
}

struct Movement {
  uint32_t x, y;
};

void move_matrix(void* const* slots, uint32_t) {
  uint16_t x[8][8];
  for (int lane = 0; lane < 32; lane++)
    memcpy(&x[lane / 4][2 * (lane % 4)], &static_cast<Movement*>(slots[lane])->x, 4);
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    static_cast<Movement*>(slots[lane])->y = x[2 * t][g] | static_cast<uint32_t>(x[2 * t + 1][g]) << 16;
  }
}

void synchronise(void* const*, uint32_t mask) {
  if (!instrumented) return;
  static thread_local Clock clock;
  clock.epoch = 0;
  Thread* const lanes = self - self->lane;
  for (uint32_t left = mask; left; left &= left - 1) release(lanes[__builtin_ctz(left)], clock);
  for (uint32_t left = mask; left; left &= left - 1) acquire(lanes[__builtin_ctz(left)], clock);
}

}  // namespace

void ldmatrix(uint32_t* r, int count, const void* row, bool transposed) {
  const void* const site = __builtin_return_address(0);
  const char* const what = transposed ? "ldmatrix.trans" : "ldmatrix";
  Matrices own = {r, count, row, transposed, site};
  if (self->lane < 8 * count) {
    require_shared(row, 16, what, site);
    if (reinterpret_cast<uintptr_t>(row) % 16)
      fail("%s at %s: the row's address %p is not a multiple of 16", what, describe_site(site).c_str(), row);
  }
  collective(kAll, what, &own, load_matrices, site, true);
}

void mma_16x8x16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  Product own = {d, a, b0, b1};
  collective(kAll, "mma", &own, multiply, __builtin_return_address(0), true);
}

uint32_t movmatrix_trans(uint32_t x) {
  Movement own = {x, 0};
  collective(kAll, "movmatrix", &own, move_matrix, __builtin_return_address(0), true);
  return own.y;
}

// ---- barriers of the block
// --------------------------------------------------------------------------------------------

namespace {

// Another thread has come to the barrier. Whether it was the last one.
bool arrive(Barrier& barrier, const char* what, int threads, const void* site) {
  if (barrier.arrived > 0 && barrier.expected != threads)
    fail("%s at %s: it is used for %d and for %d threads at the same time", what, describe_site(site).c_str(),
         barrier.expected, threads);
  barrier.expected = threads;
  return ++barrier.arrived == threads;
}

void open_barrier(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) thread->state = State::ready;
  barrier.waiting.clear();
  barrier.arrived = 0;
}

void named(int id, int threads, bool stays, const void* site) {
  static const char* const names[] = {"",           "barrier 1",  "barrier 2",  "barrier 3", "barrier 4",  "barrier 5",
                                      "barrier 6",  "barrier 7",  "barrier 8",  "barrier 9", "barrier 10", "barrier 11",
                                      "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  if (id < 1 || id > 15) fail("barrier %d at %s: named barriers are 1 to 15", id, describe_site(site).c_str());
  if (threads < 32 || threads % 32 || threads > static_cast<int>(block->threads.size()))
    fail("barrier %d at %s: it is for %d threads of a block of %zu", id, describe_site(site).c_str(), threads,
         block->threads.size());
  if (skipped(stays ? "barrier" : "barrier.arrive", site)) return;
  Barrier& barrier = block->barriers[id];
  release(*self, barrier.clock);
  if (arrive(barrier, names[id], threads, site)) {
    for (Thread* thread : barrier.waiting) acquire(*thread, barrier.clock);
    if (stays) acquire(*self, barrier.clock);
    barrier.clock.epoch = 0;
    open_barrier(barrier);
  } else if (stays) {
    barrier.waiting.push_back(self);
    wait(names[id], site);
  }
}

}  // namespace

void named_barrier(int id, int threads) { named(id, threads, true, __builtin_return_address(0)); }
void named_barrier_arrive(int id, int threads) { named(id, threads, false, __builtin_return_address(0)); }

}  // namespace simt

uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return simt::ballot_of(mask, "__ballot_sync", predicate, __builtin_return_address(0));
}
int __any_sync(uint32_t mask, int predicate) {
  return simt::ballot_of(mask, "__any_sync", predicate, __builtin_return_address(0)) != 0;
}
int __all_sync(uint32_t mask, int predicate) {
  return simt::ballot_of(mask, "__all_sync", predicate, __builtin_return_address(0)) == mask;
}
void __syncwarp(uint32_t mask) {
  const void* const site = __builtin_return_address(0);
  if (simt::skipped("__syncwarp", site)) return;
  int own = 0;
  simt::collective(mask, "__syncwarp", &own, simt::synchronise, site);
}

void __syncthreads() {
  using namespace simt;
  const void* const site = __builtin_return_address(0);
  if (skipped("__syncthreads", site)) return;
  for (const Warp& warp : block->warps)
    if (__builtin_popcount(warp.alive) != warp.count)
      fail("__syncthreads at %s: some threads of the block have returned", describe_site(site).c_str());
  Barrier& barrier = block->barriers[0];
  if (barrier.arrived > 0 && !same_site(barrier.site, site))
    fail("__syncthreads at %s: other threads of the block are at __syncthreads at %s", describe_site(site).c_str(),
         describe_site(barrier.site).c_str());
  barrier.site = site;
  if (arrive(barrier, "__syncthreads", static_cast<int>(block->threads.size()), site)) {
    order_all();
    return open_barrier(barrier);
  }
  barrier.waiting.push_back(self);
  wait("__syncthreads", site);
}
