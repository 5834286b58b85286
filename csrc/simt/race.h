// The race detector: what every two bytes of shared and device memory have seen, and which accesses are ordered. Works
// on kernels compiled with -fsanitize=thread, whose hooks (tsan.cc) report each access; the emulator reports its own.
// It follows happens-before (vector clocks, as FastTrack, PLDI 2009), so it finds a race in whatever order threads ran.
#pragma once
#include "fiber.h"

namespace simt {

// Whether the kernels report their accesses. Without that nothing is checked here.
extern bool instrumented;

// copy: a read of a whole struct, whose padding nobody need have written.
enum class Access : uint8_t { read, copy, write, atomic };

// This thread, or some lanes of a warp together, access memory. Ends the block if they may not.
// `asynchronous`: through the asynchronous proxy, which needs a fence between it and what threads wrote.
void access(const Thread& thread, const void* p, size_t bytes, Access kind, const void* site, uint32_t lanes,
            bool asynchronous = false);

// Code of the host reads or writes: it must not be device memory. The next launch says so.
void host_access(const void* p, size_t bytes, const void* site);

// From here to `landed`, what a copy writes may not be touched by anyone.
void in_flight(const Thread& thread, const void* to, size_t bytes, const void* site, bool asynchronous = false);
void landed(const Thread& thread, const void* to, size_t bytes, const void* site, bool asynchronous = false);
void dropped(const void* to, size_t bytes);  // the block ended before it landed

// Order. `release`: whoever acquires this clock sees what the thread did. A clock that nobody has released into orders
// nothing.
void release(Thread& thread, Clock& to);
void acquire(Thread& thread, const Clock& from);
void order_all();  // every thread of the block has seen everything
void fence_proxy(Thread& thread);

// A moment of a thread, and whether another one has seen it.
struct Moment {
  uint32_t epoch;
  int thread;
  uint16_t clock;
};
Moment now(const Thread& thread);
bool has_seen(const Thread& thread, const Moment& moment);

void open_race_launch();
void open_race_block(dim3 at);
void shadow_shared(size_t bytes);
void guard_shared(size_t offset, size_t bytes, bool guarded);

// Device memory. What the host writes counts as written; nothing else does before a kernel writes it.
Shadow* new_shadow(size_t bytes);
void delete_shadow(Shadow* shadow);
void host_wrote(Shadow* shadow, size_t offset, size_t bytes);
void host_copied(Shadow* to, size_t to_offset, const Shadow* from, size_t from_offset, size_t bytes);

}  // namespace simt
