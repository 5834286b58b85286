// What the attention kernels share: tiles in shared memory, their products by a warp, rotations.
//
// A warp holds results in the layout of mma's accumulators, for f32 inputs too: c[i][j] is the 16x8 block of rows 16 i
// .. and columns 8 j .., of which lane (g, t) = (lane / 4, lane % 4) has (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t
// + 1). So one kernel serves both dtypes: bf16 products on the tensor cores, f32 products as f32 multiply-adds.
//
// Head dims are padded with zeros to kD = 64, 128 or 256, in shared memory only.
#pragma once
#include <initializer_list>

#include "ptx.h"

namespace rw::cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kMaxHeadDim = 256;

// ---- tiles
// ------------------------------------------------------------------------------------------------------------

// A tile is rows of kD elements, in 16-byte chunks. Chunk c of row r lies in the place of chunk c ^ r % 8: the same
// chunk of 8 rows in a row falls into 8 different groups of banks (ldmatrix, and accumulators written as floats).
template <typename T, int kD>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * kD + (chunk ^ (row & 7)) * kVector<T>;
}

template <typename T, int kD>
__device__ __forceinline__ int element_at(int row, int column) {
  return chunk_at<T, kD>(row, column / kVector<T>) + column % kVector<T>;
}

// Rows 0 .. rows - 1 of D elements, `stride` apart, into a tile; zeros in what is left of kRows and kD. `vector`: by
// cp.async, which the caller commits and waits for.
template <int kRows, int kD, int kThreads, typename T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t stride, int rows, int D, bool vector) {
  constexpr int kChunks = kD / kVector<T>;
  static_assert(kThreads % kChunks == 0 || kChunks % kThreads == 0, "a thread keeps to its columns");
  if (vector) {
    // A thread's copies go down a column of chunks, kStep rows at a time: one addition for an address.
    constexpr int kStep = kThreads < kChunks ? 1 : kThreads / kChunks;
    const int thread = thread_index_anew(), own_row = thread / kChunks;
#pragma unroll
    for (int chunk = thread % kChunks, i = 0; i < kChunks; chunk += kThreads, i += kThreads) {
      const T* own = from + own_row * stride + chunk * kVector<T>;
      const int left = chunk * kVector<T> < D ? rows - own_row : 0;
#pragma unroll
      for (int row = 0; row < kRows; row += kStep, own += kStep * stride)
        cp_async_16(tile + chunk_at<T, kD>(own_row + row, chunk), own, row < left);
    }
    return;
  }
  constexpr int kNext = (kThreads - 1) * kVector<T> + 1;  // from the end of a chunk to this thread's next one
#pragma unroll 1
  for (int at = threadIdx.x * kVector<T>; at < kRows * kD; at += at % kVector<T> == kVector<T> - 1 ? kNext : 1) {
    T x = {};
    if (at / kD < rows && at % kD < D) x = from[at / kD * stride + at % kD];
    tile[element_at<T, kD>(at / kD, at % kD)] = x;
  }
}

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Puts zeros in the place of infinities and NaN in what this thread itself has loaded with load_tile, and waited for.
// Returns whether there were any. Masked weights are zeros, and zero times infinity would be NaN: a tile that some row
// does not see whole is multiplied without them, and add_not_finite makes up for those that a row does see.
template <int kRows, int kD, int kThreads, typename T>
__device__ __forceinline__ bool clean_own_part(T* tile) {
  constexpr int kChunks = kD / kVector<T>;
  constexpr uint32_t kMagnitude = sizeof(T) == 2 ? 0x7fff7fffu : 0x7fffffffu;
  constexpr uint32_t kCarry = sizeof(T) == 2 ? 0x00800080u : 0x00800000u;  // an exponent of all ones reaches the sign
  bool found = false;
#pragma unroll 1
  for (int at = threadIdx.x; at < kRows * kChunks; at += kThreads) {
    T* chunk = tile + chunk_at<T, kD>(at / kChunks, at % kChunks);
    const uint4 x = *reinterpret_cast<const uint4*>(chunk);
    const uint32_t carried = ((x.x & kMagnitude) + kCarry) | ((x.y & kMagnitude) + kCarry) |
                             ((x.z & kMagnitude) + kCarry) | ((x.w & kMagnitude) + kCarry);
    if (!(carried & ~kMagnitude)) continue;
    found = true;
#pragma unroll 1
    for (int i = 0; i < kVector<T>; i++)
      if (!is_finite(to_float(chunk[i]))) chunk[i] = T{};
  }
  return found;
}

