// What the memory-bound ops share: accesses of some elements as floats, and one loop over flat tensors.
//
// A pack is the Width elements that a thread handles at a time, such that the widest of an op's tensors is accessed in
// 16 bytes: 8 elements where all are bf16, else 4. The lanes of a warp then read and write whole sectors of 32 bytes.
#pragma once
#include "ptx.h"

namespace rw::cuda {

// Elements in a pack of tensors of these types.
template <typename... T>
constexpr int kPack = (std::is_same_v<T, bf16> && ...) ? 8 : 4;

// A pack as it lies in memory: of bf16, half the registers that its floats need.
template <int Width, typename T>
struct Raw {
  uint32_t word[ceil_div(Width * static_cast<int>(sizeof(T)), 4)];
};

// Width elements from p on: one access of Width * sizeof(T) bytes (two of 16 where that is 32), to which p must be
// aligned.
template <int Width, typename T>
__device__ __forceinline__ Raw<Width, T> fetch(const T* p) {
  constexpr int kWords = Width * static_cast<int>(sizeof(T)) / 4;
  Raw<Width, T> raw;
  if constexpr (Width == 1) {
    if constexpr (std::is_same_v<T, bf16>)
      raw.word[0] = p->bits;
    else if constexpr (std::is_same_v<T, float>)
      raw.word[0] = __float_as_uint(*p);
    else
      raw.word[0] = *p;
  } else if constexpr (kWords == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    raw.word[0] = v.x, raw.word[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = reinterpret_cast<const uint4*>(p)[i / 4];
      raw.word[i] = v.x, raw.word[i + 1] = v.y, raw.word[i + 2] = v.z, raw.word[i + 3] = v.w;
    }
  }
  return raw;
}

// The first `count` of the Width elements from p on, zeros for the others. With Vector all of them exist where one
// does, and p is aligned; without it they are read one by one. So an element belongs to the same thread either way, and
// sums have the same bits wherever a tensor starts.
template <bool Vector, int Width, typename T>
__device__ __forceinline__ Raw<Width, T> fetch_some(const T* p, int64_t count) {
  Raw<Width, T> raw = {};
  if (count <= 0) return raw;
  if constexpr (Vector) {
    raw = fetch<Width>(p);
  } else {
#pragma unroll
    for (int i = 0; i < Width; i++) {
      const int at = i * static_cast<int>(sizeof(T));
      raw.word[at / 4] |= (i < count ? fetch<1>(p + i).word[0] : 0) << (8 * (at % 4));
    }
  }
  return raw;
}

template <int Width, typename T>
__device__ __forceinline__ void to_floats(const Raw<Width, T>& raw, float (&x)[Width]) {
#pragma unroll
  for (int i = 0; i < Width; i++) {
    if constexpr (std::is_same_v<T, bf16>)
      x[i] = __uint_as_float(i % 2 ? raw.word[i / 2] & 0xffff0000u : raw.word[i / 2] << 16);
    else
      x[i] = __uint_as_float(raw.word[i]);
  }
}

template <int Width, typename T>
__device__ __forceinline__ void load(const T* p, float (&x)[Width]) {
  to_floats(fetch<Width>(p), x);
}

template <bool Vector, int Width, typename T>
__device__ __forceinline__ void load_some(const T* p, int64_t count, float (&x)[Width]) {
  to_floats(fetch_some<Vector, Width>(p, count), x);
}

// What fetch reads, back to where it was; as there, one access where Width > 1.
template <int Width, typename T>
__device__ __forceinline__ void put(T* p, const Raw<Width, T>& raw) {
  constexpr int kWords = Width * static_cast<int>(sizeof(T)) / 4;
  if constexpr (Width == 1) {
    if constexpr (std::is_same_v<T, bf16>)
      p->bits = static_cast<uint16_t>(raw.word[0]);
    else if constexpr (std::is_same_v<T, float>)
      *p = __uint_as_float(raw.word[0]);
    else
      *p = static_cast<T>(raw.word[0]);
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(p) = make_uint2(raw.word[0], raw.word[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4)
      reinterpret_cast<uint4*>(p)[i / 4] = make_uint4(raw.word[i], raw.word[i + 1], raw.word[i + 2], raw.word[i + 3]);
  }
}

// All elements; with Vector in one access, to which p is aligned, else one by one.
template <bool Vector, int Width, typename T>
__device__ __forceinline__ void put_all(T* p, const Raw<Width, T>& raw) {
  if constexpr (Vector) {
    put(p, raw);
  } else {
#pragma unroll
    for (int i = 0; i < Width; i++) {
      const int at = i * static_cast<int>(sizeof(T));
      put(p + i, Raw<1, T>{{raw.word[at / 4] >> (8 * (at % 4))}});
    }
  }
}

template <int Width, typename T>
__device__ __forceinline__ void store(T* p, const float (&x)[Width]) {
  if constexpr (Width == 1) {
    *p = from_float<T>(x[0]);
  } else {
    Raw<Width, T> raw;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(raw.word) / 4); i++) {
      if constexpr (std::is_same_v<T, bf16>)
        raw.word[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
      else
        raw.word[i] = __float_as_uint(x[i]);
    }
    put(p, raw);
  }
}

// Stores the first `count` of the Width elements; Vector as above.
template <bool Vector, int Width, typename T>
__device__ __forceinline__ void store_some(T* p, int64_t count, const float (&x)[Width]) {
  if constexpr (Vector) {
    if (count > 0) store(p, x);
  } else {
#pragma unroll
    for (int i = 0; i < Width; i++)
      if (i < count) p[i] = from_float<T>(x[i]);
  }
}

// ---- flat tensors
// -----------------------------------------------------------------------------------------------------

template <int N>
struct Width {
  static constexpr int value = N;
};

// body(Width<W>{}, at) for every pack, then for what is left behind the last one element by element, spread over the
// threads of the grid.
template <int W, typename Body>
__device__ __forceinline__ void for_each_pack(int64_t size, Body&& body) {
  const int64_t threads = int64_t{gridDim.x} * blockDim.x, thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t packs = size / W;
  for (int64_t pack = thread; pack < packs; pack += threads) body(Width<W>{}, pack * W);
  if (W > 1 && packs * W + thread < size) body(Width<1>{}, packs * W + thread);
}

// 16-byte accesses are possible to all of these tensors; those that are absent do not matter.
template <typename... Tensors>
bool all_aligned(const Tensors&... tensors) {
  return (aligned(tensors.data, 16) && ...);
}

// 1 / (1 + e^-g). e^-g is infinite for g < -88.7, which gives 0: the right limit. Neither step is wrong by more than a
// unit in the last place (so no __expf); a division rounded to nearest would make the arithmetic, not the memory, the
// limit on Hopper. A quarter of the sum, so that its reciprocal is not denormal before the sum is infinite.
__device__ __forceinline__ float sigmoid(float g) { return 0.25f * reciprocal_approx(0.25f * expf(-g) + 0.25f); }

constexpr int kFlatThreads = 256;

// Where a kernel over `items` packs is launched: `resident` blocks an SM, as many as its __launch_bounds__ lets it hold
// at a time, or fewer where there is less to do.
inline Launch flat(const Context& context, int64_t items, int resident, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const int64_t needed = ceil_div(items, int64_t{kFlatThreads}), most = int64_t{context.sm_count} * resident;
  const int64_t blocks = needed < 1 ? 1 : needed < most ? needed : most;
  return {static_cast<unsigned>(blocks), kFlatThreads, 0, context.stream, file, line};
}

}  // namespace rw::cuda
