// Gradients of attention_fwd. With s = scale R q (R k)^T, p = exp(s - lse), dp = dout v^T, delta = sum_d dout o and ds
// = scale p (dp - delta):  dv = p^T dout,  dq = R^T (ds R k),  dk = R^T (ds^T R q).
//
// Shapes: q, o, dout, dq (B,T,H,D); k, v, dk, dv (B,T,K,D); lse, delta (B,H,T). qr (B,T,H/groups,D) and kr
// (B,K/groups,T,D) serve one group of heads after the other, of which each is as below. F f32 or bf16, computed in f32.
//
// A first pass writes R q and R k. Then one pass with the 5 products of the formulae: a pass for dk, dv and
// another for dq would repeat s and dp, 7 products, at best 71 % of the speed; the one pass runs at 70 - 77 % of the
// machine's multiply-add rate, so two cannot be as fast. The price is that dq and dk, dv are sums over tasks. To make
// their order fixed, T is cut into chunks; phase i holds the pairs (query chunk c + i, key chunk c), which write
// disjoint rows and run in parallel, and phases follow one another: every sum is in the order of the phases, within a
// task in the order of keys or of head and query, whatever the number of threads. The chunks depend on shapes only: 384
// tokens or more, so many that B K chunks = 64 where T allows (16 threads have work at B = 1, K = 8, T = 2048).
//
// Never stored: s, p, dp, ds beyond a block of 64 queries by 192 keys. Sums are f32 rows of the rotated gradients: in
// dq, dk, dv themselves, or for bf16 in scratch memory for as many kv heads at a time as fit 64 MB (at least one); the
// last task of a row turns it back and rounds it. Traffic: a block of keys reads q, dout and adds to dq once a query
// head; with D = 64 its 5 tiles of 48 KB stay in the L2 cache.
//
// Keys lie in the lanes (s, dp: k^T, v^T once a task; dv^T, dk^T += dout^T p, q^T ds: rows of q and dout as
// broadcasts), but for dq += ds k, where D does. A strip of 3 vectors of keys by 64 queries keeps p and ds in the L1
// cache. Entries masked within a strip are selected, never multiplied by zero (multiply_selected).
//
// With AMX blocks are larger (attention_bwd_tiles.h); the chunks are the same.
//
// Papers: FlashAttention-2 2307.08691, RoFormer 2104.09864; for fixed orders without atomics DASH 2601.21824.
#include "attention_bwd_tiles.h"

