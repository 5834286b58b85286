// Gradients of attention_fwd. With s = scale R q (R k)^T, p = exp(s - lse), dp = dout v^T, delta = sum_d dout o and ds
// = p (dp - delta):  dv = p^T dout,  dq = R^T (scale ds R k),  dk = R^T (scale ds^T R q).
//
// Shapes: q, o, dout, dq (B,T,H,D); k, v, dk, dv (B,T,K,D), D even, up to 256; lse, delta (B,H,T). f32 or bf16; sums
// are f32; in bf16 qr, kr, p and ds are rounded to bf16, as operands of the tensor cores. qr (B,T,H/groups,D) and kr
// (B,T,K/groups,D) hold one group of heads after the other, whose kernels follow each other.
//
// First, kernels bound by memory: delta, an op of its own (8 threads a row), so that o is needed no more; R k and scale
// log2(e) R q (attention_rotate_kernel), and the
// smallest and largest first[t] of each tile of queries, by which tiles are skipped.
//
// Then attention_bwd_kernel twice, once for rows of keys (dk, dv) and once for rows of queries (dq). It holds a tile of
// rows, two operands of it, and the gradients of its rows in registers, and goes over the tiles of the other side:
//   rows of keys:     s^T = kr qr^T, dp^T = v dout^T, dv += p^T dout, dk += ds^T qr, over the query heads of the group
//   rows of queries:  s = qr kr^T, dp = dout v^T, dq += ds kr
// In both, p and ds are left operands in the registers where they were computed. Every sum is made by one block in one
// order: two runs give the same bits, without atomics, for 7 products instead of 5. (One pass would have to add up dq
// over blocks: in the order of a semaphore, or in phases of disjoint tiles as the CPU does.)
//
// The streamed operand that is needed first and last (qr, or kr) has two buffers, the other one a single buffer, which
// is filled while the last product runs; the second block of a multiprocessor hides what remains. Blocks with the most
// work start first. Where a tile that is not seen whole by all rows holds an infinity or a NaN, these are left out of
// products and make NaN of the gradients of those who see them (clean_own_part, add_not_finite).
//
// Grid: (K, B, tiles of keys), (H, B, tiles of queries): a block divides by nothing to find its place. bf16: D 64: 128
// rows x 32, 4 warps, 45 KB; D 128: 64 rows x 64, 4 warps, 81 KB, which is all that lets two blocks share an A100's
// multiprocessor. D 256: 64 x 16, dk and dv in launches of their own, for the registers. f32: 64 x 32, D 256: 32 x 16.
// Traffic: the rows once, the streamed operands once a tile of rows, through the L2. Never stored: s, p, dp, ds.
//
// Papers: FlashAttention-2 2307.08691, RoFormer 2104.09864.
#include "attention.h"

