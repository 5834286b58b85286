// The tiled forward pass of attention.h with products by AMX (tiles.h), and the choice between the two.
//
// Strips are 32 queries, s^T = k q^T comes 32 keys at a time, and weights go from registers into the packed form that
// o^T += v^T p^T multiplies. f32 is taken in three pieces throughout, as in every product; with bf16, rotated queries
// are rounded to bf16, as rotated keys are, and weights have two pieces: 16 bits, which bf16 results do not tell from
// f32. Keys and values are packed once for 512 rows of queries, so that packing costs a tenth of the products. Exact in
// f32 are q, k, v and weights; infinities among q and k give NaN, those of v do as they should.
#pragma once
#include "attention.h"
#include "tiles.h"

namespace rw::cpu::RW_ISA {

#ifdef RW_HAS_TILES

constexpr int64_t tiles_rows = 512;  // rows of queries of a task, over the query heads of a kv head
constexpr int64_t tiles_strips = tiles_rows / PANEL;

template <typename F>
struct TileAttention {
  static constexpr int of_keys = sizeof(F) == sizeof(float) ? 3 : 1;
  static constexpr int of_weights = sizeof(F) == sizeof(float) ? 3 : 2;

  const Attend<F>& a;
  int64_t D = a.head_dim;
  int64_t steps = round_up(D, STEP) / STEP;             // along D
  int64_t k_panel = steps * of_keys * PIECE;            // 32 keys, or 32 queries
  int64_t v_panel = key_tile / STEP * of_keys * PIECE;  // 32 of D
  int64_t strips = round_up(a.tokens, PANEL) / PANEL;
  // Scores are powers of two. In f32 queries bring the factor along; in bf16 it would be rounded with them.
  static constexpr bool scaled_queries = sizeof(F) == sizeof(float);
  float factor = a.scale * log2_e;
  vf power(vf difference) const { return power_of_two(scaled_queries ? difference : difference * factor); }

  // Per strip and head: q packed, o^T, maximum and sum.
  struct Strip {
    uint16_t* q;
    float *ot, *m, *l;
  };
  float* memory = nullptr;
  uint16_t *k = nullptr, *v = nullptr, *weights = nullptr;
  float *p = nullptr, *rows = nullptr, *values = nullptr, *odd_values = nullptr;
  int32_t* bounds = nullptr;

  int64_t strip_floats() const { return k_panel / 2 + (steps * STEP + 2) * PANEL; }

  static size_t scratch(const Attend<F>& a) {
    TileAttention x{a};
    return x.lay_out(0);
  }

  // Takes the parts of scratch memory from an address on; returns the end.
  uintptr_t lay_out(uintptr_t at) {
    const auto take = [&](int64_t floats) {
      float* part = reinterpret_cast<float*>(at);
      at += static_cast<uintptr_t>(round_up(floats, 16)) * sizeof(float);
      return part;
    };
    memory = take(a.group * strips * strip_floats());
    k = reinterpret_cast<uint16_t*>(take(key_tile / PANEL * k_panel / 2));
    v = reinterpret_cast<uint16_t*>(take(steps * v_panel / 2));
    weights = reinterpret_cast<uint16_t*>(take(key_tile / STEP * of_weights * PIECE));
    p = take(2 * key_tile * PANEL);
    rows = take(PANEL * D);
    values = take(key_tile * D);
    odd_values = take(key_tile * D);
    bounds = reinterpret_cast<int32_t*>(take(strips * 2 * PANEL));
    return at;
  }

  Strip strip_of(int64_t head, int64_t s) const {
    float* at = memory + (head * strips + s) * strip_floats();
    float* ot = at + k_panel / 2;
    float* m = ot + steps * STEP * PANEL;
    return {reinterpret_cast<uint16_t*>(at), ot, m, m + PANEL};
  }