namespace rw::cpu::RW_ISA {

constexpr int64_t key_block = 192;  // 4, 8 or 16 strips
constexpr int64_t query_rows = 64;

namespace {

// Gradients of a kv head that are still to be completed: sums in f32 of rotated rows.
struct Sums {
  float *dq, *dk, *dv;
  int64_t q_stride, k_stride;  // from a token to the next
};

// The working set of a task. Transposed keys, values and their gradients have the keys in the lanes.
struct Tiles {
  float *kt, *vt, *dkt, *dvt;   // (D, key_block)
  float *k, *q, *dout, *dq;     // (key_block, Dp), (query_rows, D) twice, (query_rows, Dp)
  float *p, *ds, *lse, *delta;  // (query_rows, key_block) twice, (query_rows) twice
  int32_t* first;               // (query_rows)
};

}  // namespace

static size_t tiles_size(int64_t D) {
  int64_t Dp = round_up(D, VL);
  return 4 * D * key_block + key_block * Dp + query_rows * (2 * D + Dp + 2 * key_block + 3);
}

// Bytes of scratch of a task.
template <typename F>
static size_t task_size([[maybe_unused]] Context& context, const attention_bwd_args& a) {
#ifdef RW_HAS_TILES
  if (context.has_tiles()) return BackwardTiles<F>::scratch(a);
#endif
  return sizeof(float) * tiles_size(a.q.dims[3]);
}

static Tiles split_tiles(float* scratch, int64_t D) {
  int64_t Dp = round_up(D, VL);
  auto take = [&](int64_t n) { return (scratch += n) - n; };
  Tiles tile;
  tile.kt = take(D * key_block);
  tile.vt = take(D * key_block);
  tile.dkt = take(D * key_block);
  tile.dvt = take(D * key_block);
  tile.k = take(key_block * Dp);
  tile.dq = take(query_rows * Dp);
  tile.q = take(query_rows * D);
  tile.dout = take(query_rows * D);
  tile.p = take(query_rows * key_block);
  tile.ds = take(query_rows * key_block);
  tile.lse = take(query_rows);
  tile.delta = take(query_rows);
  tile.first = reinterpret_cast<int32_t*>(take(query_rows));
  return tile;
}

// p = 2^(s scale log2 e - lse) and ds = scale p (dp - delta) of `rows` queries from token t0 on against a strip of keys
// from n0 on; s and dp come in the buffers of p and ds.
template <bool masked>
static void softmax_backward(const Tiles& tile, int64_t column, int64_t begin, int64_t end, int64_t t0, int64_t n0,
                             float scale) {
  vi key[strip_vectors];
  if (masked)
    for (int j = 0; j < strip_vectors; j++)
      for (int i = 0; i < VL; i++) key[j][i] = static_cast<int32_t>(n0 + j * VL + i);
  vf factor = broadcast(scale * log2_e);
  for (int64_t r = begin; r < end; r++) {
    float *p = tile.p + r * key_block + column, *ds = tile.ds + r * key_block + column;
    vf lse = broadcast(tile.lse[r]), delta = broadcast(tile.delta[r]);
    int32_t first = tile.first[r], last = static_cast<int32_t>(t0 + r);
    for (int j = 0; j < strip_vectors; j++) {
      vf weight = exp2(load(p + j * VL) * factor - lse);
      vf slope = weight * (load(ds + j * VL) - delta) * scale;
      if (masked) {
        vi seen = (key[j] >= first) & (key[j] <= last);
        weight = seen ? weight : vf{};
        slope = seen ? slope : vf{};
      }
      store(p + j * VL, weight);
      store(ds + j * VL, slope);
    }
  }
}

// dq[rows][D] += ds[rows][depth] k[depth][D]
static void multiply_dq(const Tiles& tile, int64_t column, int64_t depth, int64_t begin, int64_t end, int64_t Dp,
                        bool selected) {
  const float *ds = tile.ds + begin * key_block + column, *k = tile.k + column * Dp;
  float* dq = tile.dq + begin * Dp;
  if (selected) return multiply_selected<false, true>(ds, key_block, k, Dp, depth, dq, Dp, end - begin, Dp);
  for (int64_t d = 0; d < Dp;) {
    int64_t left = (Dp - d) / VL;
    if (left == 1) {
      multiply<1, false>(ds, key_block, k + d, Dp, depth, dq + d, Dp, end - begin, true);
      d += VL;
    } else if (left == 2 || left == 4) {
      multiply<2, false>(ds, key_block, k + d, Dp, depth, dq + d, Dp, end - begin, true);
      d += 2 * VL;
    } else {
      multiply<3, false>(ds, key_block, k + d, Dp, depth, dq + d, Dp, end - begin, true);
      d += 3 * VL;
    }
  }
}

// to[r][0 .. D) += from[r][0 .. D)
static void add_rows(float* to, int64_t ldt, const float* from, int64_t ldf, int64_t rows, int64_t D) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t d = 0; d < D; d++) to[r * ldt + d] += from[r * ldf + d];
}

