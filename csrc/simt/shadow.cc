// The shadow of device memory: which of it has been written, and by whom.
#include "shadow.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace simt {

// Pages of zeros that take no memory before they are written.
static void* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return pages;
}

Shadow* new_shadow(size_t bytes) {
  if (!instrumented || bytes == 0) return nullptr;
  const size_t cells = (bytes + 1) / 2;
  return new Shadow{bytes, static_cast<Cell*>(map_pages(cells * sizeof(Cell))),
                    static_cast<uint8_t*>(map_pages(cells / 8 + 1))};
}

void delete_shadow(Shadow* shadow) {
  if (!shadow) return;
  const size_t cells = (shadow->bytes + 1) / 2;
  munmap(shadow->cells, cells * sizeof(Cell));
  munmap(shadow->by_host, cells / 8 + 1);
  delete shadow;
}

void host_wrote(Shadow* shadow, size_t offset, size_t bytes) {
  if (!shadow || bytes == 0) return;
  size_t i = offset / 2;
  const size_t end = (offset + bytes + 1) / 2;
  for (; i < end && i % 8; i++) shadow->by_host[i / 8] |= static_cast<uint8_t>(1u << i % 8);
  if (end > i) memset(shadow->by_host + i / 8, 0xff, (end - i) / 8);
  for (i += (end - i) / 8 * 8; i < end; i++) shadow->by_host[i / 8] |= static_cast<uint8_t>(1u << i % 8);
}

void host_copied(Shadow* to, size_t to_offset, const Shadow* from, size_t from_offset, size_t bytes) {
  if (!to || !from) return;
  for (size_t i = 0; i < bytes; i += 2) {
    const size_t cell = (from_offset + i) / 2;
    if (from->cells[cell].write_epoch || from->by_host[cell / 8] >> cell % 8 & 1) host_wrote(to, to_offset + i, 1);
  }
}

}  // namespace simt