  void prepare(int64_t head, int64_t s) const {
    const Strip x = strip_of(head, s);
    const int64_t live = min_of(PANEL, a.tokens - s * PANEL);
    F* rotated = reinterpret_cast<F*>(rows);
    for (int64_t i = 0; i < live; i++) {
      const int64_t t = s * PANEL + i, angle = a.pos[t] * (D / 2);
      rotate(rotated + i * D, a.q + t * a.q_stride + head * D, a.cos + angle, a.sin + angle, D / 2,
             scaled_queries ? factor : 1.0f);
    }
    pack_panels<of_keys, true>(rotated, D, 1, live, D, x.q, k_panel);
    memset(x.ot, 0, sizeof(float) * (steps * STEP + 2) * PANEL);
    for (int64_t i = 0; i < PANEL; i++) x.m[i] = lowest;
  }

  // Keys n0 .. n1 and their values; returns whether some of those are odd and in odd_values.
  bool load_tile(int64_t n0, int64_t n1) const {
    pack_panels<of_keys, false>(a.k + n0 * a.k_stride, a.k_stride, 1, n1 - n0, D, k, k_panel);
    const F* from = a.v + n0 * a.v_stride;
    if (!any_odd(from, a.v_stride, n1 - n0, D)) {
      pack_panels<of_keys, false>(from, 1, a.v_stride, D, n1 - n0, v, v_panel);
      return false;
    }
    load_rows(values, D, from, a.v_stride, n1 - n0, D);
    take_odd(values, odd_values, (n1 - n0) * D);
    pack_panels<of_keys, false>(values, 1, D, D, n1 - n0, v, v_panel);
    return true;
  }

