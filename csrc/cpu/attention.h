// What the attention kernels share: small matrix products on tiles in cache, 2^x, rotations, transposes, and the tiled
// forward pass over the keys of one kv head, which serves attention_fwd and the prefill of attention_cached.
//
// Every tile product is c[r][lane] (+)= sum_k a(r, k) b[k][lane]: b holds vectors, an element of a is broadcast, so a
// may be read along its rows or across them at the same speed. An element of c is one chain of additions in the order
// of k whatever the tile: how a range of k is split does not change a bit.
#pragma once
#include <utility>

#include "cpu.h"
#include "simd.h"

namespace rw::cpu::RW_ISA {

// 8 x 3 vectors of sums fill 24 of the 32 AVX-512 registers and need 11 loads for 24 multiply-adds; with 16 registers
// 4 x 3 is what fits.
constexpr int tile_rows = RW_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int strip_vectors = 3;
constexpr int64_t strip = strip_vectors * VL;  // lanes of a strip: queries in the forward pass, keys in the backward
constexpr int64_t key_tile = 128;              // keys of a forward tile
constexpr int64_t max_strips = 192 / strip;

// Tokens of a forward task. Keys and values are read once for 192 queries or more: with 96 and one query head a kv head
// it was 10 % slower at T = 4096.
constexpr int64_t query_tile(int64_t group) { return group == 1 ? 192 : 96; }

constexpr int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// x - 0 is x in every bit, so that only the broadcast remains; x + 0 would be an addition.
static inline vf broadcast(float x) { return x - vf{}; }

// c[rows][vectors] (+)= a b. a(r, k) = across ? a[k * lda + r] : a[r * lda + k].
template <int rows, int vectors, bool across>
static inline void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                                 int64_t ldc, bool add) {
  vf sum[rows][vectors];
  if (add) {
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < vectors; j++) sum[r][j] = load(c + r * ldc + j * VL);
  } else {
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < vectors; j++) sum[r][j] = vf{};
  }
  for (int64_t k = 0; k < depth; k++) {
    vf right[vectors];
    for (int j = 0; j < vectors; j++) right[j] = load(b + k * ldb + j * VL);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      vf left = broadcast(across ? a[k * lda + r] : a[r * lda + k]);
      for (int j = 0; j < vectors; j++) sum[r][j] += left * right[j];
    }
  }
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < vectors; j++) store(c + r * ldc + j * VL, sum[r][j]);
}

template <int vectors, bool across>
static void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                     int64_t rows, bool add) {
  int64_t step = across ? 1 : lda, r = 0;
  for (; r + tile_rows <= rows; r += tile_rows)
    multiply_tile<tile_rows, vectors, across>(a + r * step, lda, b, ldb, depth, c + r * ldc, ldc, add);
  for (; r + 4 <= rows; r += 4)
    multiply_tile<4, vectors, across>(a + r * step, lda, b, ldb, depth, c + r * ldc, ldc, add);
  for (; r < rows; r++) multiply_tile<1, vectors, across>(a + r * step, lda, b, ldb, depth, c + r * ldc, ldc, add);
}

// The same products, but those whose factor in b (or in a, where select_a) is exactly zero are left out instead of
// added as zeros: taken where a masked weight would meet an infinity or a NaN of another document, and nowhere else.
template <bool across, bool select_a>
static void multiply_selected(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                              int64_t ldc, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < depth; k++) {
      float left = across ? a[k * lda + r] : a[r * lda + k];
      if (select_a && left == 0) continue;
      for (int64_t j = 0; j < columns; j++)
        if (select_a || b[k * ldb + j] != 0) c[r * ldc + j] += left * b[k * ldb + j];
    }
}