// A block of rows of one query head against a block of keys: adds to dk^T, dv^T and to the rows of dq.
template <typename F>
static void block_backward(const attention_bwd_args& a, const Tiles& tile, int64_t b, int64_t h, int64_t n0,
                           int64_t keys, bool k_finite, int64_t t0, int64_t rows, float* dq_sum, int64_t dq_stride) {
  int64_t T = a.q.dims[1], H = a.q.dims[2], D = a.q.dims[3], Dp = round_up(D, VL);
  const int32_t* first = a.first.as<int32_t>() + b * T + t0;
  int64_t begin = -1, end = 0;
  for (int64_t r = max_of(n0 - t0, 0); r < rows; r++)
    if (first[r] < n0 + keys) {
      if (begin < 0) begin = r;
      end = r + 1;
    }
  if (begin < 0) return;
  int64_t row0 = (b * T + t0) * H + h, rotated = a.qr.dims[2];
  const F* qr = a.qr.as<F>() + ((b * T + t0) * rotated + h % rotated) * D;
  bool q_finite = !load_rows(tile.q, D, qr, rotated * D, rows, D);
  bool dout_finite = !load_rows(tile.dout, D, a.dout.as<F>() + row0 * D, H * D, rows, D);
  int64_t first_max = 0;
  for (int64_t r = 0; r < rows; r++) {
    tile.lse[r] = a.lse.as<float>()[(b * H + h) * T + t0 + r] * log2_e;
    tile.delta[r] = a.delta.as<float>()[(b * H + h) * T + t0 + r];
    tile.first[r] = first[r];
    first_max = max_of(first_max, first[r]);
  }
  memset(tile.dq, 0, sizeof(float) * rows * Dp);
  for (int64_t c = 0; c < keys; c += strip) {
    int64_t lane0 = n0 + c, depth = min_of(strip, keys - c);
    int64_t low = max_of(begin, lane0 - t0) / tile_rows * tile_rows, high = end;
    if (low >= high) break;
    const float *q = tile.q + low * D, *dout = tile.dout + low * D;
    float *p = tile.p + low * key_block + c, *ds = tile.ds + low * key_block + c;
    multiply<strip_vectors, false>(q, D, tile.kt + c, key_block, D, p, key_block, high - low, false);
    multiply<strip_vectors, false>(dout, D, tile.vt + c, key_block, D, ds, key_block, high - low, false);
    bool masked = t0 + low < lane0 + strip - 1 || first_max > lane0;
    if (masked) {
      softmax_backward<true>(tile, c, low, high, t0, lane0, a.scale);
    } else {
      softmax_backward<false>(tile, c, low, high, t0, lane0, a.scale);
    }
    if (masked && !dout_finite) {
      multiply_selected<true, false>(dout, D, p, key_block, high - low, tile.dvt + c, key_block, D, strip);
    } else {
      multiply<strip_vectors, true>(dout, D, p, key_block, high - low, tile.dvt + c, key_block, D, true);
    }
    if (masked && !q_finite) {
      multiply_selected<true, false>(q, D, ds, key_block, high - low, tile.dkt + c, key_block, D, strip);
    } else {
      multiply<strip_vectors, true>(q, D, ds, key_block, high - low, tile.dkt + c, key_block, D, true);
    }
    multiply_dq(tile, c, depth, low, high, Dp, masked && !k_finite);
  }
  add_rows(dq_sum, dq_stride, tile.dq, Dp, rows, D);
}

