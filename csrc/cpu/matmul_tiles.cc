// c = a b (+ add) for many rows with AMX (tiles.h): the loops of matmul.cc around a micro-tile of 32 x 32.
//
// For NC columns, b is packed once for all threads (16 MB at most). Tasks are blocks of c, MC rows by these columns;
// each packs its MC x KC piece of a, at most 768 KB of a 2 MB L2, and walks the micro-tiles with a panel of b, 32 or 96
// KB, at a time. f32 c is summed in place over the blocks of K; otherwise, and for tiles that are not whole, the sums
// wait in the thread's scratch. Each c is a sum over k in an order that the shape fixes, by one thread.
#include "tiles.h"

#include "product.h"

namespace rw::cpu::RW_ISA {

#ifdef RW_HAS_TILES

namespace {

constexpr int64_t MC = 256;
constexpr int64_t depth_in_l2(int pieces) { return 1536 / pieces; }  // KC
constexpr int64_t depth_in_l1(int pieces) { return pieces == 1 ? 256 : 512; }
constexpr int64_t KP = 512;                 // k of a packing task
constexpr int64_t PACKED_BYTES = 16 << 20;  // of b, or 8 panels where k is huge
constexpr int64_t GROUP = 4 * PANEL;        // columns of a packing task
constexpr int64_t SUMS = PANEL * PANEL;

template <int pieces, bool of_b>
void pack(const Matrix& x, int64_t offset, int64_t line, int64_t step, int64_t count, int64_t depth, uint16_t* panels,
          int64_t stride) {
  if constexpr (pieces == 3)
    pack_panels<3, of_b>(static_cast<const float*>(x.data) + offset, line, step, count, depth, panels, stride);
  else
    pack_panels<1, of_b>(static_cast<const bf16*>(x.data) + offset, line, step, count, depth, panels, stride);
}

// Packs columns j .. j + count of b from row k on, at most GROUP and KP of them.
template <int pieces>
void pack_b(const Problem& p, int64_t j, int64_t k, int64_t count, int64_t depth, uint16_t* panels, int64_t stride) {
  const Matrix& b = p.b;
  const int64_t start = j * b.column + k * b.row;
  if (!is_quantized(b.dtype)) return pack<pieces, true>(b, start, b.column, b.row, count, depth, panels, stride);
  float values[TILE * KP];
  if (b.row == 1) {
    for (int64_t i = 0; i < count; i += PANEL, panels += stride)
      for (int64_t half = 0; half < PANEL; half += TILE) {
        const int64_t columns = max(0, min(count - i - half, TILE));
        for (int64_t column = 0; column < columns; column++)
          dequantize_run(b.dtype, p.q, start + (i + half + column) * b.column, depth, p.a.dtype, values + column * KP);
        // half a panel, of which the other half is left alone
        for (int64_t step = 0; step < depth; step += STEP) {
          uint16_t* tile = panels + step / STEP * pieces * PIECE + half / TILE * TILE_SIZE;
          pack_tile<pieces, true>(values + step, KP, 1, columns, depth - step, tile);
          for (int piece = 0; piece < pieces; piece++) turn_tile(tile + piece * PIECE);
        }
      }
  } else {
    static_assert(GROUP * STEP <= TILE * KP, "a step of rows is dequantised at a time");
    for (int64_t step = 0; step < depth; step += STEP) {
      const int64_t rows = min(depth - step, STEP);
      for (int64_t row = 0; row < rows; row++)
        dequantize_run(b.dtype, p.q, start + (step + row) * b.row, count, p.a.dtype, values + row * GROUP);
      pack_panels<pieces, true>(values, 1, GROUP, count, rows, panels + step / STEP * pieces * PIECE, stride);
    }
  }
}

// What there is of a tile, the rest 0.
void copy_part(const float* from, int64_t ld, int64_t rows, int64_t columns, float* tile) {
  memset(tile, 0, SUMS * sizeof(float));
  for (int64_t i = 0; i < rows; i++) memcpy(tile + i * PANEL, from + i * ld, columns * sizeof(float));
}

// finish() for a whole panel of columns of a bf16 c.
template <typename A>
void finish_rows(const Problem& p, int64_t i, int64_t j, int64_t rows, const float* sums) {
  const A* add = at<A>(p.add, i, j);
  bf16* c = at<bf16>(p.c, i, j);
  for (int64_t row = 0; row < rows; row++, sums += PANEL, c += p.c.row) {
    vf x = load(sums), y = load(sums + VL);
    if (add) {
      x += load(add + row * p.add.row);
      y += load(add + row * p.add.row + VL);
    }
    store_rounded(c, x, y);
  }
}

// Rows [i0, i1) and columns [j0, j1) of c, the latter packed in `b` from j0 on, panels `b_stride` elements apart.
template <int PA, int PB>
void multiply_block(const Problem& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1, const uint16_t* b,
                    int64_t b_stride, float* own) {
  constexpr int64_t KC = depth_in_l2(PA), KI = PB == 1 ? depth_in_l1(PA) : KC;
  take_tiles();
  uint16_t* a = reinterpret_cast<uint16_t*>(own);
  const int64_t panels = ceil_div(i1 - i0, PANEL), a_stride = ceil_div(min(p.k, KC), STEP) * PA * PIECE;
  float* tiles = own + panels * a_stride / 2;
  // Where add comes first for whole tiles, it does for all: which are whole depends on the threads.
  const bool begins_with_add = p.sums_in_place() && p.add.data;
  Problem rest = p;
  if (begins_with_add) rest.add.data = nullptr;
  // A tile is finished after the product of the next one, which the unit works on meanwhile.
  struct {
    int64_t i, j, rows, columns;
    const float* sums;
  } done = {};
  const auto finish_done = [&] {
    if (done.sums && p.c.dtype == DType::bf16 && done.columns == PANEL)
      p.add.dtype == DType::f32 ? finish_rows<float>(p, done.i, done.j, done.rows, done.sums)
                                : finish_rows<bf16>(p, done.i, done.j, done.rows, done.sums);
    else if (done.sums)
      finish(rest, done.i, done.j, done.rows, done.columns, done.sums, PANEL);
    done.sums = nullptr;
  };
  for (int64_t k0 = 0; k0 < p.k; k0 += KC) {
    const int64_t end = min(p.k, k0 + KC);
    pack<PA, false>(p.a, i0 * p.a.row + k0 * p.a.column, p.a.row, p.a.column, i1 - i0, end - k0, a, a_stride);
    for (int64_t j = j0; j < j1; j += PANEL) {
      const uint16_t* b_panel = b + (j - j0) / PANEL * b_stride;
      const int64_t columns = min(j1 - j, PANEL);
      for (int64_t k = k0; k < end; k += KI) {
        const int64_t steps = ceil_div(min(end - k, KI), STEP);
        for (int64_t i = i0, panel = 0; i < i1; i += PANEL, panel++) {
          const int64_t rows = min(i1 - i, PANEL);
          const uint16_t* a_tiles = a + panel * a_stride + (k - k0) / STEP * PA * PIECE;
          const uint16_t* b_tiles = b_panel + k / STEP * PB * PIECE;
          if (p.sums_in_place() && columns == PANEL && rows == PANEL) {
            const Matrix& init = k == 0 ? p.add : p.c;
            tile_product<PA, PB>(steps, a_tiles, b_tiles, at<float>(init, i, j), init.row, at<float>(p.c, i, j),
                                 p.c.row);
            continue;
          }
          // Those that wait for the next piece of a are kept apart; else there is one more than are worked on.
          const int64_t tile = (j - j0) / PANEL * panels + panel;
          float* sums = tiles + (p.k > KC ? tile : tile % (panels + 1)) * SUMS;
          if (k == 0 && begins_with_add) copy_part(at<float>(p.add, i, j), p.add.row, rows, columns, sums);
          tile_product<PA, PB>(steps, a_tiles, b_tiles, k == 0 && !begins_with_add ? nullptr : sums, PANEL, sums,
                               PANEL);
          finish_done();
          if (k + KI >= p.k) done = {i, j, rows, columns, sums};
        }
      }
    }
  }
  finish_done();
  release_tiles();
}

template <int PA, int PB>
void multiply(Context& context, const Problem& p) {
  const int64_t threads = context.threads();
  const int64_t b_stride = ceil_div(p.k, STEP) * PB * PIECE;
  int64_t nc = max(PACKED_BYTES / (2 * b_stride), 8) * PANEL;
  nc = round_up(ceil_div(p.n, ceil_div(p.n, nc)), PANEL);
  const Blocks<PANEL, MC> rows(p.m, threads);
  // and columns, where they are not enough and packing a again is still cheap
  int64_t splits = max(1, min(threads == 1 ? 1 : ceil_div(4 * threads, rows.count()), nc / (8 * PANEL)));
  const int64_t width = round_up(ceil_div(nc, splits), PANEL);
  splits = ceil_div(nc, width);

  constexpr int64_t KC = depth_in_l2(PA);
  const int64_t panels = rows.most_panels();
  const int64_t a_stride = ceil_div(min(p.k, KC), STEP) * PA * PIECE;
  const int64_t tiles = p.k > KC ? panels * (width / PANEL) : panels + 1;
  Workspace work(context, nc / PANEL * b_stride / 2, panels * a_stride / 2 + tiles * SUMS);
  uint16_t* b = reinterpret_cast<uint16_t*>(work.shared);
  for (int64_t j0 = 0; j0 < p.n; j0 += nc) {
    const int64_t columns = min(p.n - j0, nc);
    const int64_t slabs = ceil_div(p.k, KP);
    for_tasks(context, p, ceil_div(columns, GROUP) * slabs, [&](int64_t task, int) {
      const int64_t j = task / slabs * GROUP, k0 = task % slabs * KP;
      pack_b<PB>(p, j0 + j, k0, min(columns - j, GROUP), min(p.k - k0, KP),
                 b + j / PANEL * b_stride + k0 / STEP * PB * PIECE, b_stride);
    });
    for_tasks(context, p, rows.count() * splits, [&](int64_t task, int thread) {
      const int64_t block = task / splits, j = task % splits * width;
      const int64_t i = rows.start(block), end = rows.end(block);
      if (j >= columns || i >= end) return;
      multiply_block<PA, PB>(p, i, end, j0 + j, j0 + min(j + width, columns), b + j / PANEL * b_stride, b_stride,
                             work.own(thread));
    });
  }
}

}  // namespace

void multiply_tiles(Context& context, const Problem& p) {
  if (p.a.dtype == DType::f32)
    p.b_is_f32() ? multiply<3, 3>(context, p) : multiply<3, 1>(context, p);
  else
    p.b_is_f32() ? multiply<1, 3>(context, p) : multiply<1, 1>(context, p);
}

#else

void multiply_tiles(Context&, const Problem&) {}

#endif

}  // namespace rw::cpu::RW_ISA