// c[row] += factor x[n] for each n < count that the row sees and each element of x[n] that is not finite, where x[n]
// (D) are `stride` apart. sees(r, n): of the lane's r-th row, g + 8 r. A factor of 0 makes all of them NaN: for weights
// of either sign.
template <int kD, int kRowBlocks, typename T, typename Sees>
__device__ __forceinline__ void add_not_finite(float (&c)[kRowBlocks][kD / 8][4], const T* x, int64_t stride, int count,
                                               int D, float factor, Sees&& sees) {
  const int t = lane_index() % 4;
#pragma unroll 1
  for (int n = 0; n < count; n++)
#pragma unroll
    for (int j = 0; j < kD / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int column = 8 * j + 2 * t + e;
        const float value = column < D ? to_float(x[n * stride + column]) : 0;
        if (is_finite(value)) continue;
#pragma unroll
        for (int r = 0; r < 2 * kRowBlocks; r++)
          if (sees(r, n)) c[r / 2][j][r % 2 * 2 + e] += factor * value;
      }
}

// Whether any thread has ever said yes. begin() and say() come before barriers, any() after the last of them.
template <int kWarps>
struct Ever {
  uint32_t warp[kWarps];

  __device__ __forceinline__ void begin() {
    if (lane_index() == 0) warp[warp_index()] = 0;
  }
  __device__ __forceinline__ void say(bool yes) {
    if (__any_sync(kAllLanes, yes) && lane_index() == 0) warp[warp_index()] = 1;
  }
  __device__ __forceinline__ bool any() const {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kWarps; i++) found |= warp[i];
    return found;
  }
};

// ---- products
// ---------------------------------------------------------------------------------------------------------

// In a struct, because nvcc 12.4 ends with an internal error where the alias is the array itself.
template <int kRowBlocks, int kColumns>
struct AccumulatorsOf {
  using Type = float[kRowBlocks][kColumns / 8][4];
};
template <int kRowBlocks, int kColumns>
using Accumulators = typename AccumulatorsOf<kRowBlocks, kColumns>::Type;

template <int kRowBlocks, int kBlocks>
__device__ __forceinline__ void set_zero(float (&c)[kRowBlocks][kBlocks][4]) {
#pragma unroll
  for (int i = 0; i < kRowBlocks; i++)
#pragma unroll
    for (int j = 0; j < kBlocks; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) c[i][j][e] = 0;
}

// Where ldmatrix of 16 columns from 16 k on reads a row of a tile: chunk 2 k + high, written so that all that depends
// on the lane is one offset.
template <int kD>
struct LaneRow {
  int offset;

  __device__ __forceinline__ LaneRow(int row, int high) : offset(row * kD + (high ^ (row & 7)) * 8) {}
  __device__ __forceinline__ const bf16* at(const bf16* tile, int first_row, int k) const {
    return tile + first_row * kD + k / 4 * 64 + (offset ^ (k % 4 * 16));
  }
};

// c = a b^T, a (16 kRowBlocks, kD) the rows of a tile from row0 on, b (kColumns, kD) a tile.
template <int kD, int kRowBlocks, int kBlocks>
__device__ __forceinline__ void multiply_nt(float (&c)[kRowBlocks][kBlocks][4], const bf16* a, int row0,
                                            const bf16* b) {
  set_zero(c);
  const int lane = lane_index();
  const LaneRow<kD> left_row(row0 + lane % 16, lane / 16), right_row(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kD / 16; k++) {
    uint32_t left[kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < kRowBlocks; i++) ldmatrix_x4(left[i], left_row.at(a, 16 * i, k));
#pragma unroll
    for (int j = 0; j < kBlocks / 2; j++) {
      uint32_t right[4];
      ldmatrix_x4(right, right_row.at(b, 16 * j, k));
#pragma unroll
      for (int i = 0; i < kRowBlocks; i++) {
        mma_16x8x16(c[i][2 * j], left[i], right[0], right[1]);
        mma_16x8x16(c[i][2 * j + 1], left[i], right[2], right[3]);
      }
    }
  }
}

// In f32 four products make one term: fewer roundings than in a chain of all.
template <int kD, int kRowBlocks, int kBlocks>
__device__ __forceinline__ void multiply_nt(float (&c)[kRowBlocks][kBlocks][4], const float* a, int row0,
                                            const float* b) {
  set_zero(c);
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
  for (int chunk = 0; chunk < kD / 4; chunk++) {
    float4 left[kRowBlocks][2];
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; i++)
      left[i / 2][i % 2] = *reinterpret_cast<const float4*>(a + chunk_at<float, kD>(row0 + 8 * i + g, chunk));
#pragma unroll
    for (int j = 0; j < kBlocks; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float4 y = *reinterpret_cast<const float4*>(b + chunk_at<float, kD>(8 * j + 2 * t + e, chunk));
#pragma unroll
        for (int i = 0; i < 2 * kRowBlocks; i++) {
          const float4 x = left[i / 2][i % 2];
          c[i / 2][j][i % 2 * 2 + e] += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
        }
      }
  }
}