// The queries of chunk `q_chunk` against the keys of chunk `k_chunk` for one kv head and its query heads.
template <typename F>
static void chunk_backward([[maybe_unused]] Context& context, const attention_bwd_args& a, float* scratch,
                           const Sums& sums, int64_t b, int64_t head, int64_t chunk, int64_t q_chunk, int64_t k_chunk) {
  int64_t T = a.q.dims[1], H = a.q.dims[2], D = a.q.dims[3], K = a.k.dims[2], G = H / K, Dp = round_up(D, VL);
  int64_t q_begin = q_chunk * chunk, q_end = min_of(q_begin + chunk, T);
  int64_t k_begin = k_chunk * chunk, k_end = min_of(k_begin + chunk, T);
  int64_t rotated = a.kr.dims[2];
  const F *kr = a.kr.as<F>() + (b * rotated + head % rotated) * T * D, *v = a.v.as<F>() + (b * T * K + head) * D;
  if (q_chunk == k_chunk)
    for (int64_t t = q_begin; t < q_end; t++) memset(sums.dq + t * sums.q_stride, 0, sizeof(float) * G * D);
#ifdef RW_HAS_TILES
  if (context.has_tiles())
    return BackwardTiles<F>{a}.run(scratch, sums, b, head, q_begin, q_end, k_begin, k_end, q_chunk == k_chunk);
#endif
  const Tiles tile = split_tiles(scratch, D);
  for (int64_t n0 = k_begin; n0 < k_end; n0 += key_block) {
    int64_t keys = min_of(key_block, k_end - n0);
    transpose(tile.kt, key_block, kr + n0 * D, D, keys, D);
    transpose(tile.vt, key_block, v + n0 * K * D, K * D, keys, D);
    bool k_finite = !load_rows(tile.k, Dp, kr + n0 * D, D, keys, D);
    for (int64_t n = 0; n < keys; n++)
      for (int64_t d = D; d < Dp; d++) tile.k[n * Dp + d] = 0;
    if (q_chunk == k_chunk) {
      memset(tile.dkt, 0, sizeof(float) * D * key_block);
      memset(tile.dvt, 0, sizeof(float) * D * key_block);
    } else {
      transpose(tile.dkt, key_block, sums.dk + n0 * sums.k_stride, sums.k_stride, keys, D);
      transpose(tile.dvt, key_block, sums.dv + n0 * sums.k_stride, sums.k_stride, keys, D);
    }
    for (int64_t g = 0; g < G; g++)
      for (int64_t t0 = q_begin; t0 < q_end; t0 += query_rows) {
        int64_t rows = min_of(query_rows, q_end - t0);
        if (t0 + rows <= n0) continue;
        block_backward<F>(a, tile, b, head * G + g, n0, keys, k_finite, t0, rows, sums.dq + t0 * sums.q_stride + g * D,
                          sums.q_stride);
      }
    transpose(sums.dk + n0 * sums.k_stride, sums.k_stride, tile.dkt, key_block, D, keys);
    transpose(sums.dv + n0 * sums.k_stride, sums.k_stride, tile.dvt, key_block, D, keys);
  }
}

// out[t] = R^T sum[t] for the heads of a row of tokens, the sums being complete; in place where they are the output.
template <typename F>
static void unrotate_rows(const attention_bwd_args& a, F* out, int64_t out_stride, const float* sum, int64_t stride,
                          int64_t b, int64_t begin, int64_t end, int64_t heads) {
  int64_t T = a.q.dims[1], half = a.q.dims[3] / 2;
  for (int64_t t = begin; t < end; t++) {
    int64_t angle = a.pos.as<int32_t>()[b * T + t] * half;
    for (int64_t h = 0; h < heads; h++)
      unrotate(out + t * out_stride + 2 * h * half, sum + t * stride + 2 * h * half, a.cos.as<float>() + angle,
               a.sin.as<float>() + angle, half);
  }
}