namespace rw::cuda {

namespace {

enum class Wanted { dq, dk, dv, dk_dv };

struct Backward {
  const void *qr, *kr, *v, *dout;
  void *dq, *dk, *dv;
  const float *lse, *delta, *cos, *sin;
  const int32_t *pos, *first;
  const int2* firsts;  // (B, tiles of columns): the smallest and largest first[t] of a tile
  int T, H, K, D;
  int group;                                         // query heads of a kv head
  int64_t q_stride, k_stride, qr_stride, kr_stride;  // from a token to the next
  Factor factor;
  bool vector;  // 16-byte accesses
};

// ---- what is computed before
// ------------------------------------------------------------------------------------------

constexpr int kDeltaThreads = 128, kRowThreads = 8;

// delta[b][h][t] = sum_d dout o. `rows` = B T H.
template <typename T, int n>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(const T* o, const T* dout, float* delta, int64_t rows, int time, int heads, int D) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kDeltaThreads / kRowThreads) + threadIdx.x / kRowThreads;
  float sum = 0;
  if (row < rows)
    for (int d = threadIdx.x % kRowThreads * n; d < D; d += kRowThreads * n) {
      float x[n], y[n];
      load_unit<n>(o + row * D + d, x);
      load_unit<n>(dout + row * D + d, y);
#pragma unroll
      for (int i = 0; i < n; i++) sum += x[i] * y[i];
    }
#pragma unroll
  for (int step = kRowThreads / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (row >= rows || threadIdx.x % kRowThreads) return;
  const int64_t token = row / heads, b = token / time;
  delta[(b * heads + row % heads) * time + token % time] = sum;
}

// firsts[b][tile] of `size` tokens each; a warp a tile. `tiles` = those of all sequences.
__global__ void __launch_bounds__(kWarp)
    attention_firsts_kernel(const int32_t* first, int2* firsts, int time, int per_sequence, int size) {
  const int b = blockIdx.x / per_sequence, t0 = blockIdx.x % per_sequence * size;
  int lowest = 0x7fffffff, highest = 0;
  for (int t = t0 + lane_index(); t < min(t0 + size, time); t += kWarp) {
    const int value = max(first[static_cast<int64_t>(b) * time + t], 0);
    lowest = min(lowest, value);
    highest = max(highest, value);
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    lowest = min(lowest, __shfl_xor_sync(kAllLanes, lowest, step));
    highest = max(highest, __shfl_xor_sync(kAllLanes, highest, step));
  }
  if (lane_index() == 0) firsts[blockIdx.x] = make_int2(lowest, highest);
}

// ---- the products
// -----------------------------------------------------------------------------------------------------

template <typename T, int kD_>
struct Shape {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kD = kD_;
  static constexpr int kWarps = kD == 256 && !kHalf ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kRowBlocks = kHalf && kD == 64 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowBlocks, kRows = kWarpRows * kWarps;
  static constexpr int kColumns = kD == 256 ? 16 : kHalf && kD == 128 ? 64 : 32;

  struct Smem {
    union {
      T rows[2][kRows * kD];   // kr and v, or qr and dout
      float sums[kRows * kD];  // afterwards: gradients on their way to memory
    };
    REDZONE(after_rows);
    T x[2][kColumns * kD];  // qr, or kr
    REDZONE(after_x);
    T y[kColumns * kD];  // dout, or v
    REDZONE(after_y);
    float lse[kColumns], delta[kColumns];  // of columns of queries
    int32_t first[kColumns];
    REDZONE(after_first);
    Weights<T, kRows, kColumns> weights;
    REDZONE(after_weights);
    Ever<kWarps> cleaned;  // infinities and NaN have been left out
  };
  static constexpr int kBlocks = kHalf && kD <= 128 ? 2 : 1;  // of a multiprocessor, which has 164 KB on sm_80
  static_assert(kBlocks * (sizeof(Smem) + 1024) <= 164 * 1024 && kRows % kColumns == 0 && kColumns <= kThreads);
};

// A warp's rows of gradients: c * factor, turned back where `turned`, to rows of a tensor from `to` on.
template <int kD, int kRowBlocks, bool kTurned, int n, typename T>
__device__ __forceinline__ void store_gradients(float* sums, const float (&c)[kRowBlocks][kD / 8][4], float factor,
                                                T* to, int64_t stride, const int32_t* pos, int rows,
                                                const Backward& a) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  __syncwarp();  // what was here before has been read
#pragma unroll
  for (int r = 0; r < 2 * kRowBlocks; r++)
#pragma unroll
    for (int j = 0; j < kD / 8; j++)
      store_pair(sums + element_at<float, kD>(8 * r + g, 8 * j + 2 * t), c[r / 2][j][r % 2 * 2] * factor,
                 c[r / 2][j][r % 2 * 2 + 1] * factor);
  __syncwarp();
  const int half = a.D / 2;
  constexpr int kUnits = kD / 2 / n;
#pragma unroll 1
  for (int at = lane_index(); at < 16 * kRowBlocks * kUnits; at += kWarp) {
    const int row = at / kUnits, column = at % kUnits * n;
    if (row >= rows || column >= half) continue;
    float x[n], y[n];
#pragma unroll
    for (int i = 0; i < n; i++) {
      x[i] = sums[element_at<float, kD>(row, column + i)];
      y[i] = sums[element_at<float, kD>(row, column + half + i)];
    }
    if constexpr (kTurned) {
      const int64_t angle = static_cast<int64_t>(pos[row]) * half + column;
      float cos[n], sin[n];
      load_unit<n>(a.cos + angle, cos);
      load_unit<n>(a.sin + angle, sin);
#pragma unroll
      for (int i = 0; i < n; i++) sin[i] = -sin[i];
      rotate_pairs<n>(x, y, cos, sin, 1);
    }
    store_unit<n>(to + row * stride + column, x);
    store_unit<n>(to + row * stride + column + half, y);
  }
}

