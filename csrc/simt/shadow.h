// What every two bytes of memory have seen. For race.cc and shadow.cc only.
#pragma once
#include "race.h"

namespace simt {

// Threads that have read a cell since it was written: those of `mask` in `warp`, when their clock was `clock`.
struct Reader {
  uint32_t pc, mask, next;  // next: index in `pool`, 0 for none
  uint16_t clock, warp;
  uint8_t halves;
};

// Two bytes of memory. An access is dated by the epoch, which every block and every __syncthreads begins anew, and
// within it by the clock of the thread. `halves`: which of the bytes it touched, 1, 2 or 3; of bytes that are written
// apart the last write is known.
struct Cell {
  uint32_t write_epoch, write_pc;  // epoch 0: never written by a kernel
  uint16_t write_clock, writer;    // thread of its block
  uint16_t atomic : 1, flying : 1, guard : 1, asynchronous : 1, write_halves : 2, read_halves : 2, earlier_halves : 2;
  uint32_t read_epoch;
  Reader reader;
  uint32_t earlier_epoch, earlier_pc;  // a read by a block before this one
};

struct Shadow {
  size_t bytes;
  Cell* cells;
  uint8_t* by_host;  // one bit a cell
};

}  // namespace simt
