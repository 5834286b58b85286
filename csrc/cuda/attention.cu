// o = softmax(scale R q (R k)^T) v over the keys first[t] .. t; lse = log of its denominator, maximum included.
//
// Shapes: q, o (B,T,H,D); k, v, kr (B,T,K,D), D even, up to 256; cos, sin (P,D/2); lse (B,H,T). q, k, v, o, kr f32 or
// bf16. Sums, softmax and lse are f32; in bf16 also R k, scale log2(e) R q and the weights (at most 1, unnormalized)
// are rounded to bf16, as operands of the tensor cores.
//
// attention_rotate_kernel writes R k once (kr): a thread per 16 bytes of each half of a row, bound by memory. Grid: 4
// tokens a block of 128 threads. What this pass costs at T 16384, H 32, D 128, bf16, where causal attention is
// 2 H D T^2 = 2.2 TFLOP, 6.6 ms at 335 TFLOP/s (H200) and 11 ms at 200 (A100): k and kr are 4 K D T = 268 MB for K 32,
// 67 MB for K 8, the tables 8 MB more. At 4.3 TB/s that is 64 and 18 us, 1.0 and 0.3 % of attention; at 1.7 TB/s 163
// and 44 us, 1.5 and 0.4 %. The share falls as 1 / T (at T 2048, K 32: 8 % on an H200). Queries cost no pass: a block
// rotates its own. An epilogue of the projection would save this pass, but its tile has to hold both halves of a head,
// it has to know positions, and k would be there rotated only. In the loop over keys each tile of queries would rotate
// them anew: 10 to 15 %.
//
// attention_fwd_kernel: a block is (b, head, tile of queries), heads fastest and late queries first, as they see most
// keys. It rotates its queries once, into shared memory, then goes over the tiles of keys from the smallest first[t] to
// the largest t of its queries: S = Q K^T, running maximum m and sum l of each query (base 2), O = O 2^(m - m') + P V
// with P in registers. A warp owns whole rows, so nothing but K and V is shared. K and V have one buffer each: V
// arrives by cp.async during Q K^T, the next K during the softmax and P V; the second block of the multiprocessor hides
// the rest. Only tiles with a key that some query does not see are masked. Where such a tile of V holds an infinity or
// a NaN, it is left out of the product and added for those who see it, so that a document never shows in another one.
//
// Shared memory and registers: bf16, D 64: 128 queries x 128 keys, 4 warps, 49 KB; D 128: 128 x 64, 4 warps, 65 KB; two
// blocks a multiprocessor. D 256: 64 x 32. f32: 64 x 32. Few rows (attention_cached): 16 x 64, one warp.
// Traffic: q, o, lse once; k and v once a tile of queries and head, through the L2. Never stored: S, P, R q.
//
// Few queries of a cache (attention_cached): the query heads of a kv head become rows of one tile, and blocks share the
// slots (blockIdx.z); attention_combine_kernel adds up their f32 results in the order of the slots.
//
// Papers: FlashAttention-2 2307.08691 (tiles, running maximum, one division), RoFormer 2104.09864 (rotation).
#include "attention.h"

