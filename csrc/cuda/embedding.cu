// embedding_fwd: y[n] = w[ids[n]]. embedding_bwd: dw[v] = add[v] + sum over n with ids[n] = v of dy[n].
//
// ids (N) i32, w, add and dw (V,C), y and dy (N,C), each f32 or bf16. Memory traffic: forward 2 N C elements; backward
// V C written once (read too, with add; rows without a token are not touched where add is dw itself) and N C read.
// Forward: a warp copies a row. Grid: N / 8 blocks of 256 threads.
// Backward: the row numbers n are sorted by id, keeping their order (V + N integers), in three kernels:
//   count   an integer atomic per id;
//   ends    prefix sums of the counts, by one block of 1024 threads;
//   order   a warp owns 32 ids, lane l the cursor of the l-th, and walks over all of `ids`, 32 at a time: what is its
//           own is placed by rank, so neither the order nor the time depends on how tokens are distributed.
// Then a warp for each row of dw and each tile of channels sums dy in f32 in the order of n and writes once: a frequent
// token's row is spread over as many warps as it has tiles.
// Ids outside of 0 .. V-1 are refused by the host; forward they give a NaN that shows a caller that did not, backward
// they count for nothing.
#include "elementwise.h"

namespace rw::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// ---- forward
// ----------------------------------------------------------------------------------------------------------

template <int Pack, typename W, typename F>
__global__ void __launch_bounds__(kThreads)
    embedding_fwd_kernel(const int32_t* __restrict__ ids, const W* __restrict__ w, F* __restrict__ y, int64_t rows,
                         int64_t channels, int64_t vocabulary) {
  const int64_t n = int64_t{blockIdx.x} * kWarps + warp_index();
  if (n >= rows) return;
  const int64_t id = ids[n];
  const bool known = id >= 0 && id < vocabulary;
  const W* from = w + (known ? id : 0) * channels;
#pragma unroll 4
  for (int64_t c = lane_index() * Pack; c < channels; c += kWarp * Pack) {
    float x[Pack];
    load(from + c, x);
    if (!known)
#pragma unroll
      for (int i = 0; i < Pack; i++) x[i] = __uint_as_float(0x7fc00000u);
    store(y + n * channels + c, x);
  }
}

// ---- backward
// ---------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    embedding_bwd_count_kernel(const int32_t* ids, int64_t rows, int64_t vocabulary, int32_t* count) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n < rows && ids[n] >= 0 && ids[n] < vocabulary) atomicAdd(count + ids[n], 1);
}

constexpr int kScanWarps = 32;

// In place: how often each of V ids occurs becomes where its rows end. Each thread sums its own stretch, then writes
// it.
__global__ void __launch_bounds__(kScanWarps* kWarp) embedding_bwd_ends_kernel(int32_t* ends, int64_t vocabulary) {
  const int64_t length = ceil_div(vocabulary, int64_t{kScanWarps * kWarp});
  const int64_t begin = threadIdx.x * length;
  const int64_t end = begin + length < vocabulary ? begin + length : vocabulary;
  int32_t own = 0;
#pragma unroll 8
  for (int64_t v = begin; v < end; v++) own += ends[v];
  int32_t through = own;  // the sum up to this lane
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t before = __shfl_up_sync(kAllLanes, through, step);
    if (lane_index() >= step) through += before;
  }
  struct Totals {
    int32_t warp[kScanWarps];
  };
  auto& totals = static_smem<Totals, Totals>();
  if (lane_index() == kWarp - 1) totals.warp[warp_index()] = through;
  __syncthreads();
  int32_t next = through - own;
  for (int warp = 0; warp < warp_index(); warp++) next += totals.warp[warp];
#pragma unroll 8
  for (int64_t v = begin; v < end; v++) {
    next += ends[v];
    ends[v] = next;
  }
}

// Where the rows with id v start in the order.
__device__ __forceinline__ int32_t start_of(const int32_t* ends, int64_t v) { return v > 0 ? ends[v - 1] : 0; }

// order[start of v .. ends[v]) becomes the row numbers with id v, ascending.
__global__ void __launch_bounds__(kThreads)
    embedding_bwd_order_kernel(const int32_t* ids, int64_t rows, int64_t vocabulary, const int32_t* ends,
                               int32_t* order) {
  constexpr int kAhead = 16;  // loads in flight
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t first = (blockIdx.x * kWarps + threadIdx.x / kWarp) * kWarp;
  if (first >= vocabulary) return;
  const uint32_t owned = vocabulary - first < kWarp ? static_cast<uint32_t>(vocabulary - first) : kWarp;
  int32_t cursor = lane < owned ? start_of(ends, first + lane) : 0;
  for (int64_t base = 0; base < rows; base += kAhead * kWarp) {
    uint32_t offset[kAhead];  // of the id among those of this warp; a negative id is far beyond them
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      const int64_t n = base + j * kWarp + lane;
      offset[j] = n < rows ? static_cast<uint32_t>(ids[n]) - first : UINT32_MAX;
    }
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      uint32_t left = __ballot_sync(kAllLanes, offset[j] < owned);
      while (left) {  // once for each id that occurs
        const uint32_t chosen = __shfl_sync(kAllLanes, offset[j], __ffs(left) - 1);
        const bool same = offset[j] == chosen;
        const uint32_t alike = __ballot_sync(kAllLanes, same);
        const int32_t to = __shfl_sync(kAllLanes, cursor, static_cast<int>(chosen));
        if (same) order[to + __popc(alike & ((1u << lane) - 1))] = static_cast<int32_t>(base + j * kWarp + lane);
        if (lane == chosen) cursor += __popc(alike);
        left &= ~alike;
      }
    }
  }
}