template <typename T, int kD, Wanted kWanted>
__global__ void __launch_bounds__(Shape<T, kD>::kThreads, Shape<T, kD>::kBlocks) attention_bwd_kernel(Backward a) {
  using S = Shape<T, kD>;
  constexpr bool kKeyRows = kWanted != Wanted::dq, kSlopes = kWanted != Wanted::dv;
  constexpr bool kValues = kWanted == Wanted::dv || kWanted == Wanted::dk_dv;
  constexpr int kThreads = S::kThreads, kRows = S::kRows, kColumns = S::kColumns, kRowBlocks = S::kRowBlocks;
  auto& smem = dyn_smem<typename S::Smem>();
  const int g = lane_index() / 4, t = lane_index() % 4, warp_row0 = warp_index() * S::kWarpRows;

  const int b = blockIdx.y, head = blockIdx.x;
  const int row0 = (kKeyRows ? blockIdx.z : gridDim.z - 1 - blockIdx.z) * kRows;
  const int64_t token0 = static_cast<int64_t>(b) * a.T;
  const int64_t row_stride = kKeyRows ? a.k_stride : a.q_stride, column_stride = kKeyRows ? a.q_stride : a.k_stride;
  const int64_t x_stride = kKeyRows ? a.qr_stride : a.kr_stride, row_x_stride = kKeyRows ? a.kr_stride : a.qr_stride;
  const int column_head = kKeyRows ? head * a.group : head / a.group;
  const T* x = static_cast<const T*>(kKeyRows ? a.qr : a.kr) + token0 * x_stride + column_head * a.D;
  const T* y = static_cast<const T*>(kKeyRows ? a.dout : a.v) + token0 * column_stride + column_head * a.D;

  // The tiles of columns begin .. end - 1 that some row has to do with, and the largest first[t] of rows of queries.
  const int tiles = ceil_div(a.T, kColumns);
  const int2* firsts = a.firsts + static_cast<int64_t>(b) * tiles;
  int begin = row0 / kColumns, end = ceil_div(min(row0 + kRows, a.T), kColumns), highest_first = 0;
  if constexpr (kKeyRows) {
    for (int tile = begin + lane_index(); tile < tiles; tile += kWarp)
      if (firsts[tile].x < row0 + kRows) end = tile + 1;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) end = max(end, __shfl_xor_sync(kAllLanes, end, step));
  } else {
    const int own = begin;
    for (int tile = own; tile < end; tile++) {
      begin = min(begin, firsts[tile].x / kColumns);
      highest_first = max(highest_first, firsts[tile].y);
    }
  }
  const auto is_masked = [&](int tile) {
    const int column0 = tile * kColumns;
    if constexpr (kKeyRows) return row0 + kRows - 1 > column0 || firsts[tile].y > row0;
    return column0 + kColumns - 1 > row0 || highest_first > column0;
  };
  const auto seen = [&](int query) {  // the first and last key that it sees
    const int last = min(query, a.T - 1);
    return make_int2(a.first[token0 + last], last);
  };
  // Steps are pairs (head of the group, tile), in this order.
  struct Step {
    int head, tile;
  };
  const int steps_heads = kKeyRows ? a.group : 1;
  const auto advance = [&](Step& step) {
    do {
      if (++step.tile == end) {
        step.tile = begin;
        step.head++;
      }
    } while (kKeyRows && step.head < steps_heads && firsts[step.tile].x >= row0 + kRows);
  };
  const auto load_x = [&](const Step& step, int stage) {
    const int column0 = step.tile * kColumns;
    load_tile<kColumns, kD, kThreads>(smem.x[stage], x + column0 * x_stride + step.head * a.D, x_stride, a.T - column0,
                                      a.D, a.vector);
  };
  const auto load_y = [&](const Step& step) {
    const int column0 = step.tile * kColumns;
    load_tile<kColumns, kD, kThreads>(smem.y, y + column0 * column_stride + step.head * a.D, column_stride,
                                      a.T - column0, a.D, a.vector);
    if constexpr (kKeyRows) {
      const int i = thread_index_anew();
      if (i < kColumns) {
        const bool valid = column0 + i < a.T;
        const int64_t at = (static_cast<int64_t>(b) * a.H + column_head + step.head) * a.T + column0 + (valid ? i : 0);
        cp_async_4(&smem.lse[i], a.lse + at, valid);
        cp_async_4(&smem.delta[i], a.delta + at, valid);
        cp_async_4(&smem.first[i], a.first + token0 + min(column0 + i, a.T - 1));
      }
    }
  };

  Step step = {0, begin - 1};
  advance(step);
  const T* row_x = static_cast<const T*>(kKeyRows ? a.kr : a.qr) + (token0 + row0) * row_x_stride + head * a.D;
  const T* row_y = static_cast<const T*>(kKeyRows ? a.v : a.dout) + (token0 + row0) * row_stride + head * a.D;
  load_tile<kRows, kD, kThreads>(smem.rows[0], row_x, row_x_stride, a.T - row0, a.D, a.vector);
  if (kSlopes) load_tile<kRows, kD, kThreads>(smem.rows[1], row_y, row_stride, a.T - row0, a.D, a.vector);
  if (step.head < steps_heads) load_x(step, 0);
  cp_async_commit();
  if (step.head < steps_heads) load_y(step);
  cp_async_commit();

  float row_lse[2 * kRowBlocks], row_delta[2 * kRowBlocks];  // of rows of queries
  if constexpr (!kKeyRows) {
#pragma unroll
    for (int r = 0; r < 2 * kRowBlocks; r++) {
      const int row = min(row0 + warp_row0 + 8 * r + g, a.T - 1);
      row_lse[r] = a.lse[(static_cast<int64_t>(b) * a.H + head) * a.T + row];
      row_delta[r] = a.delta[(static_cast<int64_t>(b) * a.H + head) * a.T + row];
    }
  }
  Accumulators<kRowBlocks, kD> sum, values;  // dq or dk; dv
  if (kSlopes) set_zero(sum);
  if (kValues) set_zero(values);
  smem.cleaned.begin();

