// How the kernels of matmul.cu read a quantised b.
#pragma once
#include "gemm.h"

namespace rw::cuda {

// The elements of b in a kernel that goes through memory by pointers: T, or Coded for a quantised one.
template <DType dtype>
struct Coded {};

template <DType dtype>
struct CodedPointer {
  const Quantized* q;
  const QuantizedMaps* maps;
  int64_t at;

  __device__ __forceinline__ CodedPointer operator+(int64_t n) const { return {q, maps, at + n}; }
  __device__ __forceinline__ void operator+=(int64_t n) { at += n; }
  __device__ __forceinline__ float operator[](int i) const {
    float x[1];
    load_quantized<dtype>(*maps, *q, at + i, x);
    return x[0];
  }
};

template <DType dtype, int Count>
__device__ __forceinline__ void load_piece(const CodedPointer<dtype>& p, float (&x)[Count]) {
  load_quantized<dtype>(*p.maps, *p.q, p.at, x);
}

template <typename T>
struct Elements {
  using P = Product;
  using Pointer = const T*;
  __device__ __forceinline__ static Pointer of(const P& p) { return static_cast<const T*>(p.b); }
};
template <DType dtype>
struct Elements<Coded<dtype>> {
  using P = QuantizedProduct<dtype>;
  using Pointer = CodedPointer<dtype>;
  // Every thread of the block calls it.
  __device__ __forceinline__ static Pointer of(const P& p) { return {&p.q, &share_maps(p.maps), 0}; }
};

// Eight elements, rounded.
__device__ __forceinline__ void store_bf16(bf16* p, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(p) =
      make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

// Shared memory of a product that expands its codes, see QuantizedOperand.
template <DType dtype, typename Tile>
struct QuantizedSmem {
  bf16 a[Tile::stages][Tile::m * Tile::k];
  REDZONE(after_a);
  bf16 b[2][Tile::n * Tile::k];
  REDZONE(after_b);
  uint4 codes[2][Tile::n * Tile::k / (dtype == DType::nf4 ? 32 : 16)];
  REDZONE(after_codes);
};

// A quantised b whose rows are whole blocks. Its codes come to shared memory as they are, two tiles ahead; one tile
// ahead, the thread that has copied them expands them into a tile of bf16, swizzled like any other. A tile has Extent
// blocks: those of its rows, or Extent / 64 in each of 64 rows. Two or four threads share a block's 32 or 64 bytes.
// Along: whether b is stored along k.
template <DType dtype, bool Along, int Extent, typename Tile>
struct QuantizedOperand {
  static constexpr int kChunk = dtype == DType::nf4 ? 32 : 16;  // elements in 16 bytes
  static constexpr int kBlock = static_cast<int>(kQuantBlock), kChunks = kBlock / kChunk;
  static constexpr int kStep = Tile::threads / kChunks, kCopies = Extent / kStep;
  static_assert(Tile::k == kBlock && Extent % kStep == 0 && kStep % 32 == 0);

  const Quantized& q;
  const QuantizedMaps& maps;
  float mean;
  int row_blocks;     // in a row of the matrix
  int64_t block;      // the first one of the tile that is copied next
  int rows, columns;  // of the matrix, from there on
  // What the scales of the tile that is expanded next are made of.
  uint32_t absmax[kCopies];
  float scale[kCopies];

  __device__ __forceinline__ QuantizedOperand(const QuantizedProduct<dtype>& p, const QuantizedMaps& maps, int first,
                                              int end, int k, int k_end)
      : q(p.q), maps(maps), mean(dtype == DType::nf4 ? *p.q.mean : 0.0f) {
    const int row = Along ? first : k, column = Along ? k : first;
    row_blocks = static_cast<int>(p.b_stride) / kBlock;
    block = int64_t{row} * row_blocks + column / kBlock;
    rows = (Along ? end : k_end) - row;
    columns = (Along ? k_end : end) - column;
  }

  // The thread's i-th block of a tile, and of the tile `before` tiles before the one that is copied next.
  __device__ __forceinline__ static int item(int i) { return static_cast<int>(threadIdx.x) / kChunks + i * kStep; }
  __device__ __forceinline__ static int row_of(int i) { return Along ? item(i) : item(i) % Tile::k; }
  __device__ __forceinline__ static int segment_of(int i) { return Along ? 0 : item(i) / Tile::k; }
  __device__ __forceinline__ int64_t block_of(int i, int before) const {
    return block + int64_t{row_of(i) - (Along ? 0 : before * Tile::k)} * row_blocks + segment_of(i) -
           (Along ? before : 0);
  }
  __device__ __forceinline__ bool is_inside(int i, int before) const {
    return row_of(i) < rows + (Along ? 0 : before * Tile::k) &&
           segment_of(i) * kBlock < columns + (Along ? before * Tile::k : 0);
  }

  __device__ __forceinline__ void copy(uint4* codes) const {
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
#pragma unroll
    for (int i = 0; i < kCopies; i++)
      cp_async_16(codes + i * Tile::threads + threadIdx.x, q.codes + (block_of(i, 0) * kChunks + chunk) * 16,
                  is_inside(i, 0));
  }

  __device__ __forceinline__ void advance() {
    if constexpr (Along)
      block++, columns -= Tile::k;
    else
      block += int64_t{Tile::k} * row_blocks, rows -= Tile::k;
  }

  // Asks for the scales of the tile `before` tiles before the one that is copied next. Outside of the matrix anything
  // finite does: there a is 0, or c is not stored.
  __device__ __forceinline__ void fetch_scales(int before) {
#pragma unroll
    for (int i = 0; i < kCopies; i++) {
      const bool inside = is_inside(i, before);
      const int64_t at = block_of(i, before);
      if constexpr (dtype == DType::nf4) {
        absmax[i] = inside ? q.absmax[at] : 0;
        scale[i] = inside ? q.scales[at / kScaleGroup] : 0.0f;
      } else {
        scale[i] = inside ? q.scales[at] : 0.0f;
      }
    }
  }

  // Part `Part` of `Parts` of a thread's copies.
  template <int Part, int Parts>
  __device__ __forceinline__ void expand(const uint4* codes, bf16* tile) const {
#pragma unroll
    for (int i = Part * kCopies / Parts; i < (Part + 1) * kCopies / Parts; i++) {
      float factor = scale[i];
      if constexpr (dtype == DType::nf4) factor = kept_absmax(maps.absmax[absmax[i]], scale[i], mean);
      const uint4 chunk = codes[i * Tile::threads + threadIdx.x];
      const uint32_t word[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
      const int first = segment_of(i) * (kBlock / 8) + static_cast<int>(threadIdx.x) % kChunks * (kChunk / 8);
#pragma unroll
      for (int piece = 0; piece < kChunk / 8; piece++) {
        float x[8];
        constexpr int kWords = 32 / kChunk;  // of a piece: 1 or 2
#pragma unroll
        for (int part = 0; part < kWords; part++)
          decode<dtype, 8 / kWords>(maps, word[kWords * piece + part], factor, x + 8 / kWords * part);
        store_bf16(tile + swizzled < Along ? Tile::k : Extent > (row_of(i), first + piece), x);
      }
    }
  }
};

// Any other quantised b: element by element into tiles of bf16, in the same way as a matrix of odd rows.
template <DType dtype, bool Along, int Extent, typename Tile>
struct ScatteredOperand {
  static constexpr int kColumns = Along ? Tile::k : Extent, kRows = Along ? Extent : Tile::k;
  static constexpr int kPieces = kColumns / 8, kRowStep = Tile::threads / kPieces;
  static_assert(kRowStep % 8 == 0 && kRows % kRowStep == 0, "the swizzle is the same for all rows of a thread");

  const Quantized& q;
  const QuantizedMaps& maps;
  int64_t stride, from;  // this thread's first element of the next tile
  int rows, columns;     // of the matrix, from there on

  __device__ __forceinline__ ScatteredOperand(const QuantizedProduct<dtype>& p, const QuantizedMaps& maps, int first,
                                              int end, int k, int k_end)
      : q(p.q), maps(maps), stride(p.b_stride) {
    const int row = (Along ? first : k) + static_cast<int>(threadIdx.x) / kPieces;
    const int column = (Along ? k : first) + static_cast<int>(threadIdx.x) % kPieces * 8;
    from = row * stride + column;
    rows = (Along ? end : k_end) - row;
    columns = (Along ? k_end : end) - column;
  }

  __device__ __forceinline__ void copy(bf16* tile) const {
    bf16* place = tile + swizzled<kColumns>(static_cast<int>(threadIdx.x) / kPieces, threadIdx.x % kPieces);
#pragma unroll 1
    for (int row = 0; row < kRows; row += kRowStep) {
      float x[8];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float one[1] = {};
        if (row < rows && j < columns) load_quantized<dtype>(maps, q, from + row * stride + j, one);
        x[j] = one[0];
      }
      store_bf16(place + row * kColumns, x);
    }
  }

  __device__ __forceinline__ void advance() {
    from += Along ? kColumns : kRows * stride;
    (Along ? columns : rows) -= Tile::k;
  }
};

}  // namespace rw::cuda