// 2^x to within 1 unit in the last place for |x| <= 126; below that 2^-126, NaN stays NaN. 2^r on |r| <= 1/2 is the
// minimax polynomial with constant term 1.
static inline vf exp2(vf x) {
  x = max(broadcast(-126.0f), x);
  vf n = x + 12582912.0f;  // 1.5 * 2^23: rounds to nearest in the low bits
  vi power = ((vi)n + 127) << 23;
  vf r = x - (n - 12582912.0f);
  vf p = broadcast(1.5353362e-4f);
  p = p * r + 1.3398875e-3f;
  p = p * r + 9.6184369e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return p * (vf)power;
}
constexpr float log2_e = 1.44269504088896341f, ln_2 = 0.693147180559945309f;

static inline bool any(vi x) {
  int64_t lane[RW_VECTOR_BYTES / 8], all = 0;
  memcpy(lane, &x, sizeof(lane));
  for (int64_t value : lane) all |= value;
  return all != 0;
}

// Exchanges the lanes and rows whose numbers differ in bit w: log2(VL) rounds of it transpose VL x VL floats.
template <int w, int... lane>
static inline void exchange(vf* row, std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) {
    if (i & w) continue;
    vf a = row[i], b = row[i + w];
    row[i] = __builtin_shufflevector(a, b, (lane & w ? VL + lane - w : lane)...);
    row[i + w] = __builtin_shufflevector(a, b, (lane & w ? VL + lane : lane + w)...);
  }
}
static inline void transpose_square(vf* row) {
  constexpr auto lanes = std::make_integer_sequence<int, VL>();
  if constexpr (VL == 16) exchange<8>(row, lanes);
  if constexpr (VL >= 8) exchange<4>(row, lanes);
  exchange<2>(row, lanes);
  exchange<1>(row, lanes);
}

// to[c * ldt + r] = from[r * ldf + c]
template <typename F>
static void transpose(float* to, int64_t ldt, const F* from, int64_t ldf, int64_t rows, int64_t columns) {
  int64_t whole_rows = rows / VL * VL, whole_columns = columns / VL * VL;
  for (int64_t r = 0; r < whole_rows; r += VL)
    for (int64_t c = 0; c < whole_columns; c += VL) {
      vf row[VL];
      for (int i = 0; i < VL; i++) row[i] = load(from + (r + i) * ldf + c);
      transpose_square(row);
      for (int i = 0; i < VL; i++) store(to + (c + i) * ldt + r, row[i]);
    }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; c++)
      to[c * ldt + r] = to_float(from[r * ldf + c]);
}

// Rows as f32; returns whether one of them holds an infinity or a NaN.
template <typename F>
static bool load_rows(float* to, int64_t ldt, const F* from, int64_t ldf, int64_t rows, int64_t columns) {
  vf odd = {};  // x - x is 0, or NaN where x is not finite
  float odd_tail = 0;
  for (int64_t r = 0; r < rows; r++) {
    int64_t c = 0;
    for (; c + VL <= columns; c += VL) {
      vf x = load(from + r * ldf + c);
      odd += x - x;
      store(to + r * ldt + c, x);
    }
    for (; c < columns; c++) {
      float x = to_float(from[r * ldf + c]);
      odd_tail += x - x;
      to[r * ldt + c] = x;
    }
  }
  return any(odd != odd) || odd_tail != odd_tail;
}

template <typename F>
static void store_row(F* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(to + i, load(from + i));
  for (; i < n; i++) store_one(to + i, from[i]);
}

template <typename F>
static float dot(const F* x, const F* y, int64_t n) {
  vf total = {};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) total += load(x + i) * load(y + i);
  float result = sum(total);
  for (; i < n; i++) result += to_float(x[i]) * to_float(y[i]);
  return result;
}

// The rotary embedding of a row of D = 2 half elements: pair (i, i + half) turns by the angle of cos[i], sin[i].
template <typename To, typename From>
static void rotate(To* to, const From* from, const float* cos, const float* sin, int64_t half, float factor) {
  int64_t i = 0;
  for (; i + VL <= half; i += VL) {
    vf x = load(from + i), y = load(from + half + i), c = load(cos + i), s = load(sin + i);
    store(to + i, (x * c - y * s) * factor);
    store(to + half + i, (y * c + x * s) * factor);
  }
  for (; i < half; i++) {
    float x = to_float(from[i]), y = to_float(from[half + i]);
    store_one(to + i, (x * cos[i] - y * sin[i]) * factor);
    store_one(to + half + i, (y * cos[i] + x * sin[i]) * factor);
  }
}