#pragma unroll 1
  for (int stage = 0; step.head < steps_heads; stage ^= 1) {
    const bool masked = is_masked(step.tile);
    const int column0 = step.tile * kColumns;
    cp_async_wait<1>();
    bool found = false;
    if (masked && kSlopes) found = clean_own_part<kColumns, kD, kThreads>(smem.x[stage]);
    __syncthreads();  // x is there, the other x is free
    Step next = step;
    advance(next);
    const bool more = next.head < steps_heads;
    if (more) load_x(next, stage ^ 1);
    cp_async_commit();

    Accumulators<kRowBlocks, kColumns> p, ds;
    multiply_nt<kD>(p, smem.rows[0], warp_row0, smem.x[stage]);

    cp_async_wait<1>();
    if (masked && kValues) found |= clean_own_part<kColumns, kD, kThreads>(smem.y);
    if (masked) smem.cleaned.say(found);
    __syncthreads();  // y is there
    if constexpr (kSlopes) multiply_nt<kD>(ds, smem.rows[1], warp_row0, smem.y);

#pragma unroll
    for (int j = 0; j < kColumns / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int column = 8 * j + 2 * t + e;
        const float lse = kKeyRows ? smem.lse[column] : 0, delta = kKeyRows ? smem.delta[column] : 0;
#pragma unroll
        for (int r = 0; r < 2 * kRowBlocks; r++) {
          float& weight = p[r / 2][j][r % 2 * 2 + e];
          weight = exp2_approx(fmaf(kKeyRows ? lse : row_lse[r], -a.factor.to_base_2, weight));
          if constexpr (kSlopes) {
            float& slope = ds[r / 2][j][r % 2 * 2 + e];
            slope = weight * (slope - (kKeyRows ? delta : row_delta[r]));
          }
        }
      }
    if (masked) {
      int2 keys[2 * kRowBlocks];  // what rows of queries see
      if constexpr (!kKeyRows) {
#pragma unroll
        for (int r = 0; r < 2 * kRowBlocks; r++) keys[r] = seen(row0 + warp_row0 + 8 * r + g);
      }
#pragma unroll
      for (int j = 0; j < kColumns / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int at = 8 * j + 2 * t + e, column = column0 + at;
          const int2 column_keys = kKeyRows ? make_int2(smem.first[at], min(column, a.T - 1)) : int2();
#pragma unroll
          for (int r = 0; r < 2 * kRowBlocks; r++) {
            const int key = kKeyRows ? row0 + warp_row0 + 8 * r + g : column;
            const int2 range = kKeyRows ? column_keys : keys[r];
            if (key >= range.x && key <= range.y) continue;
            p[r / 2][j][r % 2 * 2 + e] = 0;
            if constexpr (kSlopes) ds[r / 2][j][r % 2 * 2 + e] = 0;
          }
        }
    }
    if constexpr (kValues) multiply_nn<kD>(values, p, smem.y, smem.weights);
    __syncthreads();  // y is free
    if (more) load_y(next);
    cp_async_commit();
    if constexpr (kSlopes) multiply_nn<kD>(sum, ds, smem.x[stage], smem.weights);
    step = next;
  }

  // A tile of rows meets at least one of columns, its own. So nothing is under way here, and the last barrier of the
  // loop came after the rows were read for the last time.
  if (smem.cleaned.any()) {
    for (step = {0, begin - 1}, advance(step); step.head < steps_heads; advance(step)) {
      if (!is_masked(step.tile)) continue;
      const int column0 = step.tile * kColumns;
      const int head_at = step.head * a.D;
      const auto row_sees = [&](int r, int n) {
        const int row = row0 + warp_row0 + 8 * r + g, column = column0 + n, key = kKeyRows ? row : column;
        const int2 keys = seen(kKeyRows ? column : row);
        return key >= keys.x && key <= keys.y;
      };
      const int count = min(kColumns, a.T - column0);
      if constexpr (kSlopes)
        add_not_finite<kD>(sum, x + column0 * x_stride + head_at, x_stride, count, a.D, 0, row_sees);
      if constexpr (kValues)
        add_not_finite<kD>(values, y + column0 * column_stride + head_at, column_stride, count, a.D, 1, row_sees);
    }
  }

  float* own = smem.sums + warp_row0 * kD;
  const int own_rows = a.T - row0 - warp_row0;
  const int64_t to = (token0 + row0 + warp_row0) * row_stride + head * a.D;
  const int32_t* pos = a.pos + token0 + row0 + warp_row0;
  const auto store = [&](auto unit) {
    constexpr int n = decltype(unit)::value;
    if constexpr (kSlopes)
      store_gradients<kD, kRowBlocks, true, n>(own, sum, kKeyRows ? a.factor.from_base_2 : a.factor.scale,
                                               static_cast<T*>(kKeyRows ? a.dk : a.dq) + to, row_stride, pos, own_rows,
                                               a);
    if constexpr (kValues)
      store_gradients<kD, kRowBlocks, false, n>(own, values, 1, static_cast<T*>(a.dv) + to, row_stride, pos, own_rows,
                                                a);
  };
  if (a.vector)
    store(std::integral_constant<int, kVector<T>>());
  else
    store(std::integral_constant<int, 1>());
}