// Room for the left operands of multiply_nn in f32, (rows of the block, kColumns) with rows of at least 8 chunks; bf16
// keeps them in registers.
template <typename T, int kRows, int kColumns>
struct Weights {
  static constexpr int kStride = kColumns < 32 ? 32 : kColumns;
  float value[kRows * kStride];
};
template <int kRows, int kColumns>
struct Weights<bf16, kRows, kColumns> {};

// c += a b, a (16 kRowBlocks, kColumns) in registers and rounded to T, b (kColumns, kD) a tile.
template <int kD, int kRowBlocks, int kDepthBlocks, int kRows>
__device__ __forceinline__ void multiply_nn(float (&c)[kRowBlocks][kD / 8][4],
                                            const float (&a)[kRowBlocks][kDepthBlocks][4], const bf16* b,
                                            Weights<bf16, kRows, kDepthBlocks * 8>&) {
  const int lane = lane_index();
  const LaneRow<kD> right_row(lane % 16, lane / 16);
  uint32_t left[kRowBlocks][kDepthBlocks / 2][4];
#pragma unroll
  for (int i = 0; i < kRowBlocks; i++)
#pragma unroll
    for (int k = 0; k < 2 * kDepthBlocks; k++)
      left[i][k / 4][k % 4] = pack_bf16(a[i][k / 2][k % 2 * 2], a[i][k / 2][k % 2 * 2 + 1]);
#pragma unroll
  for (int k = 0; k < kDepthBlocks / 2; k++)
#pragma unroll
    for (int j = 0; j < kD / 16; j++) {
      uint32_t right[4];
      ldmatrix_x4_trans(right, right_row.at(b, 16 * k, j));
#pragma unroll
      for (int i = 0; i < kRowBlocks; i++) {
        mma_16x8x16(c[i][2 * j], left[i][k], right[0], right[1]);
        mma_16x8x16(c[i][2 * j + 1], left[i][k], right[2], right[3]);
      }
    }
}