// Its transpose, for gradients; `to` may be `from`.
template <typename To>
static void unrotate(To* to, const float* from, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + VL <= half; i += VL) {
    vf x = load(from + i), y = load(from + half + i), c = load(cos + i), s = load(sin + i);
    store(to + i, x * c + y * s);
    store(to + half + i, y * c - x * s);
  }
  for (; i < half; i++) {
    float x = from[i], y = from[half + i];
    store_one(to + i, x * cos[i] + y * sin[i]);
    store_one(to + half + i, y * cos[i] - x * sin[i]);
  }
}

// kr[b][head][t] = R k[b][t][first + head] for as many heads as kr has: head by head, so that a tile of keys is
// contiguous.
template <typename F>
static void rotate_keys(Context& context, const Tensor& k, const Tensor& cos, const Tensor& sin, const Tensor& pos,
                        const Tensor& kr, int64_t first = 0) {
  int64_t T = k.dims[1], K = k.dims[2], D = k.dims[3], heads = kr.dims[2], blocks = round_up(T, 64) / 64;
  parallel(context, k.dims[0] * blocks, [&](int64_t task, int) {
    int64_t b = task / blocks, begin = task % blocks * 64, end = min_of(begin + 64, T);
    for (int64_t t = begin; t < end; t++) {
      int64_t angle = pos.as<int32_t>()[b * T + t] * (D / 2);
      for (int64_t head = 0; head < heads; head++)
        rotate(kr.as<F>() + ((b * heads + head) * T + t) * D, k.as<F>() + ((b * T + t) * K + first + head) * D,
               cos.as<float>() + angle, sin.as<float>() + angle, D / 2, 1.0f);
    }
  });
}

// Some tokens of one sequence, the query heads of one kv head, and the keys and values of that head.
template <typename F>
struct Attend {
  const F *q, *k, *v;
  F* o;
  float* lse;  // null where it is not wanted
  const float *cos, *sin;
  const int32_t *pos, *first, *last;  // token t sees keys first[t] .. last[t]; last null: keys first[t] .. t0 + t
  int64_t t0, tokens, group, head_dim;
  int64_t q_stride, k_stride, v_stride, lse_stride;  // from a token, key, value, and head to the next
  int64_t keys;
  float scale;
};

// Per strip: q^T and o^T (D, strip), maximum and sum; per task: keys, values, weights, rows, bounds of the tokens.
static inline size_t attend_scratch(int64_t D, int64_t group) {
  int64_t strips = query_tile(group) / strip;
  return sizeof(float) * (group * strips * (2 * D + 2) * strip + 2 * key_tile * D + key_tile * strip + strip * D +
                          strips * 2 * strip + VL);
}

constexpr float lowest = -3e38f;  // a maximum of nothing: finite, so that differences of two are not NaN

struct StripBounds {
  int64_t first_min, first_max, last_min, last_max;
};

