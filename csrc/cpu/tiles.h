// Products of 32 x 32 tiles with AMX, the tile unit of some x86-64 processors, and the packing that they need.
//
// The unit multiplies 16 x 32 bf16 by 32 x 16 bf16 and adds to 16 x 16 f32, 16 times as fast as vectors of f32 can.
// bf16 products are exact in f32, so with bf16 matrices only the order of additions differs from the other kernels.
//
// f32 has 24 bits and bf16 8: x = x0 + x1 + x2, where x0 is x rounded to bf16, x1 what remains, rounded, and x2 the
// rest, with nothing lost. Of the nine products of pieces the six with x_i y_j, i + j <= 2, are added up; what is left
// out is below 2^-24 of a product, as is the rounding of a product in f32. So f32 stays f32, at a sixth of the rate,
// which is still twice that of vectors. Two exceptions: an infinity (or a value above 3.39e38) gives NaN, as infinity
// minus itself does; and the unit takes denormals for zeros, so that pieces below 1.2e-38 are lost.
//
// Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter 20; Henry, Tang, Heinecke, Leveraging the
// bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations, arXiv 1904.06376.
#pragma once
#include "gemm.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define RW_HAS_TILES 1

namespace rw::cpu::RW_ISA {

// Of a panel (32 rows of a, or 32 columns of b) a step of 32 along k is two tiles for each piece: tile[16][32] of bf16,
// 1 KB. A row of a's tile is one row's 32 elements; a row of b's is two of k, pair by pair for 16 columns.
constexpr int64_t TILE = 16;
constexpr int64_t PANEL = 2 * TILE;
constexpr int64_t STEP = 32;
constexpr int64_t TILE_SIZE = TILE * STEP;  // in elements
constexpr int64_t PIECE = 2 * TILE_SIZE;    // of a step: both tiles

namespace {

// Tile registers in the only shape that is used here: 16 rows of 64 bytes.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The registers are a thread's from the one to the other; nothing in between may throw.
inline void take_tiles() { _tile_loadconfig(&kTileConfig); }
inline void release_tiles() { _tile_release(); }

// The compiler does not know that the instructions read memory.
inline void memory_is_read() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

#define RW_ALWAYS inline __attribute__((always_inline))

// One piece of 32 rows and of 32 columns, and their four products.
RW_ALWAYS void load_rows_of_a(const uint16_t* piece) {
  _tile_loadd(4, piece, 64);
  _tile_loadd(5, piece + TILE_SIZE, 64);
}
RW_ALWAYS void load_columns_of_b(const uint16_t* piece) {
  _tile_loadd(6, piece, 64);
  _tile_loadd(7, piece + TILE_SIZE, 64);
}
RW_ALWAYS void multiply_pieces() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// c = init + a b for 32 rows and 32 columns of f32, `steps` of 32 along k; strides in elements. A null init is 0.
template <int PA, int PB>
void tile_product(int64_t steps, const uint16_t* a, const uint16_t* b, const float* init, int64_t ldi, float* c,
                  int64_t ldc) {
  memory_is_read();
  if (init) {
    _tile_loadd(0, init, ldi * 4);
    _tile_loadd(1, init + TILE, ldi * 4);
    _tile_loadd(2, init + TILE * ldi, ldi * 4);
    _tile_loadd(3, init + TILE * ldi + TILE, ldi * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; step++, a += PA * PIECE, b += PB * PIECE) {
    if constexpr (PA == 3 && PB == 3) {
      load_rows_of_a(a);
      load_columns_of_b(b + 2 * PIECE);
      multiply_pieces();
      load_columns_of_b(b + PIECE);
      multiply_pieces();
      load_columns_of_b(b);
      multiply_pieces();
      load_rows_of_a(a + 2 * PIECE);
      multiply_pieces();
      load_rows_of_a(a + PIECE);
      multiply_pieces();
      load_columns_of_b(b + PIECE);
      multiply_pieces();
    } else if constexpr (PA > 1) {
      load_columns_of_b(b);
      if constexpr (PA == 3) {
        load_rows_of_a(a + 2 * PIECE);
        multiply_pieces();
      }
      load_rows_of_a(a + PIECE);
      multiply_pieces();
      load_rows_of_a(a);
      multiply_pieces();
    } else {
      load_rows_of_a(a);
      if constexpr (PB == 3) {
        load_columns_of_b(b + 2 * PIECE);
        multiply_pieces();
      }
      if constexpr (PB >= 2) {
        load_columns_of_b(b + PIECE);
        multiply_pieces();
      }
      load_columns_of_b(b);
      multiply_pieces();
    }
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + TILE, ldc * 4);
  _tile_stored(2, c + TILE * ldc, ldc * 4);
  _tile_stored(3, c + TILE * ldc + TILE, ldc * 4);
  memory_is_read();
}

#undef RW_ALWAYS

// x and y one after the other, rounded to nearest, ties to even; denormals become zeros, as everywhere in the unit.
inline void store_rounded(bf16* p, vf x, vf y) {
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  memcpy(p, &both, sizeof(both));
}

// The upper halves of x and y: lane by lane as pairs, or all of x and then all of y.
inline vu pairs(vu x, vu y) { return x >> 16 | (y & 0xffff0000u); }
inline vu joined(vu x, vu y) {
  constexpr __v32hi odd = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                           33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return (vu)_mm512_permutex2var_epi16((__m512i)x, (__m512i)odd, (__m512i)y);
}

// Takes the next piece off x: its upper half is x rounded to bf16 (ties away from zero), and x becomes the rest.
inline vu take_piece(vf& x) {
  const vu piece = ((vu)x + 0x8000u) & 0xffff0000u;
  x -= (vf)piece;
  return piece;
}

// Infinities, NaN, and what rounds to an infinity in bf16 or, in f32, would leave one as its first piece. A weight of
// zero does not hide them from the unit: where weights mask, they are packed as zeros (take_odd) and added by hand.
constexpr uint32_t kOdd = 0x7f7f8000u;

template <typename T>
bool any_odd(const T* from, int64_t ld, int64_t rows, int64_t columns) {
  vu largest = {};
  uint32_t rest = 0;
  for (int64_t r = 0; r < rows; r++) {
    int64_t c = 0;
    for (; c + VL <= columns; c += VL) {
      const vu size = (vu)load(from + r * ld + c) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
    for (; c < columns; c++) {
      const float x = to_float(from[r * ld + c]);
      uint32_t bits;
      memcpy(&bits, &x, sizeof(bits));
      rest = (bits & 0x7fffffffu) > rest ? bits & 0x7fffffffu : rest;
    }
  }
  for (int64_t lane = 0; lane < VL; lane++) rest = largest[lane] > rest ? largest[lane] : rest;
  return rest >= kOdd;
}

// Moves what is odd from `values` to `odd`, and leaves zeros in either place.
inline void take_odd(float* values, float* odd, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, values + i, sizeof(bits));
    const bool is_odd = (bits & 0x7fffffffu) >= kOdd;
    odd[i] = is_odd ? values[i] : 0;
    values[i] = is_odd ? 0 : values[i];
  }
}

// Up to 16 lines and 32 of k as a tile of each piece; what is missing is 0. `along`: a line's elements follow each
// other, and tile rows are lines; else the elements of one k do, and tile rows are pairs of k.
template <int pieces, bool along, typename T>
void pack_tile(const T* source, int64_t line, int64_t step, int64_t lines, int64_t depth, uint16_t* tile) {
  const bool whole = lines >= TILE && depth >= STEP;
  const auto take = [](const T* p, int64_t n) { return n >= VL ? load(p) : n > 0 ? load_some(p, n) : vf{}; };
  if constexpr (pieces == 1 && along && sizeof(T) == sizeof(bf16))
    if (whole) {
      for (int64_t row = 0; row < TILE; row++) memcpy(tile + row * STEP, source + row * line, STEP * sizeof(T));
      return;
    }
#pragma GCC unroll 2
  for (int64_t row = 0; row < TILE; row++) {
    vf x, y;
    if (along) {
      const T* p = source + row * line;
      x = whole ? load(p) : take(p, row < lines ? depth : 0);
      y = whole ? load(p + VL) : take(p + VL, row < lines ? depth - VL : 0);
    } else {
      const T* p = source + 2 * row * step;
      x = whole ? load(p) : take(p, 2 * row < depth ? lines : 0);
      y = whole ? load(p + step) : take(p + step, 2 * row + 1 < depth ? lines : 0);
    }
#pragma GCC unroll 3
    for (int piece = 0; piece < pieces; piece++) {
      const bool last = piece == pieces - 1;
      const vu high = last ? (vu)x : take_piece(x), low = last ? (vu)y : take_piece(y);
      const vu packed = along ? joined(high, low) : pairs(high, low);
      memcpy(tile + piece * PIECE + row * STEP, &packed, sizeof(packed));
    }
  }
}

// Rows of a tile become its columns, pairs of k as they are.
inline void turn_tile(uint16_t* tile) {
  vf x[VL];
  memcpy(x, tile, sizeof(x));
  transpose(x);
  memcpy(tile, x, sizeof(x));
}

// Packs `count` rows of a, or columns of b (`of_b`), of which `line` is the stride and `step` that along k; one of them
// is 1. Panels are `stride` elements apart; what is missing to whole panels and steps is 0.
template <int pieces, bool of_b, typename T>
void pack_panels(const T* source, int64_t line, int64_t step, int64_t count, int64_t depth, uint16_t* panels,
                 int64_t stride) {
  for (int64_t i = 0; i < count; i += PANEL, panels += stride)
    for (int64_t half = 0; half < PANEL; half += TILE)
      for (int64_t k = 0; k < depth; k += STEP) {
        uint16_t* tile = panels + k / STEP * pieces * PIECE + half / TILE * TILE_SIZE;
        const T* from = source + (i + half) * line + k * step;
        if (step == 1)
          pack_tile<pieces, true>(from, line, step, count - i - half, depth - k, tile);
        else
          pack_tile<pieces, false>(from, line, step, count - i - half, depth - k, tile);
        if ((step == 1) == of_b)
          for (int piece = 0; piece < pieces; piece++) turn_tile(tile + piece * PIECE);
      }
}

}  // namespace
}  // namespace rw::cpu::RW_ISA

#endif
