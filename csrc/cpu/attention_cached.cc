// kv_append:         k_cache[slot[t]] = R k[t], v_cache[slot[t]] = v[t]
// attention_cached:  o[t] = softmax(scale R q[t] k_cache^T) v_cache over the slots first[t] .. last[t]
//
// Shapes: k, v (B,T,K,D); q, o (B,T,H,D); k_cache, v_cache (B,K,S,D), keys rotated; f32 or bf16, computed in f32.
//
// Many tokens (prefill) take the tiled path of attention_fwd, the cache in the place of rotated keys. Few tokens (a
// step of generation) are bound by reading the cache: every row of it is read once for all tokens and query heads of a
// kv head, D in the lanes, products of VL slots reduced together by a transpose in registers. The rows of a kv head
// follow one another, so that a task reads memory in one go, f32 in place.
//
// Chunks of a step: (b, kv head, 1024 slots), or 512 where there are few kv heads; enough for 16 threads from 2048
// slots and 8 kv heads on. A task is up to four neighbours, where that leaves each thread some. Each chunk leaves
// maximum, sum and unnormalized output for every row; a second pass combines them in the order of the chunks. The
// chunks depend on shapes only, so the number of threads changes no bit. Traffic: the visible part of the cache, q and
// o once, and H (D + 2) floats a chunk and token.
//
// Papers: FlashAttention 2205.14135 (the combination of partial softmaxes), RoFormer 2104.09864 (rotation).
#include "attention_tiles.h"