  // 2^x for |x| <= 126; below that 2^-126, NaN stays NaN. As exp2, with two instructions that only AVX-512 has, and for
  // bf16 to within 3e-6 of it: weights of 16 bits lose as much.
  static vf power_of_two(vf x) {
    x = max(broadcast(-126.0f), x);
    const vf r = (vf)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
    vf p;
    if constexpr (sizeof(F) == sizeof(float)) {
      p = broadcast(1.5353362e-4f);
      p = p * r + 1.3398875e-3f;
      p = p * r + 9.6184369e-3f;
      p = p * r + 5.5503324e-2f;
      p = p * r + 2.4022648e-1f;
      p = p * r + 6.9314718e-1f;
    } else {
      p = broadcast(9.58285324e-3f);
      p = p * r + 5.59064259e-2f;
      p = p * r + 2.40240986e-1f;
      p = p * r + 6.93124193e-1f;
    }
    p = p * r + 1.0f;
    return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)(x - r));
  }

  // The keys [low, high) of a tile for one strip and head; `bound` is null where all its queries see all of them.
  struct Item {
    Strip x;
    int64_t low, high;
    const int32_t* bound;
    float* p;
    uint16_t* weights;
  };

  // Products that are ready to run: s^T of the next item and o^T of the one before. They are issued one by one between
  // the weights of an item, so that the unit and the vectors work side by side.
  struct Product {
    bool of_weights;
    int64_t steps;
    const uint16_t *a, *b;
    float* c;
  };
  struct Queue {
    Product product[16];
    int count = 0, next = 0;
  };

  static void issue(Queue& queue) {
    if (queue.next == queue.count) return;
    const Product& x = queue.product[queue.next++];
    if (x.of_weights)
      tile_product<of_keys, of_weights>(x.steps, x.a, x.b, x.c, PANEL, x.c, PANEL);
    else
      tile_product<of_keys, of_keys>(x.steps, x.a, x.b, nullptr, 0, x.c, PANEL);
  }
  static void finish(Queue& queue) {
    while (queue.next < queue.count) issue(queue);
    queue.next = queue.count = 0;
  }
  void add_scores(Queue& queue, const Item& item) const {
    for (int64_t n = item.low; n < item.high; n += PANEL)
      queue.product[queue.count++] = {false, steps, k + n / PANEL * k_panel, item.x.q, item.p + n * PANEL};
  }
  void add_output(Queue& queue, const Item& item) const {
    for (int64_t d = 0; d < steps; d++)
      queue.product[queue.count++] = {
          true, (item.high - item.low) / STEP, v + d * v_panel + item.low / STEP * of_keys * PIECE,
          item.weights + item.low / STEP * of_weights * PIECE, item.x.ot + d * STEP * PANEL};
  }

  // Scores to weights, in place (where `masked`) and packed; raises m, l and o^T to the new maximum where it is above
  // the old one by a factor of 2^8: until then weights above 1 do no harm, and o^T stays where it is. Rows of p beyond
  // the last key hold nothing and are masked.
  template <bool masked>
  void weigh(const Item& item, int64_t n0, Queue& queue) const {
    constexpr int V = 2;
    const Strip& x = item.x;
    vf top[V], total[V];
    vi first[V], last[V], grown[V];
    issue(queue);
    for (int j = 0; j < V; j++) {
      if (masked) {
        memcpy(&first[j], item.bound + j * VL, sizeof(vi));
        memcpy(&last[j], item.bound + PANEL + j * VL, sizeof(vi));
      }
    }
    const auto sees = [&](int64_t n, int j) {
      return (first[j] <= static_cast<int32_t>(n0 + n)) & (last[j] >= static_cast<int32_t>(n0 + n));
    };
    vf tops[4][V];  // chains, to hide the latency of a comparison
    for (auto& chain : tops)
      for (vf& x : chain) x = broadcast(lowest);
    for (int64_t n = item.low; n < item.high; n += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int j = 0; j < V; j++) {
          const vf s = load(item.p + (n + i) * PANEL + j * VL);
          if (masked)
            tops[i][j] = (sees(n + i, j) & (s > tops[i][j])) ? s : tops[i][j];
          else
            tops[i][j] = max(s, tops[i][j]);
        }
    vi any_grown = {};
    for (int j = 0; j < V; j++) {
      const vf m = load(x.m + j * VL);
      top[j] = max(max(tops[0][j], tops[1][j]), max(tops[2][j], tops[3][j]));
      grown[j] = (vi)(scaled_queries ? top[j] - m > 8.0f : (top[j] - m) * factor > 8.0f);
      any_grown |= grown[j];
      top[j] = grown[j] ? top[j] : m;
      total[j] = vf{};
    }
    if (any(any_grown)) {
      vf shrink[V];
      for (int j = 0; j < V; j++) {
        shrink[j] = power(load(x.m + j * VL) - top[j]);  // 1 where the maximum stays
        store(x.m + j * VL, top[j]);
        store(x.l + j * VL, load(x.l + j * VL) * shrink[j]);
      }
      for (int64_t d = 0; d < D; d++)
        for (int j = 0; j < V; j++) store(x.ot + d * PANEL + j * VL, load(x.ot + d * PANEL + j * VL) * shrink[j]);
    }
    for (int64_t begin = item.low; begin < item.high; begin += TILE) {
      issue(queue);
      for (int64_t n = begin; n < begin + TILE; n += 2) {
        uint16_t* to = item.weights + n / STEP * of_weights * PIECE + n % STEP / 2 * STEP;
        for (int j = 0; j < V; j++) {
          float* s = item.p + n * PANEL + j * VL;
          vf e = power(load(s) - top[j]), f = power(load(s + PANEL) - top[j]);
          if (masked) {
            e = sees(n, j) ? e : vf{};
            f = sees(n + 1, j) ? f : vf{};
            store(s, e);
            store(s + PANEL, f);
          }
          total[j] += e;
          total[j] += f;
          for (int piece = 0; piece < of_weights; piece++) {
            const bool last = piece == of_weights - 1;  // exact in f32, cut off in bf16
            const vu packed = last ? pairs((vu)e, (vu)f) : pairs(take_piece(e), take_piece(f));
            memcpy(to + piece * PIECE + j * TILE_SIZE, &packed, sizeof(packed));
          }
        }
      }
    }
    for (int j = 0; j < V; j++) store(x.l + j * VL, load(x.l + j * VL) + total[j]);
    finish(queue);
  }

  void finish(int64_t head, int64_t s) const {
    const Strip x = strip_of(head, s);
    for (int64_t j = 0; j < PANEL; j += VL) {
      vf total = load(x.l + j);
      total = total == 0.0f ? broadcast(1.0f) : total;
      for (int64_t d = 0; d < D; d++) store(x.ot + d * PANEL + j, load(x.ot + d * PANEL + j) / total);
    }
    transpose(rows, D, x.ot, PANEL, D, PANEL);
    for (int64_t i = 0; i < PANEL && s * PANEL + i < a.tokens; i++) {
      const int64_t t = s * PANEL + i;
      store_row(a.o + t * a.q_stride + head * D, rows + i * D, D);
      if (a.lse) a.lse[head * a.lse_stride + t] = x.m[i] * (scaled_queries ? ln_2 : a.scale) + __builtin_logf(x.l[i]);
    }
  }

  void run(float* scratch) {
    lay_out(reinterpret_cast<uintptr_t>(scratch));
    take_tiles();
    StripBounds range[tiles_strips], all = {INT64_MAX, 0, INT64_MAX, -1};
    for (int64_t s = 0; s < strips; s++) {
      const StripBounds& own = range[s] = bounds_of(a, s, PANEL, bounds + 2 * s * PANEL);
      all.first_min = min_of(all.first_min, own.first_min);
      all.last_max = max_of(all.last_max, own.last_max);
      for (int64_t head = 0; head < a.group; head++) prepare(head, s);
    }
    for (int64_t n0 = all.first_min / key_tile * key_tile; n0 <= all.last_max; n0 += key_tile) {
      const int64_t n1 = min_of(n0 + key_tile, a.keys);
      int64_t visible[tiles_strips], count = 0;
      for (int64_t s = 0; s < strips; s++)
        if (range[s].first_min < n1 && range[s].last_max >= n0) visible[count++] = s;
      if (count == 0) continue;
      const bool odd = load_tile(n0, n1);
      const auto item_at = [&](int64_t i) -> Item {
        const int64_t s = visible[i / a.group], turn = i % 2;
        const StripBounds& own = range[s];
        const int64_t low = max_of(own.first_min - n0, 0) / PANEL * PANEL;
        const int64_t high = round_up(min_of(own.last_max + 1, n1) - n0, PANEL);
        const bool sees_all = own.first_max <= n0 + low && own.last_min >= n0 + high - 1;
        return {strip_of(i % a.group, s),
                low,
                high,
                sees_all && !odd ? nullptr : bounds + 2 * s * PANEL,
                p + turn * key_tile * PANEL,
                weights + turn * key_tile / STEP * of_weights * PIECE};
      };
      Queue queue;
      Item before = item_at(0), item = before, next = before;
      add_scores(queue, item);
      finish(queue);
      for (int64_t i = 0; i < count * a.group; i++, before = item, item = next) {
        if (i > 0) add_output(queue, before);
        if (i + 1 < count * a.group) add_scores(queue, next = item_at(i + 1));
        if (item.bound)
          weigh<true>(item, n0, queue);
        else
          weigh<false>(item, n0, queue);
        if (odd)  // what the unit left out
          multiply_selected<true, false>(odd_values + item.low * D, D, item.p + item.low * PANEL, PANEL,
                                         min_of(item.high, n1 - n0) - item.low, item.x.ot, PANEL, D, PANEL);
      }
      add_output(queue, before);
      finish(queue);
    }
    release_tiles();
    for (int64_t s = 0; s < strips; s++)
      for (int64_t head = 0; head < a.group; head++) finish(head, s);
  }
};

#endif

// Tokens of a task, of B sequences of T tokens with K kv heads. Strips are the same for any multiple of 32, so that a
// number that depends on the threads changes no bit.
static inline int64_t query_tile([[maybe_unused]] Context& context, [[maybe_unused]] int64_t B,
                                 [[maybe_unused]] int64_t T, [[maybe_unused]] int64_t K, int64_t group) {
#ifdef RW_HAS_TILES
  if (context.has_tiles()) {
    int64_t tokens = max_of(tiles_rows / group / PANEL, 1) * PANEL;
    while (tokens > 4 * PANEL && context.threads() > 1 && B * K * (T / tokens) < 4 * context.threads())
      tokens = tokens / 2 / PANEL * PANEL;
    return tokens;
  }
#endif
  return query_tile(group);
}

template <typename F>
static void attend(Context& context, int thread, const Attend<F>& a) {
#ifdef RW_HAS_TILES
  if (context.has_tiles()) {
    TileAttention<F> tiles{a};
    return tiles.run(static_cast<float*>(context.scratch(thread, TileAttention<F>::scratch(a))));
  }
#endif
  attend(a, static_cast<float*>(context.scratch(thread, attend_scratch(a.head_dim, a.group))));
}

}  // namespace rw::cpu::RW_ISA