// One tile of keys against one strip of queries: s = q k^T, the running maximum m and sum l of its columns (base 2),
// and o^T += v^T p^T. Rows [low, high) of the tile hold all that the strip sees; `bounds` is null where it sees all.
static inline void attend_tile(const float* k, const float* v, bool v_finite, int64_t n0, int64_t low, int64_t high,
                               const int32_t* bounds, const float* qt, float* ot, float* m, float* l, float* p,
                               int64_t D) {
  multiply<strip_vectors, false>(k + low * D, D, qt, strip, D, p + low * strip, strip, high - low, false);
  vf top[strip_vectors], total[strip_vectors];
  vi first[strip_vectors], last[strip_vectors], grown = {};
  for (int j = 0; j < strip_vectors; j++) top[j] = load(m + j * VL);
  if (bounds) {
    for (int j = 0; j < strip_vectors; j++) {
      memcpy(&first[j], bounds + j * VL, sizeof(vi));
      memcpy(&last[j], bounds + strip + j * VL, sizeof(vi));
    }
    for (int64_t n = low; n < high; n++)
      for (int j = 0; j < strip_vectors; j++) {
        vi seen = (first[j] <= static_cast<int32_t>(n0 + n)) & (last[j] >= static_cast<int32_t>(n0 + n));
        vf s = load(p + n * strip + j * VL);
        top[j] = (seen & (s > top[j])) ? s : top[j];
      }
  } else {
    for (int64_t n = low; n < high; n++)
      for (int j = 0; j < strip_vectors; j++) top[j] = max(load(p + n * strip + j * VL), top[j]);
  }
  for (int j = 0; j < strip_vectors; j++) {
    grown |= (vi)(top[j] != load(m + j * VL));
    total[j] = vf{};
  }
  if (any(grown)) {
    vf shrink[strip_vectors];
    for (int j = 0; j < strip_vectors; j++) {
      shrink[j] = exp2(load(m + j * VL) - top[j]);
      store(m + j * VL, top[j]);
      store(l + j * VL, load(l + j * VL) * shrink[j]);
    }
    for (int64_t d = 0; d < D; d++)
      for (int j = 0; j < strip_vectors; j++) store(ot + d * strip + j * VL, load(ot + d * strip + j * VL) * shrink[j]);
  }
  if (bounds) {
    for (int64_t n = low; n < high; n++)
      for (int j = 0; j < strip_vectors; j++) {
        vi seen = (first[j] <= static_cast<int32_t>(n0 + n)) & (last[j] >= static_cast<int32_t>(n0 + n));
        vf e = seen ? exp2(load(p + n * strip + j * VL) - top[j]) : vf{};
        total[j] += e;
        store(p + n * strip + j * VL, e);
      }
  } else {
    for (int64_t n = low; n < high; n++)
      for (int j = 0; j < strip_vectors; j++) {
        vf e = exp2(load(p + n * strip + j * VL) - top[j]);
        total[j] += e;
        store(p + n * strip + j * VL, e);
      }
  }
  for (int j = 0; j < strip_vectors; j++) store(l + j * VL, load(l + j * VL) + total[j]);
  if (bounds && !v_finite) {
    multiply_selected<true, false>(v + low * D, D, p + low * strip, strip, high - low, ot, strip, D, strip);
  } else {
    multiply<strip_vectors, true>(v + low * D, D, p + low * strip, strip, high - low, ot, strip, D, true);
  }
}

// What strip `s` of `width` queries sees; `bounds` gets the first and then the last key of each lane.
template <typename F>
static StripBounds bounds_of(const Attend<F>& a, int64_t s, int64_t width, int32_t* bounds) {
  StripBounds own = {INT64_MAX, 0, INT64_MAX, -1};
  for (int64_t i = 0; i < width; i++) {  // the lanes after the last token repeat it
    int64_t t = min_of(s * width + i, a.tokens - 1);
    int64_t first = a.first[t], last = a.last ? a.last[t] : a.t0 + t;
    bounds[i] = static_cast<int32_t>(first);
    bounds[width + i] = static_cast<int32_t>(last);
    own = {min_of(own.first_min, first), max_of(own.first_max, first), min_of(own.last_min, last),
           max_of(own.last_max, last)};
  }
  return own;
}