template <int kD, int kRowBlocks, int kDepthBlocks, int kRows>
__device__ __forceinline__ void multiply_nn(float (&c)[kRowBlocks][kD / 8][4],
                                            const float (&a)[kRowBlocks][kDepthBlocks][4], const float* b,
                                            Weights<float, kRows, kDepthBlocks * 8>& weights) {
  constexpr int kStride = Weights<float, kRows, kDepthBlocks * 8>::kStride;
  const int g = lane_index() / 4, t = lane_index() % 4;
  float* own = weights.value + warp_index() * 16 * kRowBlocks * kStride;
  // Nobody reads the last product's any more: between two of them there is a barrier of the block.
#pragma unroll
  for (int i = 0; i < 2 * kRowBlocks; i++)
#pragma unroll
    for (int j = 0; j < kDepthBlocks; j++)
      *reinterpret_cast<float2*>(own + element_at<float, kStride>(8 * i + g, 8 * j + 2 * t)) =
          make_float2(a[i / 2][j][i % 2 * 2], a[i / 2][j][i % 2 * 2 + 1]);
  __syncwarp();
  // A sum of the tile's products, 16 columns at a time, is one term of c: a long sum has few roundings.
#pragma unroll
  for (int j = 0; j < kD / 8; j += 2) {
    float sum[2][2 * kRowBlocks][2] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < 2 * kDepthBlocks; chunk++) {
      float4 left[2 * kRowBlocks];
#pragma unroll
      for (int i = 0; i < 2 * kRowBlocks; i++)
        left[i] = *reinterpret_cast<const float4*>(own + chunk_at<float, kStride>(8 * i + g, chunk));
#pragma unroll
      for (int n = 0; n < 2; n++) {
        float2 right[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
          right[k] = *reinterpret_cast<const float2*>(b + element_at<float, kD>(4 * chunk + k, 8 * (j + n) + 2 * t));
#pragma unroll
        for (int i = 0; i < 2 * kRowBlocks; i++) {
          const float4 x = left[i];
          sum[n][i][0] += x.x * right[0].x + x.y * right[1].x + x.z * right[2].x + x.w * right[3].x;
          sum[n][i][1] += x.x * right[0].y + x.y * right[1].y + x.z * right[2].y + x.w * right[3].y;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 2 * kRowBlocks; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) c[i / 2][j + n][i % 2 * 2 + e] += sum[n][i][e];
  }
}

// ---- rows
// -------------------------------------------------------------------------------------------------------------

// n elements as floats, and back: 1, or as many as 16 bytes of bf16 or f32 are (cos and sin of 8 elements: 32 bytes).
template <int n, typename T>
__device__ __forceinline__ void load_unit(const T* p, float (&x)[n]) {
  if constexpr (n == kVector<T>) {
    load_vector(p, x);
  } else if constexpr (n == 1) {
    x[0] = to_float(*p);
  } else {
    static_assert(sizeof(T) == 4 && n == 8);
    const float4 low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }
}

__device__ __forceinline__ void store_pair(float* p, float x, float y) {
  *reinterpret_cast<float2*>(p) = make_float2(x, y);
}
__device__ __forceinline__ void store_pair(bf16* p, float x, float y) {
  *reinterpret_cast<uint32_t*>(p) = pack_bf16(x, y);
}

template <int n, typename T>
__device__ __forceinline__ void store_unit(T* p, const float (&x)[n]) {
  if constexpr (n == 1)
    *p = from_float<T>(x[0]);
  else
    store_vector(p, x);
}

// The rotary embedding of n pairs (x[i], y[i]), times `factor`; with sin negated its transpose.
template <int n>
__device__ __forceinline__ void rotate_pairs(float (&x)[n], float (&y)[n], const float (&cos)[n], const float (&sin)[n],
                                             float factor) {
#pragma unroll
  for (int i = 0; i < n; i++) {
    const float a = x[i], b = y[i];
    x[i] = (a * cos[i] - b * sin[i]) * factor;
    y[i] = (b * cos[i] + a * sin[i]) * factor;
  }
}

// ---- functions of attention.cu
// ----------------------------------------------------------------------------------------

// to[token] = factor R from[token], rows of heads * D elements; with `slot`, to is a cache (B,heads,slots,D), and each
// head goes to that slot of its own. With `copied`, also copy_to = copied, likewise. With `heads`, only that many of
// from's heads, those from first_head on.
struct Rotation {
  const Tensor &from, &cos, &sin, &pos;
  void* to;
  float factor = 1;
  int64_t first_head = 0, heads = 0;
  const int32_t* slot = nullptr;
  int64_t slots = 0;
  const void* copied = nullptr;
  void* copy_to = nullptr;
};
void rotate_rows(Context& context, const Rotation& rotation);

// The factor scale log2(e) goes into q when it is rotated, so that weights are powers of 2 of products, and no product
// is multiplied again. f32 holds the factor with an error; the same error in what leads back makes up for it.
struct Factor {
  float scale, value;
  float to_base_2, from_base_2;  // about log2(e) and ln(2)

  explicit Factor(double exact) : scale(static_cast<float>(exact)), value(scale * kLog2E) {
    const double ratio = scale == 0 ? kLog2E : static_cast<double>(value) / scale;
    to_base_2 = static_cast<float>(ratio);
    from_base_2 = static_cast<float>(1 / ratio);
  }
};

// Forward attention: over keys first[t] .. t, or first[t] .. last[t] of S slots where `last` is given. k is rotated; k
// and v are (B,S,K,D), or (B,K,S,D) where `last` is given.
struct Attention {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  void* o = nullptr;
  float* lse = nullptr;  // null where it is not wanted
  const float *cos = nullptr, *sin = nullptr;
  const int32_t *pos = nullptr, *first = nullptr, *last = nullptr;
  int B = 0, T = 0, H = 0, K = 0, D = 0, S = 0;
  Factor factor;

  explicit Attention(double scale) : factor(scale) {}
};
void attend(Context& context, DType dtype, const Attention& attention);

// Whether rows of D elements at these addresses can be read and written as 16 bytes, halves of rows too.
inline bool vectors_fit(DType dtype, int64_t D, std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (!aligned(p, 16)) return false;
  return D * dtype_bytes(dtype) % 32 == 0;
}

// `f` with the padded head dim as std::integral_constant.
template <typename F>
void with_head_dim(int64_t D, F&& f) {
  if (D <= 64) return f(std::integral_constant<int, 64>());
  if (D <= 128) return f(std::integral_constant<int, 128>());
  if (D <= kMaxHeadDim) return f(std::integral_constant<int, 256>());
  throw std::runtime_error("head_dim is " + std::to_string(D) + "; these kernels take up to " +
                           std::to_string(kMaxHeadDim));
}

}  // namespace rw::cuda
