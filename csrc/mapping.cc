#include "mapping.h"

#ifdef __linux__

#include <atomic>
#include <cerrno>
#include <csignal>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace rw {

// What the signal handler knows of a mapping. It may run at any moment and on any thread, so there is no lock: `end` is
// written last when a slot is taken and first when it is given back, and 0 means that it stands for nothing.
struct MappingSlot {
  std::atomic<bool> taken{false};
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<bool> lost{false};
};

namespace {

MappingSlot slots[1024];

struct sigaction previous;
uintptr_t page_bytes;

// Puts zeros where a truncated file has no more pages, or a disk could not give them, and notes it: the run goes on and
// fails at its end (Mapping::check). Everything from the page on is replaced, so that one signal does for all.
bool replace_lost(uintptr_t address) {
  for (MappingSlot& slot : slots) {
    const uintptr_t end = slot.end, begin = slot.begin;
    if (address < begin || address >= end || slot.end != end) continue;
    slot.lost = true;
    const uintptr_t page = address / page_bytes * page_bytes;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    return mmap(reinterpret_cast<void*>(page), end - page, PROT_READ, flags, -1, 0) != MAP_FAILED;
  }
  return false;
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  // A code above 0 is the kernel's: only then there is an address.
  const bool handled = info->si_code > 0 && replace_lost(reinterpret_cast<uintptr_t>(info->si_addr));
  errno = error;
  if (handled) return;
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(signal);
  sigaction(SIGBUS, &previous, nullptr);
  raise(SIGBUS);
}

void install_handler() {
  [[maybe_unused]] static const bool once = [] {
    page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &previous) == 0;
  }();
}

bool stamp_of(int fd, FileStamp& stamp) {
  // not fstat, which is a symbol of its own in new versions of glibc only (glibc.cc)
  struct statx file = {};
  if (statx(fd, "", AT_EMPTY_PATH, STATX_SIZE | STATX_MTIME, &file) != 0) return false;
  stamp = {file.stx_size, file.stx_mtime.tv_sec, file.stx_mtime.tv_nsec};
  return true;
}

MappingSlot* take_slot() {
  for (MappingSlot& slot : slots)
    if (!slot.taken.exchange(true)) return &slot;
  return nullptr;
}

}  // namespace

std::unique_ptr<Mapping> Mapping::open(int fd, std::string path) {
  std::unique_ptr<Mapping> mapping(new Mapping());
  mapping->path_ = std::move(path);
  mapping->fd_ = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (mapping->fd_ < 0 || !stamp_of(mapping->fd_, mapping->stamp_) || mapping->bytes() == 0) return nullptr;
  mapping->slot_ = take_slot();
  if (!mapping->slot_) return nullptr;
  install_handler();
  void* data = mmap(nullptr, mapping->bytes(), PROT_READ, MAP_PRIVATE, mapping->fd_, 0);
  if (data == MAP_FAILED) return nullptr;
  mapping->data_ = static_cast<char*>(data);
  const auto begin = reinterpret_cast<uintptr_t>(data);
  mapping->slot_->lost = false;
  mapping->slot_->begin = begin;
  mapping->slot_->end = (begin + mapping->bytes() + page_bytes - 1) / page_bytes * page_bytes;
  return mapping;
}

Mapping::~Mapping() {
  if (slot_) slot_->end = 0;
  if (data_) munmap(data_, bytes());
  if (slot_) slot_->taken = false;
  if (fd_ >= 0) close(fd_);
}

void Mapping::check() const {
  FileStamp now;
  if (slot_->lost || !stamp_of(fd_, now) || now.bytes != stamp_.bytes || now.seconds != stamp_.seconds ||
      now.nanoseconds != stamp_.nanoseconds)
    throw FileChanged(path_);
}

}  // namespace rw

#else

namespace rw {

struct MappingSlot {};

std::unique_ptr<Mapping> Mapping::open(int, std::string) { return nullptr; }
Mapping::~Mapping() = default;
void Mapping::check() const {}

}  // namespace rw

#endif