template <typename F>
static void attend(const Attend<F>& a, float* scratch) {
  int64_t D = a.head_dim, strips = round_up(a.tokens, strip) / strip, per_head = (2 * D + 2) * strip;
  float* k_tile = scratch;
  float* v_tile = k_tile + key_tile * D;
  float* p = v_tile + key_tile * D;
  float* rows = p + key_tile * strip;
  float* heads = rows + strip * D;
  int32_t* bounds = reinterpret_cast<int32_t*>(heads + a.group * strips * per_head);

  // rows that lie far apart share the sets of the L1 cache and are better copied
  bool direct = sizeof(F) == sizeof(float) && a.k_stride == D;

  StripBounds range[max_strips], all = {INT64_MAX, 0, INT64_MAX, -1};
  for (int64_t s = 0; s < strips; s++) {
    const StripBounds& own = range[s] = bounds_of(a, s, strip, bounds + 2 * s * strip);
    all.first_min = min_of(all.first_min, own.first_min);
    all.last_max = max_of(all.last_max, own.last_max);
    int64_t live = min_of(strip, a.tokens - s * strip);
    for (int64_t g = 0; g < a.group; g++) {
      float* qt = heads + (g * strips + s) * per_head;
      for (int64_t i = 0; i < live; i++) {
        int64_t t = s * strip + i, angle = a.pos[t] * (D / 2);
        rotate(rows + i * D, a.q + t * a.q_stride + g * D, a.cos + angle, a.sin + angle, D / 2, a.scale * log2_e);
      }
      memset(rows + live * D, 0, sizeof(float) * (strip - live) * D);
      transpose(qt, strip, rows, D, strip, D);
      memset(qt + D * strip, 0, sizeof(float) * (D + 2) * strip);
      for (int64_t i = 0; i < strip; i++) qt[2 * D * strip + i] = lowest;
    }
  }

  for (int64_t n0 = all.first_min / key_tile * key_tile; n0 <= all.last_max; n0 += key_tile) {
    int64_t n1 = min_of(n0 + key_tile, a.keys);
    const float* k = k_tile;
    bool v_finite = true, loaded = false;
    for (int64_t s = 0; s < strips; s++) {
      const StripBounds& own = range[s];
      if (own.first_min >= n1 || own.last_max < n0) continue;
      if (!loaded) {
        if (!direct) load_rows(k_tile, D, a.k + n0 * a.k_stride, a.k_stride, n1 - n0, D);
        if constexpr (sizeof(F) == sizeof(float)) k = direct ? a.k + n0 * D : k_tile;
        v_finite = !load_rows(v_tile, D, a.v + n0 * a.v_stride, a.v_stride, n1 - n0, D);
        loaded = true;
      }
      int64_t low = max_of(own.first_min - n0, 0) / tile_rows * tile_rows;
      int64_t high = min_of(round_up(own.last_max + 1 - n0, tile_rows), n1 - n0);
      bool sees_all = own.first_max <= n0 + low && own.last_min >= n0 + high - 1;
      for (int64_t g = 0; g < a.group; g++) {
        float* qt = heads + (g * strips + s) * per_head;
        float *ot = qt + D * strip, *m = ot + D * strip, *l = m + strip;
        attend_tile(k, v_tile, v_finite, n0, low, high, sees_all ? nullptr : bounds + 2 * s * strip, qt, ot, m, l, p,
                    D);
      }
    }
  }

  for (int64_t s = 0; s < strips; s++)
    for (int64_t g = 0; g < a.group; g++) {
      float* ot = heads + (g * strips + s) * per_head + D * strip;
      float *m = ot + D * strip, *l = m + strip;
      for (int64_t j = 0; j < strip; j += VL) {
        vf total = load(l + j);
        total = total == 0.0f ? broadcast(1.0f) : total;
        for (int64_t d = 0; d < D; d++) store(ot + d * strip + j, load(ot + d * strip + j) / total);
      }
      transpose(rows, D, ot, strip, D, strip);
      for (int64_t i = 0; i < strip && s * strip + i < a.tokens; i++) {
        int64_t t = s * strip + i;
        store_row(a.o + t * a.q_stride + g * D, rows + i * D, D);
        if (a.lse) a.lse[g * a.lse_stride + t] = m[i] * ln_2 + __builtin_logf(l[i]);
      }
    }
}

}  // namespace rw::cpu::RW_ISA