// `a` begins at kv head `first` of as many as there is a rotated copy of.
template <typename T>
Backward from_head(const Backward& a, int64_t first) {
  const auto at = [](auto* p, int64_t elements) {
    using To = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(p)>>, const T, T>;
    return static_cast<To*>(p) + elements;
  };
  const int64_t q_head = first * a.group;
  Backward group = a;
  group.v = at(a.v, first * a.D), group.dout = at(a.dout, q_head * a.D), group.dq = at(a.dq, q_head * a.D);
  group.dk = at(a.dk, first * a.D), group.dv = at(a.dv, first * a.D);
  group.lse += q_head * a.T, group.delta += q_head * a.T;
  return group;
}

template <typename T, int kD, Wanted kWanted>
void launch_bwd(Context& context, const Backward& a, int B) {
  using S = Shape<T, kD>;
  const int heads = static_cast<int>((kWanted == Wanted::dq ? a.qr_stride : a.kr_stride) / a.D);
  launch({dim3(heads, B, ceil_div(a.T, S::kRows)), S::kThreads, sizeof(typename S::Smem), context.stream},
         attention_bwd_kernel<T, kD, kWanted>, a);
}

template <typename T>
void backward(Context& context, const attention_bwd_args& args) {
  const int B = static_cast<int>(args.q.dims[0]);
  if (B > 65535) throw std::runtime_error("q has " + std::to_string(B) + " sequences; a grid takes up to 65535");
  Backward a = {args.qr.data,
                args.kr.data,
                args.v.data,
                args.dout.data,
                args.dq.data,
                args.dk.data,
                args.dv.data,
                args.lse.as<float>(),
                args.delta.as<float>(),
                args.cos.as<float>(),
                args.sin.as<float>(),
                args.pos.as<int32_t>(),
                args.first.as<int32_t>(),
                nullptr,
                static_cast<int>(args.q.dims[1]),
                static_cast<int>(args.q.dims[2]),
                static_cast<int>(args.k.dims[2]),
                static_cast<int>(args.q.dims[3]),
                static_cast<int>(args.q.dims[2] / args.k.dims[2]),
                args.q.dims[2] * args.q.dims[3],
                args.k.dims[2] * args.k.dims[3],
                args.qr.dims[2] * args.qr.dims[3],
                args.kr.dims[2] * args.kr.dims[3],
                Factor(args.scale),
                false};
  a.vector = vectors_fit(args.q.dtype, a.D, {a.qr, a.kr, a.v, a.dout, a.dq, a.dk, a.dv, a.cos, a.sin});

  with_head_dim(a.D, [&](auto head_dim) {
    constexpr int kD = decltype(head_dim)::value, kColumns = Shape<T, kD>::kColumns;
    const int tiles = ceil_div(a.T, kColumns);
    auto* firsts = static_cast<int2*>(context.scratch(static_cast<int64_t>(B) * tiles * sizeof(int2)));
    launch({static_cast<unsigned>(B * tiles), kWarp, 0, context.stream}, attention_firsts_kernel, a.first, firsts, a.T,
           tiles, kColumns);
    a.firsts = firsts;
    const int64_t heads = args.kr.dims[2], q_heads = args.qr.dims[2];
    for (int64_t first = 0; first < args.k.dims[2]; first += heads) {
      rotate_rows(context, {args.k, args.cos, args.sin, args.pos, args.kr.data, 1, first, heads});
      rotate_rows(context,
                  {args.q, args.cos, args.sin, args.pos, args.qr.data, a.factor.value, first * a.group, q_heads});
      const Backward group = from_head<T>(a, first);
      if constexpr (kD == 256) {
        launch_bwd<T, kD, Wanted::dk>(context, group, B);
        launch_bwd<T, kD, Wanted::dv>(context, group, B);
      } else {
        launch_bwd<T, kD, Wanted::dk_dv>(context, group, B);
      }
      launch_bwd<T, kD, Wanted::dq>(context, group, B);
    }
  });
}

template <typename T>
void delta(Context& context, const attention_delta_args& args) {
  const int64_t rows = args.o.dims[0] * args.o.dims[1] * args.o.dims[2];
  const int D = static_cast<int>(args.o.dims[3]);
  const bool vector = vectors_fit(args.o.dtype, D, {args.o.data, args.dout.data});
  launch(
      {static_cast<unsigned>(ceil_div(rows, int64_t{kDeltaThreads / kRowThreads})), kDeltaThreads, 0, context.stream},
      vector ? attention_delta_kernel<T, kVector<T>> : attention_delta_kernel<T, 1>, args.o.as<T>(), args.dout.as<T>(),
      args.delta.as<float>(), rows, static_cast<int>(args.o.dims[1]), static_cast<int>(args.o.dims[2]), D);
}

}  // namespace

void attention_delta(Context& context, const attention_delta_args& args) {
  if (args.o.dtype == DType::bf16)
    delta<bf16>(context, args);
  else
    delta<float>(context, args);
}

void attention_bwd(Context& context, const attention_bwd_args& args) {
  if (args.q.dtype == DType::bf16)
    backward<bf16>(context, args);
  else
    backward<float>(context, args);
}

}  // namespace rw::cuda
