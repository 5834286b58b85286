#include "async.h"

#include <cstring>

#include "race.h"

namespace simt {

// Nothing is read where nothing is valid, so the source may then be any address.
void cp_async(void* to, const void* from, int bytes, int valid) {
  const void* const site = __builtin_return_address(0);
  const auto size = static_cast<size_t>(bytes), read = static_cast<size_t>(valid);
  require_shared(to, size, "cp.async", site);
  if (valid) require_device(from, read, "cp.async", site);
  if (reinterpret_cast<uintptr_t>(to) % size || (valid && reinterpret_cast<uintptr_t>(from) % size))
    fail("cp.async at %s: %p to %p are not multiples of %d", describe_site(site).c_str(), from, to, bytes);
  if (valid) access(*self, from, read, Access::read, site, 1u << self->lane);
  in_flight(*self, to, size, site);
  PendingCopy copy = {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid, self->group, {}, site};
  memcpy(copy.data, from, read);
  memset(to, 0xff, size);
  self->copies.push_back(copy);
}

void cp_async_commit() { self->group++; }

// Groups count even if they are empty; copies that belong to no group yet are not waited for.
void cp_async_wait(int groups) {
  if (skipped("cp.async.wait_group", __builtin_return_address(0))) return;
  auto& copies = self->copies;
  size_t kept = 0;
  for (const PendingCopy& copy : copies) {
    if (copy.group >= self->group - groups) {
      copies[kept++] = copy;
      continue;
    }
    if (memcmp(copy.data, copy.from, static_cast<size_t>(copy.valid)) != 0)
      fail("cp.async at %s: its source was written while the copy was under way", describe_site(copy.site).c_str());
    landed(*self, copy.to, static_cast<size_t>(copy.bytes), copy.site);
    memcpy(copy.to, copy.data, static_cast<size_t>(copy.valid));
    memset(copy.to + copy.valid, 0, static_cast<size_t>(copy.bytes - copy.valid));
  }
  copies.resize(kept);
}

}  // namespace simt
