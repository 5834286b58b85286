// Shared memory of a block: what the launch asked for, then static variables, with red zones behind each. All of it is
// NaN when a block begins. Red zones hold 0xff bytes: if they do not any more when the block ends, somebody wrote
// there.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "race.h"
#include "sanitizer.h"

namespace simt {
namespace {

constexpr size_t kStatics = 32 * 1024;
constexpr size_t kZone = 64;
const char two_layouts = 0;

void guard(const Shared& shared, const Part& zone, bool guarded) {
  guard_shared(zone.offset, zone.bytes, guarded);
  if (guarded)
    ASAN_POISON_MEMORY_REGION(shared.memory + zone.offset, zone.bytes);
  else
    ASAN_UNPOISON_MEMORY_REGION(shared.memory + zone.offset, zone.bytes);
}

void add_zone(Shared& shared, const Part& zone) {
  shared.red_zones.push_back(zone);
  guard(shared, zone, true);
}

}  // namespace

void open_shared(Shared& shared, size_t dynamic, size_t limit) {
  shared.dynamic = dynamic;
  shared.limit = limit;
  shared.used = (dynamic + 15) / 16 * 16 + kZone;
  shared.bytes = (shared.used + kStatics + 1023) / 1024 * 1024;
  shared.memory = static_cast<char*>(aligned_alloc(1024, shared.bytes));
  if (!shared.memory) throw std::bad_alloc();
  shadow_shared(shared.bytes);
  add_zone(shared, {nullptr, dynamic, shared.used - dynamic});
}

void fill_shared(Shared& shared) {
  for (const Part& zone : shared.red_zones) ASAN_UNPOISON_MEMORY_REGION(shared.memory + zone.offset, zone.bytes);
  memset(shared.memory, 0xff, shared.used);
  for (const Part& zone : shared.red_zones) ASAN_POISON_MEMORY_REGION(shared.memory + zone.offset, zone.bytes);
}

std::string check_red_zones(Shared& shared) {
  for (const Part& zone : shared.red_zones) {
    ASAN_UNPOISON_MEMORY_REGION(shared.memory + zone.offset, zone.bytes);
    for (size_t i = zone.offset; i < zone.offset + zone.bytes; i++)
      if (shared.memory[i] != '\xff')
        return "somebody wrote into a red zone: shared memory+" + std::to_string(i) + " of " +
               std::to_string(shared.dynamic) + " bytes";
  }
  return "";
}

void close_shared(Shared& shared) {
  ASAN_UNPOISON_MEMORY_REGION(shared.memory, shared.bytes);
  free(shared.memory);
}

void red_zone(const void* begin, size_t bytes) {
  Shared& shared = block->shared;
  add_zone(shared, {shared.layout, static_cast<size_t>(static_cast<const char*>(begin) - shared.memory), bytes});
}

void* dynamic_shared(size_t bytes, const void* layout, void (*construct)(void*)) {
  Shared& shared = block->shared;
  if (bytes > shared.dynamic)
    fail("the kernel uses %zu bytes of shared memory, the launch gave %zu", bytes, shared.dynamic);
  if (!layout || shared.layout == layout || shared.layout == &two_layouts) return shared.memory;
  const Quiet silence;
  if (!shared.layout) {
    shared.layout = layout;
    if (construct) construct(shared.memory);
  } else {
    // The memory is used for two things one after the other: neither's red zones hold for the other.
    auto& zones = shared.red_zones;
    for (const Part& zone : zones)
      if (zone.key) guard(shared, zone, false);
    zones.erase(std::remove_if(zones.begin(), zones.end(), [](const Part& zone) { return zone.key; }), zones.end());
    shared.layout = &two_layouts;
  }
  return shared.memory;
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  Shared& shared = block->shared;
  for (const Part& variable : shared.statics)
    if (variable.key == key) return shared.memory + variable.offset;
  const Quiet silence;
  const size_t unit = std::max(alignment, size_t{16});
  const size_t offset = (shared.used + unit - 1) / unit * unit, end = offset + (bytes + 15) / 16 * 16;
  if (end + kZone > shared.bytes) fail("more than %zu bytes of static shared memory", kStatics);
  size_t all = shared.dynamic + bytes;
  for (const Part& variable : shared.statics) all += variable.bytes;
  if (all > shared.limit)
    fail("%zu bytes of shared memory, %zu of them static: a block of this kernel may have %zu", all,
         all - shared.dynamic, shared.limit);
  memset(shared.memory + shared.used, 0xff, end + kZone - shared.used);
  shared.statics.push_back({key, offset, bytes});
  shared.used = end + kZone;
  add_zone(shared, {nullptr, end, kZone});
  return shared.memory + offset;
}

void require_shared(const void* p, size_t bytes, const char* what, const void* site) {
  const Shared& shared = block->shared;
  const auto* at = static_cast<const char*>(p);
  if (at < shared.memory || at + bytes > shared.memory + shared.used)
    fail("%s at %s: %p is not in the block's shared memory", what, describe_site(site).c_str(), p);
}

void require_device(const void* p, size_t bytes, const char* what, const void* site) {
  const Region* region = find_region(*block->regions, p);
  if (!region || static_cast<const char*>(p) + bytes > region->begin + region->bytes)
    fail("%s at %s: %zu bytes at %p are not in any allocation of device memory", what, describe_site(site).c_str(),
         bytes, p);
}

}  // namespace simt