namespace rw::cuda {

namespace {

// ---- rotation of rows ----

constexpr int kRotateThreads = 128, kRotateTokens = 4;

template <typename T>
struct RotateRows {
  const T *from, *copied;
  T *to, *copy_to;
  const float *cos, *sin;
  const int32_t *pos, *slot;
  int tokens, time, heads, D;
  int64_t stride;  // of from and copied, from a token to the next
  int64_t slots;
  float factor;
};

template <typename T, int n>
__global__ void __launch_bounds__(kRotateThreads) attention_rotate_kernel(RotateRows<T> a) {
  const int half = a.D / 2, per_head = half / n, per_token = a.heads * per_head;
  for (int at = threadIdx.x; at < kRotateTokens * per_token; at += kRotateThreads) {
    const int token = blockIdx.x * kRotateTokens + at / per_token;
    if (token >= a.tokens) break;
    const int head = at % per_token / per_head, column = at % per_head * n;
    const int64_t from = token * a.stride + head * a.D + column;
    const int64_t row = a.slot ? (token / a.time * a.heads + head) * a.slots + a.slot[token]
                               : static_cast<int64_t>(token) * a.heads + head;
    const int64_t to = row * a.D + column;
    const int64_t angle = static_cast<int64_t>(a.pos[token]) * half + column;
    float x[n], y[n], cos[n], sin[n];
    load_unit<n>(a.from + from, x);
    load_unit<n>(a.from + from + half, y);
    load_unit<n>(a.cos + angle, cos);
    load_unit<n>(a.sin + angle, sin);
    rotate_pairs<n>(x, y, cos, sin, a.factor);
    store_unit<n>(a.to + to, x);
    store_unit<n>(a.to + to + half, y);
    if (a.copied) {
      load_unit<n>(a.copied + from, x);
      load_unit<n>(a.copied + from + half, y);
      store_unit<n>(a.copy_to + to, x);
      store_unit<n>(a.copy_to + to + half, y);
    }
  }
}

// ---- forward ----

// Partial results of a row from one part of the slots: output (D, not yet divided), maximum and sum.
struct Partial {
  float *o, *top, *total;
};

constexpr int kPartUnit = 128;
constexpr int kFewRows = 16;  // rows of the smallest tile

struct Forward : Attention {
  int64_t stride;                     // from a key to the next
  int64_t head_stride, batch_stride;  // from a kv head and a sequence to the next
  int group;        // query heads of a kv head: row r of its queries is token r / group, head r % group
  int part;         // slots of a part, a multiple of all tiles
  bool vector;      // 16-byte accesses
  Partial partial;  // null where there is one part

  explicit Forward(const Attention& attention)
      : Attention(attention),
        stride(last ? D : static_cast<int64_t>(K) * D),
        head_stride(last ? static_cast<int64_t>(S) * D : D),
        batch_stride(static_cast<int64_t>(S) * K * D),
        group(H / K),
        part(0),
        vector(false),
        partial() {}
};

// What a block keeps in shared memory, as its registers are full during the loop.
struct Place {
  int64_t keys;        // where the keys and values of its sequence and kv head begin
  int b, head0, row0;  // sequence, first head of the group, first row
  int first, last;     // keys that all rows see
  int begin, end;      // keys that some row sees, from the start of a tile on
};

template <typename T, int kD, int kWarps, int kRowBlocks, int kKeys>
struct ForwardTile {
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kRowBlocks * kWarps;

