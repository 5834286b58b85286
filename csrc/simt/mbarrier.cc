// Barriers in shared memory and copies by the tensor memory accelerator. Loads arrive as late as possible: when no
// thread of the block can go on. Stores read their shared memory when they are waited for.
#include "engine.h"

#include "race.h"

namespace simt {

Engine& engine() {
  if (!block->engine) {
    const Quiet silence;
    block->engine = std::make_shared<Engine>();
    Engine& made = *block->engine;
    made.warps.resize(block->warps.size());
    made.agents.resize(32);
    for (int lane = 0; lane < 32; lane++) {
      Thread& agent = made.agents[static_cast<size_t>(lane)];
      agent.lane = lane;
      agent.warp = static_cast<int>(block->warps.size());
      agent.index = 32 * agent.warp + lane;
      agent.stack = self->stack;
      agent.block = self->block;
    }
  }
  return *block->engine;
}

namespace {

MBarrierState* find_barrier(const void* at) {
  if (block->engine)
    for (MBarrierState& state : block->engine->barriers)
      if (state.at == at) return &state;
  return nullptr;
}

}  // namespace

MBarrierState& use_barrier(const void* at, const char* what, const void* site) {
  MBarrierState* state = find_barrier(at);
  if (!state) fail("%s at %s: %p is not an mbarrier", what, describe_site(site).c_str(), at);
  if (!has_seen(*self, {state->epoch, state->maker, state->maker_clock}))
    fail("%s at %s: no barrier orders it after mbarrier.init", what, describe_site(site).c_str());
  return *state;
}

void complete(MBarrierState& state) {
  if (state.pending > 0 || state.bytes != 0) return;
  state.done = state.clock;
  state.clock.epoch = 0;
  state.pending = state.arrivals;
  const int ended = state.parity;
  state.parity ^= 1;
  state.unseen |= state.loaded;
  state.loaded = false;
  auto& waiting = state.waiting;
  size_t kept = 0;
  for (const MBarrierState::Waiter& waiter : waiting) {
    if (waiter.parity != ended) {
      waiting[kept++] = waiter;
      continue;
    }
    acquire(*waiter.thread, state.done);
    waiter.thread->state = State::ready;
    state.unseen = false;
  }
  waiting.resize(kept);
}

void mbarrier_init(void* barrier, int arrivals) {
  const void* const site = __builtin_return_address(0);
  require_shared(barrier, 8, "mbarrier.init", site);
  if (arrivals < 1 || arrivals > (1 << 20) - 1)
    fail("mbarrier.init at %s: %d arrivals", describe_site(site).c_str(), arrivals);
  if (reinterpret_cast<uintptr_t>(barrier) % 8)
    fail("mbarrier.init at %s: the address is not a multiple of 8", describe_site(site).c_str());
  if (find_barrier(barrier)) fail("mbarrier.init at %s: this already is an mbarrier", describe_site(site).c_str());
  access(*self, barrier, 8, Access::write, site, 1u << self->lane);
  const Moment made = now(*self);
  engine().barriers.push_back(
      {barrier, arrivals, arrivals, 0, 0, {}, {}, made.epoch, made.thread, made.clock, false, false, false, {}});
  guard_shared(shared_offset(barrier), 8, true);
}

void fence_mbarrier_init() {
  if (skipped("fence.mbarrier_init", __builtin_return_address(0)) || !block->engine) return;
  for (MBarrierState& state : block->engine->barriers)
    if (state.maker == self->index) state.fenced = true;
}

void fence_proxy_async() {
  if (skipped("fence.proxy.async", __builtin_return_address(0))) return;
  fence_proxy(*self);
  if (!block->engine) return;
  for (MBarrierState& state : block->engine->barriers)
    if (state.maker == self->index) state.fenced = true;
}

void mbarrier_arrive(void* barrier, int bytes) {
  const void* const site = __builtin_return_address(0);
  if (skipped("mbarrier.arrive", site)) return;
  MBarrierState& state = use_barrier(barrier, "mbarrier.arrive", site);
  if (bytes < 0 || bytes > (1 << 20) - 1) fail("mbarrier.arrive at %s: %d bytes", describe_site(site).c_str(), bytes);
  if (state.pending == 0)
    fail("mbarrier.arrive at %s: more than %d arrivals in a phase", describe_site(site).c_str(), state.arrivals);
  release(*self, state.clock);
  state.bytes += bytes;
  state.pending--;
  complete(state);
}

void mbarrier_wait(void* barrier, int parity) {
  const void* const site = __builtin_return_address(0);
  if (skipped("mbarrier.wait", site)) return;
  MBarrierState& state = use_barrier(barrier, "mbarrier.wait", site);
  if (parity != 0 && parity != 1) fail("mbarrier.wait at %s: parity %d", describe_site(site).c_str(), parity);
  if (state.parity != parity) {
    state.unseen = false;
    return acquire(*self, state.done);
  }
  state.waiting.push_back({self, parity});
  wait("mbarrier.wait", site);
}

bool is_mbarrier(const void* p) {
  if (!block->engine) return false;
  for (const MBarrierState& state : block->engine->barriers) {
    const auto* at = static_cast<const char*>(state.at);
    if (p >= at && p < at + 8) return true;
  }
  return false;
}

std::string describe_mbarrier(const Thread& thread) {
  if (!block->engine) return "";
  for (const MBarrierState& state : block->engine->barriers)
    for (const MBarrierState::Waiter& waiter : state.waiting)
      if (waiter.thread == &thread)
        return ", waiting for parity " + std::to_string(waiter.parity) + " of the mbarrier at shared memory+" +
               std::to_string(shared_offset(state.at)) + ", where " + std::to_string(state.pending) + " of " +
               std::to_string(state.arrivals) + " arrivals and " + std::to_string(state.bytes) + " bytes are to come";
  return "";
}

uint32_t shared_offset(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - block->shared.memory);
}

}  // namespace simt