namespace rw::cpu::RW_ISA {

constexpr int64_t most_slots = 1024;  // of a chunk
constexpr int64_t step_tokens = 8;    // up to so many tokens, rows one by one beat strips that are mostly empty lanes
constexpr float lowest_score = -3e38f;

template <typename F>
static void append(Context& context, const kv_append_args& a) {
  int64_t T = a.k.dims[1], K = a.k.dims[2], D = a.k.dims[3], S = a.k_cache.dims[2];
  parallel(context, a.k.dims[0] * T, [&](int64_t task, int) {
    int64_t angle = a.pos.as<int32_t>()[task] * (D / 2);
    for (int64_t head = 0; head < K; head++) {
      int64_t row = (task * K + head) * D, to = ((task / T * K + head) * S + a.slot.as<int32_t>()[task]) * D;
      rotate(a.k_cache.as<F>() + to, a.k.as<F>() + row, a.cos.as<float>() + angle, a.sin.as<float>() + angle, D / 2,
             1.0f);
      memcpy(a.v_cache.as<F>() + to, a.v.as<F>() + row, sizeof(F) * D);
    }
  });
}

void kv_append(Context& context, const kv_append_args& a) {
  if (a.k.dtype == DType::bf16) {
    append<bf16>(context, a);
  } else {
    append<float>(context, a);
  }
}

// A walk over rows that also asks for those that are read later, one line with each load: where a task begins, and at
// the end of a page, the hardware foresees none. A burst of requests fills what an L1 can wait for at once; spread out,
// and into the L2, they leave the hardware's own prefetching room. Null: asks for nothing.
template <typename F>
static inline void ask(const F* later, int64_t element) {
  if (later) __builtin_prefetch(later + element, 0, 2);
}

// The products of q with VL rows of k, in the lanes.
template <typename F>
static inline vf scores(const float* q, const float* k, int64_t D, const F* later) {
  vf product[VL];
  for (int i = 0; i < VL; i++) product[i] = vf{};
  int64_t d = 0;
  for (; d + VL <= D; d += VL) {
    vf x = load(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) {
      product[i] += x * load(k + i * D + d);
      ask(later, i * D + d);
    }
  }
  transpose_square(product);
  vf total = product[0];
  for (int i = 1; i < VL; i++) total += product[i];
  for (; d < D; d++) {
    vf y;
    for (int i = 0; i < VL; i++) y[i] = k[i * D + d];
    total += broadcast(q[d]) * y;
  }
  return total;
}

// Rows of D floats from a cache, in place where they are f32 and all of them are there.
template <typename F>
static inline const float* rows_of(const F* from, int64_t rows, bool whole, int64_t D, float* tile) {
  if constexpr (sizeof(F) == sizeof(float)) {
    if (whole) return from;
  }
  load_rows(tile, D, from, D, rows, D);
  return tile;
}

// sum[0 .. D) += p[i] v[i] over `count` rows
template <int count, typename F>
static inline void accumulate(float* sum, const float* p, const float* v, int64_t D, const F* later) {
  int64_t d = 0;
  for (; d + VL <= D; d += VL) {
    vf x = load(sum + d);
    for (int i = 0; i < count; i++) {
      x += broadcast(p[i]) * load(v + i * D + d);
      ask(later, i * D + d);
    }
    store(sum + d, x);
  }
  for (; d < D; d++)
    for (int i = 0; i < count; i++) sum[d] += p[i] * v[i * D + d];
}

// Slots [begin, end) of one kv head for all rows (token, head of the group). partial[row]: maximum, sum, output (D).
template <typename F>
static void step_chunk(const attention_cached_args& a, int64_t b, int64_t head, int64_t begin, int64_t end,
                       float* partial, int64_t partial_stride, float* scratch) {
  int64_t T = a.q.dims[1], H = a.q.dims[2], D = a.q.dims[3], S = a.k_cache.dims[2], K = a.k_cache.dims[1], G = H / K;
  const int32_t *first = a.first.as<int32_t>() + b * T, *last = a.last.as<int32_t>() + b * T;
  int64_t low = end, high = begin;
  for (int64_t t = 0; t < T; t++) {
    if (last[t] < begin || first[t] >= end || last[t] < first[t]) continue;
    low = min_of(low, max_of(first[t], begin));
    high = max_of(high, min_of(last[t] + 1, end));
  }
  float *tile = scratch, *q = tile + VL * D, *weights = q + round_up(T * G * D, VL);
  for (int64_t t = 0; t < T; t++) {
    int64_t angle = a.pos.as<int32_t>()[b * T + t] * (D / 2);
    for (int64_t g = 0; g < G; g++)
      rotate(q + (t * G + g) * D, a.q.as<F>() + ((b * T + t) * H + head * G + g) * D, a.cos.as<float>() + angle,
             a.sin.as<float>() + angle, D / 2, a.scale * log2_e);
  }
  const F *k = a.k_cache.as<F>() + (b * K + head) * S * D, *v = a.v_cache.as<F>() + (b * K + head) * S * D;
  for (int64_t n = low; n < high; n += VL) {
    // what follows k[high) is v[low)
    const int64_t next = n + 4 * VL;
    const F* later = next < high ? k + next * D : v + (next - high + low) * D;
    const float* keys = rows_of(k + n * D, min_of(VL, high - n), n + VL <= S, D, tile);
    for (int64_t row = 0; row < T * G; row++)
      store(weights + row * most_slots + n - low, scores(q + row * D, keys, D, row ? nullptr : later));
  }

  vi lane;
  for (int i = 0; i < VL; i++) lane[i] = i;
  for (int64_t row = 0; row < T * G; row++) {
    int32_t from = first[row / G], to = static_cast<int32_t>(min_of(last[row / G], high - 1));
    float *p = weights + row * most_slots, *result = partial + row * partial_stride;
    vf top = broadcast(lowest_score), total = {};
    for (int64_t n = low; n < high; n += VL) {
      vi slot = lane + static_cast<int32_t>(n), seen = (slot >= from) & (slot <= to);
      vf s = load(p + n - low);
      top = (seen & (s > top)) ? s : top;
    }
    float maximum = lowest_score;
    for (int i = 0; i < VL; i++) maximum = top[i] > maximum ? top[i] : maximum;
    for (int64_t n = low; n < high; n += VL) {
      vi slot = lane + static_cast<int32_t>(n), seen = (slot >= from) & (slot <= to);
      vf weight = seen ? exp2(load(p + n - low) - maximum) : vf{};
      total += weight;
      store(p + n - low, weight);
    }
    result[0] = maximum;
    result[1] = sum(total);
    memset(result + 2, 0, sizeof(float) * D);
  }
  constexpr int64_t together = VL < 8 ? VL : 8;
  for (int64_t n = low; n < high; n += together) {
    // and what follows v[high) the next slots' k, which this thread may get
    const int64_t next = n + 8 * together;
    const F* later = (next < high ? v : k) + next * D;
    const float* values = rows_of(v + n * D, min_of(together, high - n), true, D, tile);
    for (int64_t row = 0; row < T * G; row++) {
      int64_t from = max_of(n, first[row / G]), to = min_of(min_of(n + together, high), last[row / G] + 1);
      const float* p = weights + row * most_slots - low;
      float* result = partial + row * partial_stride + 2;
      if (to - from == together) {
        accumulate<together>(result, p + n, values, D, row ? nullptr : later);
      } else {
        for (int64_t i = from; i < to; i++) accumulate<1, F>(result, p + i, values + (i - n) * D, D, nullptr);
      }
    }
  }
}

template <typename F>
static void step(Context& context, const attention_cached_args& a) {
  int64_t B = a.q.dims[0], T = a.q.dims[1], H = a.q.dims[2], D = a.q.dims[3];
  int64_t S = a.k_cache.dims[2], K = a.k_cache.dims[1], G = H / K;
  int64_t slots = B * K < 8 ? most_slots / 2 : most_slots, chunks = round_up(S, slots) / slots;
  int64_t width = D + 2, rows = B * K * T * G;
  size_t own = sizeof(float) * (VL * D + round_up(T * G * D, VL) + T * G * most_slots);
  // partial[b, kv head, token, head of the group][chunk]
  char* shared = static_cast<char*>(context.scratch(0, own + sizeof(float) * rows * chunks * width));
  float* partial = reinterpret_cast<float*>(shared + own);
  // Neighbours go to one thread, as many as leave it some turns: what it has asked for at the end of one is its own.
  // The last ones go one by one, so that all threads end together.
  const int64_t all = B * K * chunks, run = max_of(1, min_of(4, all / (8 * context.threads())));
  const int64_t runs = max_of(0, all / run - 2 * context.threads());
  parallel(context, runs + all - runs * run, [&](int64_t task, int thread) {
    void* scratch = thread ? context.scratch(thread, own) : shared;
    const int64_t at = task < runs ? task * run : task + runs * (run - 1);
    for (int64_t i = at; i < at + (task < runs ? run : 1); i++) {
      const int64_t head = i / chunks, chunk = i % chunks, begin = chunk * slots;
      step_chunk<F>(a, head / K, head % K, begin, min_of(begin + slots, S),
                    partial + (head * T * G * chunks + chunk) * width, chunks * width, static_cast<float*>(scratch));
    }
  });
  parallel(context, B * K, [&](int64_t task, int) {
    for (int64_t row = 0; row < T * G; row++) {
      float* part = partial + (task * T * G + row) * chunks * width;
      float maximum = lowest_score, total = 0;
      for (int64_t c = 0; c < chunks; c++) maximum = part[c * width] > maximum ? part[c * width] : maximum;
      for (int64_t c = 0; c < chunks; c++) {
        float* x = part + c * width;
        float weight = exp2(broadcast(x[0] - maximum))[0];
        total += x[1] * weight;
        for (int64_t d = 2; d < width; d++) part[d] = c ? part[d] + x[d] * weight : x[d] * weight;
      }
      for (int64_t d = 2; d < width; d++) part[d] = total == 0 ? 0 : part[d] / total;
      int64_t b = task / K, head = task % K * G + row % G, t = row / G;
      store_row(a.o.as<F>() + ((b * T + t) * H + head) * D, part + 2, D);
    }
  });
}

template <typename F>
static void prefill(Context& context, const attention_cached_args& a) {
  int64_t B = a.q.dims[0], T = a.q.dims[1], H = a.q.dims[2], D = a.q.dims[3];
  int64_t S = a.k_cache.dims[2], K = a.k_cache.dims[1], G = H / K, size = query_tile(context, B, T, K, G);
  int64_t tiles = round_up(T, size) / size;
  parallel(context, B * K * tiles, [&](int64_t task, int thread) {
    int64_t b = task / (K * tiles), head = task / tiles % K, t0 = (tiles - 1 - task % tiles) * size;
    Attend<F> part = {};
    part.q = a.q.as<F>() + ((b * T + t0) * H + head * G) * D;
    part.k = a.k_cache.as<F>() + (b * K + head) * S * D;
    part.v = a.v_cache.as<F>() + (b * K + head) * S * D;
    part.o = a.o.as<F>() + ((b * T + t0) * H + head * G) * D;
    part.cos = a.cos.as<float>();
    part.sin = a.sin.as<float>();
    part.pos = a.pos.as<int32_t>() + b * T + t0;
    part.first = a.first.as<int32_t>() + b * T + t0;
    part.last = a.last.as<int32_t>() + b * T + t0;
    part.tokens = min_of(size, T - t0);
    part.group = G;
    part.head_dim = D;
    part.q_stride = H * D;
    part.k_stride = part.v_stride = D;
    part.keys = S;
    part.scale = a.scale;
    attend(context, thread, part);
  });
}

void attention_cached(Context& context, const attention_cached_args& a) {
  bool half = a.q.dtype == DType::bf16;
  if (a.q.dims[1] <= step_tokens) {
    if (half) {
      step<bf16>(context, a);
    } else {
      step<float>(context, a);
    }
  } else if (half) {
    prefill<bf16>(context, a);
  } else {
    prefill<float>(context, a);
  }
}

}  // namespace rw::cpu::RW_ISA