constexpr int kPacks = 4;  // of a lane in a tile of channels

template <int Pack, typename F, typename G>
__global__ void __launch_bounds__(kThreads)
    embedding_bwd_kernel(const int32_t* ends, const int32_t* order, const F* dy, const G* add, G* dw, int64_t channels,
                         int64_t vocabulary) {
  const int64_t v = int64_t{blockIdx.x} * kWarps + warp_index();
  if (v >= vocabulary) return;
  const int32_t begin = start_of(ends, v), end = ends[v];
  if (begin == end && add == dw) return;
  const int64_t own = (int64_t{blockIdx.y} * kPacks * kWarp + lane_index()) * Pack;
  Raw<Pack, G> before[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; j++) {
    const int64_t c = own + j * kWarp * Pack;
    before[j] = add && c < channels ? fetch<Pack>(add + v * channels + c) : Raw<Pack, G>{};
  }
  float sum[kPacks][Pack] = {};
#pragma unroll 2
  for (int32_t i = begin; i < end; i++) {
    const F* from = dy + order[i] * channels;
#pragma unroll
    for (int j = 0; j < kPacks; j++) {
      const int64_t c = own + j * kWarp * Pack;
      if (c >= channels) continue;
      float x[Pack];
      load(from + c, x);
#pragma unroll
      for (int k = 0; k < Pack; k++) sum[j][k] += x[k];
    }
  }
#pragma unroll
  for (int j = 0; j < kPacks; j++) {
    const int64_t c = own + j * kWarp * Pack;
    if (c >= channels) continue;
    if (add) {
      float x[Pack];
      to_floats(before[j], x);
#pragma unroll
      for (int k = 0; k < Pack; k++) sum[j][k] = x[k] + sum[j][k];
    }
    store(dw + v * channels + c, sum[j]);
  }
}

unsigned blocks_of(int64_t items, int64_t in_a_block) { return static_cast<unsigned>(ceil_div(items, in_a_block)); }

void need_at_most(int64_t size, int64_t limit, const char* what) {
  if (size > limit)
    throw std::runtime_error("there are " + std::to_string(size) + " " + what + ", the limit is " +
                             std::to_string(limit));
}

}  // namespace

void embedding_fwd(Context& context, const embedding_fwd_args& args) {
  with_float_type(args.w.dtype, [&](auto w) {
    with_float_type(args.y.dtype, [&](auto f) {
      using W = decltype(w);
      using F = decltype(f);
      constexpr int P = kPack<W, F>;
      const int64_t rows = args.y.dims[0], channels = args.y.dims[1];
      const bool vector = all_aligned(args.w, args.y) && channels % P == 0;
      launch({blocks_of(rows, kWarps), kThreads, 0, context.stream},
             vector ? embedding_fwd_kernel<P, W, F> : embedding_fwd_kernel<1, W, F>, args.ids.as<int32_t>(),
             args.w.as<W>(), args.y.as<F>(), rows, channels, args.w.dims[0]);
    });
  });
}

void embedding_bwd(Context& context, const embedding_bwd_args& args) {
  const int64_t rows = args.dy.dims[0], channels = args.dy.dims[1], vocabulary = args.dw.dims[0];
  need_at_most(rows, INT32_MAX, "ids");
  need_at_most(vocabulary, INT32_MAX, "rows of dw");
  need_at_most(channels, 65535 * kPacks * kWarp, "channels");  // one tile a block in y
  const auto* ids = args.ids.as<int32_t>();
  auto *ends = args.ends.as<int32_t>(), *order = args.order.as<int32_t>();
  check(cudaMemsetAsync(ends, 0, static_cast<size_t>(vocabulary) * sizeof(int32_t), context.stream), "clearing counts");
  launch({blocks_of(rows, kThreads), kThreads, 0, context.stream}, embedding_bwd_count_kernel, ids, rows, vocabulary,
         ends);
  launch({1, kScanWarps * kWarp, 0, context.stream}, embedding_bwd_ends_kernel, ends, vocabulary);
  launch({blocks_of(vocabulary, kThreads), kThreads, 0, context.stream}, embedding_bwd_order_kernel, ids, rows,
         vocabulary, ends, order);
  with_float_type(args.dy.dtype, [&](auto f) {
    with_float_type(args.dw.dtype, [&](auto g) {
      using F = decltype(f);
      using G = decltype(g);
      constexpr int P = kPack<F, G>;
      const bool vector = all_aligned(args.dy, args.add, args.dw) && channels % P == 0;
      const dim3 grid(blocks_of(vocabulary, kWarps), blocks_of(channels, kPacks * kWarp * (vector ? P : 1)));
      launch({grid, kThreads, 0, context.stream},
             vector ? embedding_bwd_kernel<P, F, G> : embedding_bwd_kernel<1, F, G>, ends, order, args.dy.as<F>(),
             args.add.as<G>(), args.dw.as<G>(), channels, vocabulary);
    });
  });
}

}  // namespace rw::cuda