  struct Smem {
    T q[kRows * kD];
    REDZONE(after_q);
    T k[kKeys * kD];
    REDZONE(after_k);
    T v[kKeys * kD];
    REDZONE(after_v);
    Weights<T, kRows, kKeys> weights;
    REDZONE(after_weights);
    int2 seen[kRows];  // first and last key of a row
    REDZONE(after_seen);
    Place place;
    REDZONE(after_place);
    Ever<kWarps> cleaned;  // infinities and NaN have been left out
  };
};

// The queries of a tile, rotated and scaled: row r of the tile is row0 + r of the sequence's rows.
template <int kRows, int kD, int kThreads, int n, typename T>
__device__ __forceinline__ void load_queries(T* tile, const Forward& a, int b, int head0, int row0) {
  constexpr int kUnits = kD / 2 / n;
  const int half = a.D / 2;
  for (int at = threadIdx.x; at < kRows * kUnits; at += kThreads) {
    const int row = at / kUnits, column = at % kUnits * n, t = (row0 + row) / a.group;
    float x[n] = {}, y[n] = {};
    int left = column, right = column + half;
    if (column >= half) {  // the same number of units is left of kD on the right of D
      left = a.D + 2 * (column - half);
      right = left + n;
    } else if (t < a.T) {
      const int head = head0 + (row0 + row) % a.group;
      const T* from = static_cast<const T*>(a.q) + ((static_cast<int64_t>(b) * a.T + t) * a.H + head) * a.D + column;
      const int64_t angle = static_cast<int64_t>(a.pos[static_cast<int64_t>(b) * a.T + t]) * half + column;
      float cos[n], sin[n];
      load_unit<n>(from, x);
      load_unit<n>(from + half, y);
      load_unit<n>(a.cos + angle, cos);
      load_unit<n>(a.sin + angle, sin);
      rotate_pairs<n>(x, y, cos, sin, a.factor.value);
    }
    store_unit<n>(tile + element_at<T, kD>(row, left), x);
    store_unit<n>(tile + element_at<T, kD>(row, right), y);
  }
}

// Rows of a warp from its part of a tile to the tensor.
template <int kRows, int kD, int n, typename T>
__device__ __forceinline__ void store_outputs(const T* tile, const Forward& a, int b, int head0, int row0) {
  constexpr int kUnits = kD / n;
  for (int at = lane_index(); at < kRows * kUnits; at += kWarp) {
    const int row = at / kUnits, column = at % kUnits * n, t = (row0 + row) / a.group;
    if (column >= a.D || t >= a.T) continue;
    const int head = head0 + (row0 + row) % a.group;
    float x[n];
    load_unit<n>(tile + element_at<T, kD>(row, column), x);
    store_unit<n>(static_cast<T*>(a.o) + ((static_cast<int64_t>(b) * a.T + t) * a.H + head) * a.D + column, x);
  }
}

template <typename T, int kD, int kWarps, int kRowBlocks, int kKeys>
__global__ void __launch_bounds__(32 * kWarps, kWarps == 1                   ? 4
                                               : sizeof(T) == 2 && kD <= 128 ? 2
                                                                             : 1) attention_fwd_kernel(Forward a) {
  using Tile = ForwardTile<T, kD, kWarps, kRowBlocks, kKeys>;
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kWarpRows = 16 * kRowBlocks;
  auto& smem = dyn_smem<typename Tile::Smem>();
  const int g = lane_index() / 4, t = lane_index() % 4;

  const int b = blockIdx.x / a.K, kv_head = blockIdx.x % a.K, row0 = (gridDim.y - 1 - blockIdx.y) * kRows;
  smem.cleaned.begin();
  // What the rows see; those after the last one see what it sees.
  for (int r = threadIdx.x; r < kRows; r += kThreads) {
    const int token = min((row0 + r) / a.group, a.T - 1);
    const int64_t at = static_cast<int64_t>(b) * a.T + token;
    smem.seen[r] = make_int2(max(a.first[at], 0), a.last ? min(a.last[at], a.S - 1) : token);
  }
  __syncthreads();
  int2 lowest = smem.seen[lane_index() % kRows], highest = lowest;
#pragma unroll
  for (int r = 0; r < kRows; r += kWarp) {
    const int2 seen = smem.seen[(r + lane_index()) % kRows];
    lowest = make_int2(min(lowest.x, seen.x), min(lowest.y, seen.y));
    highest = make_int2(max(highest.x, seen.x), max(highest.y, seen.y));
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    lowest.x = min(lowest.x, __shfl_xor_sync(kAllLanes, lowest.x, step));
    lowest.y = min(lowest.y, __shfl_xor_sync(kAllLanes, lowest.y, step));
    highest.x = max(highest.x, __shfl_xor_sync(kAllLanes, highest.x, step));
    highest.y = max(highest.y, __shfl_xor_sync(kAllLanes, highest.y, step));
  }
  const int begin = max(lowest.x / kKeys * kKeys, static_cast<int>(blockIdx.z) * a.part);
  const int end = min(highest.y, static_cast<int>(blockIdx.z) * a.part + a.part - 1) + 1;

  const int64_t keys = b * a.batch_stride + kv_head * a.head_stride;
  if (threadIdx.x == 0) smem.place = {keys, b, kv_head * a.group, row0, highest.x, lowest.y, begin, end};

  const T *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
  if (begin < end)
    load_tile<kKeys, kD, kThreads>(smem.k, k + keys + begin * a.stride, a.stride, a.S - begin, a.D, a.vector);
  cp_async_commit();
  if (a.vector)
    load_queries<kRows, kD, kThreads, kVector<T>>(smem.q, a, b, kv_head * a.group, row0);
  else
    load_queries<kRows, kD, kThreads, 1>(smem.q, a, b, kv_head * a.group, row0);

  const int warp_row0 = warp_index() * kWarpRows;
  const int2* own_seen = smem.seen + warp_row0 + g;
  Accumulators<kRowBlocks, kD> o;
  float top[2 * kRowBlocks], total[2 * kRowBlocks];  // of rows g, g + 8, ...; `total` of this thread's columns
  set_zero(o);
#pragma unroll
  for (int r = 0; r < 2 * kRowBlocks; r++) {
    top[r] = -3e38f;  // a maximum of nothing: finite, so that the difference of two is not NaN
    total[r] = 0;
  }

  const auto is_masked = [&](int n0) { return n0 < smem.place.first || n0 + kKeys - 1 > smem.place.last; };
#pragma unroll 1
  for (int n0 = begin; n0 < end; n0 += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // K is there, V is free
    const bool masked = is_masked(n0);
    load_tile<kKeys, kD, kThreads>(smem.v, v + smem.place.keys + n0 * a.stride, a.stride, a.S - n0, a.D, a.vector);
    cp_async_commit();

    Accumulators<kRowBlocks, kKeys> s;
    multiply_nt<kD>(s, smem.q, warp_row0, smem.k);

    cp_async_wait<0>();
    if (masked) smem.cleaned.say(clean_own_part<kKeys, kD, kThreads>(smem.v));
    __syncthreads();  // V is there, K is free
    if (n0 + kKeys < end)
      load_tile<kKeys, kD, kThreads>(smem.k, k + smem.place.keys + (n0 + kKeys) * a.stride, a.stride, a.S - n0 - kKeys,
                                     a.D, a.vector);
    cp_async_commit();

    if (masked) {
#pragma unroll
      for (int r = 0; r < 2 * kRowBlocks; r++) {
        const int low = own_seen[8 * r].x - n0 - 2 * t, high = own_seen[8 * r].y - n0 - 2 * t;
#pragma unroll
        for (int j = 0; j < kKeys / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (8 * j + e < low || 8 * j + e > high) s[r / 2][j][r % 2 * 2 + e] = __uint_as_float(0xff800000u);
      }
    }

    float shrink[2 * kRowBlocks];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < 2 * kRowBlocks; r++) {
      float highest_score = s[r / 2][0][r % 2 * 2];
#pragma unroll
      for (int j = 0; j < kKeys / 8; j++)
        highest_score = fmaxf(highest_score, fmaxf(s[r / 2][j][r % 2 * 2], s[r / 2][j][r % 2 * 2 + 1]));
      highest_score = fmaxf(highest_score, __shfl_xor_sync(kAllLanes, highest_score, 1));
      highest_score = fmaxf(highest_score, __shfl_xor_sync(kAllLanes, highest_score, 2));
      highest_score = fmaxf(highest_score, top[r]);
      grown |= highest_score != top[r];
      shrink[r] = exp2_approx(top[r] - highest_score);
      top[r] = highest_score;
    }
    if (__any_sync(kAllLanes, grown)) {
#pragma unroll
      for (int r = 0; r < 2 * kRowBlocks; r++) {
        total[r] *= shrink[r];
#pragma unroll
        for (int j = 0; j < kD / 8; j++) {
          o[r / 2][j][r % 2 * 2] *= shrink[r];
          o[r / 2][j][r % 2 * 2 + 1] *= shrink[r];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys / 8; j++)
#pragma unroll
      for (int r = 0; r < 2 * kRowBlocks; r++) {
        float(&pair)[4] = s[r / 2][j];
        pair[r % 2 * 2] = exp2_approx(pair[r % 2 * 2] - top[r]);
        pair[r % 2 * 2 + 1] = exp2_approx(pair[r % 2 * 2 + 1] - top[r]);
        total[r] += pair[r % 2 * 2] + pair[r % 2 * 2 + 1];
      }
    multiply_nn<kD>(o, s, smem.v, smem.weights);
    if constexpr (kWarps == 1 && sizeof(T) == 2) {
      // Steps of generation wait for memory, not for products: what rounding took from the weights has time to follow.
#pragma unroll
      for (int j = 0; j < kKeys / 2; j++) {
        float& weight = s[0][j / 4][j % 4];
        weight -= to_float(to_bf16(weight));
      }
      multiply_nn<kD>(o, s, smem.v, smem.weights);
    }
  }
  if (begin >= end) __syncthreads();  // the loop has not waited for the queries and the place to be written

  const Place& place = smem.place;
  const int64_t token0 = static_cast<int64_t>(place.b) * a.T;
  const int own_row0 = place.row0 + warp_row0, rows = a.T * a.group;
  if (smem.cleaned.any()) {
#pragma unroll 1
    for (int n0 = place.begin; n0 < place.end; n0 += kKeys)
      if (is_masked(n0))
        add_not_finite<kD>(o, v + place.keys + n0 * a.stride, a.stride, min(kKeys, a.S - n0), a.D, 1,
                           [&](int r, int n) { return n0 + n >= own_seen[8 * r].x && n0 + n <= own_seen[8 * r].y; });
  }
#pragma unroll
  for (int r = 0; r < 2 * kRowBlocks; r++) {
    total[r] += __shfl_xor_sync(kAllLanes, total[r], 1);
    total[r] += __shfl_xor_sync(kAllLanes, total[r], 2);
  }
  if (a.partial.o) {
#pragma unroll
    for (int r = 0; r < 2 * kRowBlocks; r++) {
      const int row = own_row0 + 8 * r + g;
      if (row >= rows) continue;
      const int64_t token = token0 + row / a.group;
      const int64_t index = (token * a.H + place.head0 + row % a.group) * gridDim.z + blockIdx.z;
      if (t == 0) {
        a.partial.top[index] = top[r];
        a.partial.total[index] = total[r];
      }
#pragma unroll
      for (int j = 0; j < kD / 8; j++)
        if (8 * j + 2 * t < a.D)
          store_pair(a.partial.o + index * a.D + 8 * j + 2 * t, o[r / 2][j][r % 2 * 2], o[r / 2][j][r % 2 * 2 + 1]);
    }
    return;
  }
  // A warp's own queries are read by nobody else, and not again: their place takes its outputs.
  T* own_q = smem.q + warp_row0 * kD;
#pragma unroll
  for (int r = 0; r < 2 * kRowBlocks; r++) {
    const int row = own_row0 + 8 * r + g;
    if (a.lse && t == 0 && row < rows)
      a.lse[(static_cast<int64_t>(place.b) * a.H + place.head0 + row % a.group) * a.T + row / a.group] =
          top[r] * a.factor.from_base_2 + logf(total[r]);
    const float divided = 1 / (total[r] == 0 ? 1 : total[r]);
#pragma unroll
    for (int j = 0; j < kD / 8; j++)
      store_pair(own_q + element_at<T, kD>(8 * r + g, 8 * j + 2 * t), o[r / 2][j][r % 2 * 2] * divided,
                 o[r / 2][j][r % 2 * 2 + 1] * divided);
  }
  __syncwarp();
  if (a.vector)
    store_outputs<kWarpRows, kD, kVector<T>>(own_q, a, place.b, place.head0, own_row0);
  else
    store_outputs<kWarpRows, kD, 1>(own_q, a, place.b, place.head0, own_row0);
}

// o of a row from its parts, in their order. A warp a row.
template <typename T>
__global__ void __launch_bounds__(128) attention_combine_kernel(Partial partial, T* o, int64_t rows, int parts, int D) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + warp_index();
  if (row >= rows) return;
  const float *top = partial.top + row * parts, *total = partial.total + row * parts;
  float highest = top[0];
  for (int part = 1; part < parts; part++) highest = fmaxf(highest, top[part]);
  float sum = 0;
  for (int part = 0; part < parts; part++) sum += total[part] * exp2_approx(top[part] - highest);
  const float divided = 1 / (sum == 0 ? 1 : sum);
  for (int d = lane_index(); d < D; d += kWarp) {
    float x = 0;
    for (int part = 0; part < parts; part++)
      x += partial.o[(row * parts + part) * D + d] * exp2_approx(top[part] - highest);
    o[row * D + d] = from_float<T>(x * divided);
  }
}

template <typename T, int kD, int kWarps, int kRowBlocks, int kKeys>
void launch_tiles(Context& context, const Forward& a, int parts) {
  using Tile = ForwardTile<T, kD, kWarps, kRowBlocks, kKeys>;
  static_assert(sizeof(typename Tile::Smem) <= 163 * 1024 && kPartUnit % kKeys == 0);
  const int tiles = ceil_div(a.T * a.group, Tile::kRows);
  launch({dim3(a.B * a.K, tiles, parts), Tile::kThreads, sizeof(typename Tile::Smem), context.stream},
         attention_fwd_kernel<T, kD, kWarps, kRowBlocks, kKeys>, a);
}

template <typename T>
void launch_forward(Context& context, Forward& a) {
  constexpr bool kHalf = sizeof(T) == 2;
  a.vector = vectors_fit(kHalf ? DType::bf16 : DType::f32, a.D, {a.q, a.k, a.v, a.o, a.cos, a.sin});

  // Where few rows meet a long cache, blocks share its slots: about 4 for each multiprocessor.
  const int rows = a.T * a.group, tile_rows = rows <= kFewRows ? kFewRows : 128;
  const int blocks = a.B * a.K * ceil_div(rows, tile_rows);
  const size_t part_bytes = static_cast<size_t>(a.B) * a.T * a.H * (a.D + 2) * sizeof(float);
  const auto fitting = static_cast<int>(context.workspace_bytes / part_bytes);
  const int wanted = a.last && fitting > 1 ? min(fitting, ceil_div(4 * context.sm_count, blocks)) : 1;
  a.part = ceil_div(ceil_div(a.S, wanted), kPartUnit) * kPartUnit;
  const int parts = ceil_div(a.S, a.part);
  if (parts > 1) {
    const int64_t results = static_cast<int64_t>(a.B) * a.T * a.H * parts;
    a.partial.o = static_cast<float*>(context.scratch(part_bytes * parts));
    a.partial.top = a.partial.o + results * a.D;
    a.partial.total = a.partial.top + results;
  }
  with_head_dim(a.D, [&](auto head_dim) {
    constexpr int kD = decltype(head_dim)::value;
    if (rows <= kFewRows && a.last)
      launch_tiles<T, kD, 1, 1, kHalf && kD <= 128 ? 64 : kD == 256 ? 16 : 32>(context, a, parts);
    else if constexpr (kHalf && kD <= 128)
      launch_tiles<T, kD, 4, 2, kD == 64 ? 128 : 64>(context, a, parts);
    else
      launch_tiles<T, kD, 4, 1, 32>(context, a, parts);
  });
  if (parts > 1) {
    const int64_t outputs = static_cast<int64_t>(a.B) * a.T * a.H;
    launch({static_cast<unsigned>(ceil_div(outputs, int64_t{4})), 128, 0, context.stream}, attention_combine_kernel<T>,
           a.partial, static_cast<T*>(a.o), outputs, parts, a.D);
  }
}

template <typename T>
void launch_rotation(Context& context, const Rotation& rotation) {
  const Tensor& from = rotation.from;
  RotateRows<T> a = {};
  a.from = from.as<T>() + rotation.first_head * from.dims[3];
  a.to = static_cast<T*>(rotation.to);
  a.copied = static_cast<const T*>(rotation.copied);
  a.copy_to = static_cast<T*>(rotation.copy_to);
  a.cos = rotation.cos.as<float>();
  a.sin = rotation.sin.as<float>();
  a.pos = rotation.pos.as<int32_t>();
  a.slot = rotation.slot;
  a.slots = rotation.slots;
  a.tokens = static_cast<int>(from.dims[0] * from.dims[1]);
  a.time = static_cast<int>(from.dims[1]);
  a.heads = static_cast<int>(rotation.heads ? rotation.heads : from.dims[2]);
  a.D = static_cast<int>(from.dims[3]);
  a.stride = from.dims[2] * from.dims[3];
  a.factor = rotation.factor;
  const bool vector = vectors_fit(from.dtype, a.D, {a.from, a.to, a.copied, a.copy_to, a.cos, a.sin});
  launch({static_cast<unsigned>(ceil_div(a.tokens, kRotateTokens)), kRotateThreads, 0, context.stream},
         vector ? attention_rotate_kernel<T, kVector<T>> : attention_rotate_kernel<T, 1>, a);
}

}  // namespace

void attend(Context& context, DType dtype, const Attention& attention) {
  Forward a(attention);
  if (dtype == DType::bf16)
    launch_forward<bf16>(context, a);
  else
    launch_forward<float>(context, a);
}

void rotate_rows(Context& context, const Rotation& rotation) {
  if (rotation.from.dtype == DType::bf16)
    launch_rotation<bf16>(context, rotation);
  else
    launch_rotation<float>(context, rotation);
}

void attention_fwd(Context& context, const attention_fwd_args& args) {
  rotate_rows(context, {args.k, args.cos, args.sin, args.pos, args.kr.data});
  Attention a(args.scale);
  a.q = args.q.data;
  a.k = args.kr.data;
  a.v = args.v.data;
  a.o = args.o.data;
  a.lse = args.lse.as<float>();
  a.cos = args.cos.as<float>();
  a.sin = args.sin.as<float>();
  a.pos = args.pos.as<int32_t>();
  a.first = args.first.as<int32_t>();
  a.B = static_cast<int>(args.q.dims[0]);
  a.T = a.S = static_cast<int>(args.q.dims[1]);
  a.H = static_cast<int>(args.q.dims[2]);
  a.D = static_cast<int>(args.q.dims[3]);
  a.K = static_cast<int>(args.k.dims[2]);
  attend(context, args.q.dtype, a);
}

}  // namespace rw::cuda
