// Copies by the tensor memory accelerator. Loads arrive as late as possible: when no thread of the block can go on.
// Stores read their shared memory when they are waited for.
#include <cstring>
#include <stdexcept>

#include "engine.h"
#include "race.h"

namespace simt {

// ---- tensor maps
// ------------------------------------------------------------------------------------------------------

TensorMap make_tensor_map(const void* data, size_t element, int rank, const uint64_t* dims, const uint64_t* strides,
                          const uint32_t* box, bool swizzled) {
  const auto refuse = [](const std::string& why) { throw std::runtime_error("a tensor map: " + why); };
  if (rank < 2 || rank > 4) refuse("rank " + std::to_string(rank) + ", not 2 to 4");
  if (reinterpret_cast<uintptr_t>(data) % 16) refuse("the tensor does not start at a multiple of 16 bytes");
  TensorMap map = {
      static_cast<char*>(const_cast<void*>(data)), element, rank, {1, 1, 1, 1}, {}, {1, 1, 1, 1}, swizzled};
  map.strides[0] = element;
  for (int i = 0; i < rank; i++) {
    map.dims[i] = dims[i];
    map.box[i] = box[i];
    if (dims[i] < 1 || dims[i] > 1ull << 32) refuse("a dimension of " + std::to_string(dims[i]));
    if (box[i] < 1 || box[i] > 256) refuse("a box of " + std::to_string(box[i]) + " elements, not 1 to 256");
    if (i == 0) continue;
    map.strides[i] = strides[i - 1];
    if (map.strides[i] % 16 || map.strides[i] >= 1ull << 40)
      refuse("a stride of " + std::to_string(map.strides[i]) + " bytes, not a multiple of 16");
  }
  if (box[0] * element % 16) refuse("rows of a box are " + std::to_string(box[0] * element) + " bytes, not 16 n");
  if (swizzled && box[0] * element != 128)
    refuse("rows of a swizzled box are " + std::to_string(box[0] * element) + " bytes, not 128");
  return map;
}

// ---- copies
// -----------------------------------------------------------------------------------------------------------

namespace {

// Another agent, who knows what this thread knows.
Thread* next_agent() {
  Engine& all = engine();
  Thread* agent = &all.agents[static_cast<size_t>(all.issued++ % 32)];
  release(*self, agent->clock);
  agent->proxy = self->proxy;
  return agent;
}

// The rows of the box at these coordinates, cut where the tensor ends.
std::vector<Row> rows_of(const TensorMap& map, size_t shared, const int (&at)[4]) {
  std::vector<Row> rows;
  const size_t bytes = map.box[0] * map.element;
  const auto inside = [&](int i, int64_t x) { return x >= 0 && x < static_cast<int64_t>(map.dims[i]); };
  for (uint32_t l = 0; l < map.box[3]; l++)
    for (uint32_t k = 0; k < map.box[2]; k++)
      for (uint32_t j = 0; j < map.box[1]; j++) {
        const int64_t c[4] = {at[0], int64_t{at[1]} + j, int64_t{at[2]} + k, int64_t{at[3]} + l};
        char* const row = map.data + c[1] * static_cast<int64_t>(map.strides[1]) +
                          c[2] * static_cast<int64_t>(map.strides[2]) + c[3] * static_cast<int64_t>(map.strides[3]);
        const bool exists = inside(1, c[1]) && inside(2, c[2]) && inside(3, c[3]);
        for (uint32_t i = 0; i < map.box[0]; i++) {
          const bool here = exists && inside(0, c[0] + i);
          char* const element = here ? row + (c[0] + i) * static_cast<int64_t>(map.element) : nullptr;
          // One piece for what lies together on both sides, at most 16 bytes, which swizzling does not tear.
          Row* last = rows.empty() ? nullptr : &rows.back();
          const bool joins = last && i * map.element % 16 &&
                             (element ? last->device && last->device + last->bytes == element : !last->device);
          if (joins)
            last->bytes += map.element;
          else
            rows.push_back({element, shared + i * map.element, map.element});
        }
        shared += bytes;
      }
  if (map.swizzled)
    for (Row& row : rows) row.shared = swizzle_128(row.shared);
  return rows;
}

std::vector<Row> rows_of(char* device, size_t shared, int bytes) {
  std::vector<Row> rows;
  for (int i = 0; i < bytes; i += 16) rows.push_back({device + i, shared + static_cast<size_t>(i), 16});
  return rows;
}

size_t check_box(const void* p, const TensorMap& map, int rank, const char* what, const void* site) {
  size_t bytes = map.element;
  for (const uint32_t size : map.box) bytes *= size;
  require_shared(p, bytes, what, site);
  if (shared_offset(p) % 128)
    fail("%s at %s: the box in shared memory does not start at a multiple of 128 bytes", what,
         describe_site(site).c_str());
  if (map.rank != rank)
    fail("%s at %s: %d coordinates for a tensor of rank %d", what, describe_site(site).c_str(), rank, map.rank);
  return bytes;
}

void check_bulk(const void* shared, const void* device, int bytes, const char* what, const void* site) {
  require_shared(shared, static_cast<size_t>(bytes), what, site);
  if (bytes <= 0 || bytes % 16 || shared_offset(shared) % 16 || reinterpret_cast<uintptr_t>(device) % 16)
    fail("%s at %s: addresses and size must be multiples of 16 bytes", what, describe_site(site).c_str());
}

void load(std::vector<Row> rows, size_t bytes, void* barrier, const char* what, const void* site) {
  MBarrierState& state = use_barrier(barrier, what, site);
  if (!state.fenced)
    fail("%s at %s: no fence after mbarrier.init lets the asynchronous proxy see the mbarrier", what,
         describe_site(site).c_str());
  if (state.bytes < static_cast<int64_t>(bytes))
    fail("%s at %s: it copies %zu bytes, but the mbarrier expects only %lld more", what, describe_site(site).c_str(),
         bytes, static_cast<long long>(state.bytes));
  Thread* const agent = next_agent();
  for (const Row& row : rows) {
    in_flight(*agent, block->shared.memory + row.shared, row.bytes, site, true);
    memset(block->shared.memory + row.shared, 0xff, row.bytes);
  }
  engine().loads.push_back({std::move(rows), false, false, &state, 0, agent, site});
}

void store(std::vector<Row> rows, bool adds, const void* site) {
  Thread* const agent = next_agent();
  for (const Row& row : rows)
    access(*agent, block->shared.memory + row.shared, row.bytes, Access::read, site, 1u << agent->lane, true);
  Engine& all = engine();
  const Thread* const owner = self;
  all.stores[owner].push_back({std::move(rows), false, adds, nullptr, all.groups[owner], agent, site});
}

void read_store(Transfer& transfer) {
  if (transfer.read) return;
  transfer.read = true;
  Thread& agent = *transfer.agent;
  for (const Row& row : transfer.rows) {
    char* const from = block->shared.memory + row.shared;
    access(agent, from, row.bytes, Access::read, transfer.site, 1u << agent.lane, true);
    if (!row.device) continue;
    require_device(row.device, row.bytes, "a store by TMA", transfer.site);
    access(agent, row.device, row.bytes, transfer.adds ? Access::atomic : Access::write, transfer.site,
           1u << agent.lane, true);
    if (!transfer.adds) {
      memcpy(row.device, from, row.bytes);
      continue;
    }
    for (size_t i = 0; i < row.bytes; i += 4) {
      float sum, value;
      memcpy(&sum, row.device + i, 4);
      memcpy(&value, from + i, 4);
      sum += value;
      memcpy(row.device + i, &sum, 4);
    }
  }
}

}  // namespace

void tma_load(void* to, const TensorMap& map, void* barrier, int rank, int c0, int c1, int c2, int c3) {
  const Quiet silence;
  const void* const site = __builtin_return_address(0);
  const size_t bytes = check_box(to, map, rank, "a load by TMA", site);
  load(rows_of(map, shared_offset(to), {c0, c1, c2, c3}), bytes, barrier, "a load by TMA", site);
}

void tma_store(const TensorMap& map, const void* from, int rank, int c0, int c1, int c2, int c3) {
  const Quiet silence;
  const void* const site = __builtin_return_address(0);
  check_box(from, map, rank, "a store by TMA", site);
  std::vector<Row> rows = rows_of(map, shared_offset(from), {c0, c1, c2, c3});
  store(std::move(rows), false, site);
}

void bulk_load(void* to, const void* from, int bytes, void* barrier) {
  const Quiet silence;
  const void* const site = __builtin_return_address(0);
  check_bulk(to, from, bytes, "cp.async.bulk", site);
  load(rows_of(static_cast<char*>(const_cast<void*>(from)), shared_offset(to), bytes), static_cast<size_t>(bytes),
       barrier, "cp.async.bulk", site);
}

void bulk_store(void* to, const void* from, int bytes, bool adds) {
  const Quiet silence;
  const void* const site = __builtin_return_address(0);
  check_bulk(from, to, bytes, adds ? "cp.reduce.async.bulk" : "cp.async.bulk", site);
  store(rows_of(static_cast<char*>(to), shared_offset(from), bytes), adds, site);
}

void bulk_commit() {
  const Quiet silence;
  const Thread* const owner = self;
  engine().groups[owner]++;
}

void bulk_wait(int groups, bool read) {
  const Quiet silence;
  if (skipped(read ? "cp.async.bulk.wait_group.read" : "cp.async.bulk.wait_group", __builtin_return_address(0))) return;
  const Thread* const owner = self;
  auto& transfers = engine().stores[owner];
  const int newest = engine().groups[owner] - groups;
  for (Transfer& transfer : transfers) {
    if (transfer.group >= newest) continue;
    read_store(transfer);
    Clock seen;
    release(*transfer.agent, seen);
    acquire(*self, seen);
  }
  while (!read && !transfers.empty() && transfers.front().group < newest) transfers.pop_front();
}

bool engine_step(size_t pick) {
  if (!block->engine || block->engine->loads.empty()) return false;
  auto& loads = block->engine->loads;
  const auto at = loads.begin() + static_cast<std::ptrdiff_t>(pick % loads.size());
  Transfer transfer = std::move(*at);
  loads.erase(at);
  Thread& agent = *transfer.agent;
  size_t bytes = 0;
  for (const Row& row : transfer.rows) {
    char* const to = block->shared.memory + row.shared;
    bytes += row.bytes;
    if (row.device) {
      const Region* region = find_region(*block->regions, row.device);
      if (!region || row.device + row.bytes > region->begin + region->bytes)
        fail_as(agent, "the load at " + describe_site(transfer.site) + " reads outside of all device memory");
      access(agent, row.device, row.bytes, Access::read, transfer.site, 1u << agent.lane, true);
    }
    landed(agent, to, row.bytes, transfer.site, true);
    if (row.device)
      memcpy(to, row.device, row.bytes);
    else
      memset(to, 0, row.bytes);
  }
  release(agent, transfer.barrier->clock);
  transfer.barrier->bytes -= static_cast<int64_t>(bytes);
  transfer.barrier->loaded = true;
  complete(*transfer.barrier);
  return true;
}

std::string close_engine() {
  if (!block->engine) return "";
  Engine& all = *block->engine;
  std::string problem = unfinished_products(all);
  for (const auto& [thread, transfers] : all.stores)
    for (const Transfer& transfer : transfers)
      if (!transfer.read)
        problem =
            position(*thread) + ": it returned without waiting for its store by TMA at " + describe_site(transfer.site);
  for (const MBarrierState& state : all.barriers) {
    if (state.unseen || state.loaded)
      problem = "nobody waited for a load by TMA that the mbarrier at shared memory+" +
                std::to_string(shared_offset(state.at)) + " counts";
    guard_shared(shared_offset(state.at), 8, false);
  }
  if (!all.loads.empty())
    problem = "the block ended while a load by TMA was under way, issued at " + describe_site(all.loads[0].site);
  for (const Transfer& transfer : all.loads)
    for (const Row& row : transfer.rows) dropped(block->shared.memory + row.shared, row.bytes);
  block->engine.reset();
  return problem;
}

}  // namespace simt