// The kv heads from `first` on that qr and kr have room for, and their query heads.
template <typename F>
static void backward(Context& context, const attention_bwd_args& a, int64_t first) {
  constexpr bool in_place = sizeof(F) == sizeof(float);
  int64_t B = a.q.dims[0], T = a.q.dims[1], H = a.q.dims[2], D = a.q.dims[3], K = a.k.dims[2], G = H / K;
  int64_t kv_heads = a.kr.dims[2], q_heads = a.qr.dims[2];
  rotate_keys<F>(context, a.k, a.cos, a.sin, a.pos, a.kr, first);
  int64_t blocks = round_up(T, 64) / 64;
  parallel(context, B * blocks, [&](int64_t task, int) {
    int64_t b = task / blocks, begin = task % blocks * 64, end = min_of(begin + 64, T);
    for (int64_t t = begin; t < end; t++) {
      int64_t angle = a.pos.as<int32_t>()[b * T + t] * (D / 2);
      for (int64_t head = 0; head < q_heads; head++) {
        int64_t row = ((b * T + t) * H + first * G + head) * D;
        rotate(a.qr.as<F>() + ((b * T + t) * q_heads + head) * D, a.q.as<F>() + row, a.cos.as<float>() + angle,
               a.sin.as<float>() + angle, D / 2, 1.0f);
      }
    }
  });

  // chunks depend on shapes only, and with them the order of every sum
  int64_t wanted = max_of(1, 64 / (B * K));
  int64_t chunk = max_of(2 * key_block, round_up((T + wanted - 1) / wanted, key_block));
  int64_t chunks = round_up(T, chunk) / chunk;
  size_t tiles_bytes = task_size<F>(context, a), sum_size = T * (G + 2) * D;
  int64_t all = B * kv_heads;
  int64_t wave = in_place ? all : min_of(all, max_of(1, (int64_t{64} << 20) / static_cast<int64_t>(4 * sum_size)));
  char* shared = static_cast<char*>(context.scratch(0, tiles_bytes + (in_place ? 0 : wave * sum_size * sizeof(float))));
  for (int64_t begin = 0; begin < all; begin += wave) {
    int64_t heads = min_of(wave, all - begin);
    for (int64_t phase = 0; phase < chunks; phase++)
      parallel(context, heads * (chunks - phase), [&](int64_t task, int thread) {
        int64_t slot = task % heads, b = (begin + slot) / kv_heads, head = first + (begin + slot) % kv_heads;
        int64_t k_chunk = task / heads, q_chunk = k_chunk + phase;
        F* dq = a.dq.as<F>() + (b * T * H + head * G) * D;
        F* dk = a.dk.as<F>() + (b * T * K + head) * D;
        F* dv = a.dv.as<F>() + (b * T * K + head) * D;
        Sums sums;
        if constexpr (in_place) {
          sums = {dq, dk, dv, H * D, K * D};
        } else {
          float* own = reinterpret_cast<float*>(shared + tiles_bytes) + slot * sum_size;
          sums = {own, own + T * G * D, own + T * (G + 1) * D, G * D, D};
        }
        void* scratch = thread ? context.scratch(thread, tiles_bytes) : shared;
        chunk_backward<F>(context, a, static_cast<float*>(scratch), sums, b, head, chunk, q_chunk, k_chunk);
        if (k_chunk == 0)
          unrotate_rows(a, dq, H * D, sums.dq, sums.q_stride, b, q_chunk * chunk, min_of((q_chunk + 1) * chunk, T), G);
        if (q_chunk == chunks - 1) {
          int64_t start = k_chunk * chunk, end = min_of(start + chunk, T);
          unrotate_rows(a, dk, K * D, sums.dk, sums.k_stride, b, start, end, 1);
          if constexpr (!in_place)
            for (int64_t n = start; n < end; n++) store_row(dv + n * K * D, sums.dv + n * D, D);
        }
      });
  }
}

template <typename F>
static void delta_of(Context& context, const attention_delta_args& a) {
  int64_t B = a.o.dims[0], T = a.o.dims[1], H = a.o.dims[2], D = a.o.dims[3];
  int64_t blocks = round_up(T, 64) / 64;
  parallel(context, B * blocks, [&](int64_t task, int) {
    int64_t b = task / blocks, begin = task % blocks * 64, end = min_of(begin + 64, T);
    for (int64_t t = begin; t < end; t++)
      for (int64_t h = 0; h < H; h++) {
        int64_t row = ((b * T + t) * H + h) * D;
        a.delta.as<float>()[(b * H + h) * T + t] = dot(a.dout.as<F>() + row, a.o.as<F>() + row, D);
      }
  });
}

void attention_delta(Context& context, const attention_delta_args& a) {
  if (a.o.dtype == DType::bf16) return delta_of<bf16>(context, a);
  delta_of<float>(context, a);
}

void attention_bwd(Context& context, const attention_bwd_args& a) {
  for (int64_t first = 0; first < a.k.dims[2]; first += a.kr.dims[2]) {
    if (a.q.dtype == DType::bf16) {
      backward<bf16>(context, a, first);
    } else {
      backward<float>(context, a, first);
    }
  }
}

}  // namespace rw::cpu::RW_ISA
