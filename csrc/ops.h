// Expands the table (ops.def): argument structs, opcodes, the description that the decoder reads, and its hash.
#pragma once
#include <cstddef>
#include <cstdint>

namespace rw {

enum class DType : uint32_t { f32, bf16, i32, u8, u16, nf4, int8 };
constexpr int64_t kDTypes = 7, kPlainDTypes = 5;  // the last two are quantised: quantized.h

// Of one element; only plain ones have bytes of their own.
constexpr int64_t dtype_bytes(DType t) { return t == DType::u8 ? 1 : t == DType::bf16 || t == DType::u16 ? 2 : 4; }
constexpr bool is_float(DType t) { return t == DType::f32 || t == DType::bf16; }
constexpr bool is_quantized(DType t) { return t == DType::nf4 || t == DType::int8; }
constexpr int64_t kQuantizedAlignment = 16;  // of a quantised tensor's place
constexpr int64_t quantized_bytes(DType t, int64_t elements) {
  const int64_t blocks = (elements + 63) / 64, groups = (blocks + 255) / 256;
  return t == DType::nf4 ? 32 * blocks + (blocks + 3) / 4 * 4 + 4 * groups + 4 : 68 * blocks;
}

// A dense, row-major tensor on a device. `data` is null where an optional tensor is absent.
struct Tensor {
  void* data;
  DType dtype;
  int32_t ndim;
  int64_t dims[4];

  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) n *= dims[i];
    return n;
  }
  int64_t bytes() const { return is_quantized(dtype) ? quantized_bytes(dtype, size()) : size() * dtype_bytes(dtype); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  explicit operator bool() const { return data != nullptr; }
};

// One struct per row: the tensors and scalars in the order of the table.
#define IN(name, dtype, dims) Tensor name;
#define OUT(name, dtype, dims) Tensor name;
#define INOUT(name, dtype, dims) Tensor name;
#define OPT(name, dtype, dims) Tensor name;
#define OPT_INOUT(name, dtype, dims) Tensor name;
#define OPT_OUT(name, dtype, dims) Tensor name;
#define TMP(name, dtype, dims) Tensor name;
#define INT(name) int64_t name;
#define FLT(name) double name;
#define FLOPS(expression)
#define OP(name, row)  \
  struct name##_args { \
    row                \
  };
#include "ops.def"
#undef OP

enum class Op : uint32_t {
#define OP(name, row) name,
#include "ops.def"
#undef OP
  count
};

#undef IN
#undef OUT
#undef INOUT
#undef OPT
#undef OPT_INOUT
#undef OPT_OUT
#undef TMP
#undef INT
#undef FLT

// What the decoder needs of a field: its kind and where it lies in the argument struct.
enum class Field : uint8_t { tensor, optional, integer, real };
struct FieldInfo {
  const char* name;
  Field field;
};
struct OpInfo {
  const char* name;
  size_t args_size;
  const FieldInfo* fields;
  size_t field_count;
};

#define IN(name, dtype, dims) {#name, Field::tensor},
#define OUT(name, dtype, dims) {#name, Field::tensor},
#define INOUT(name, dtype, dims) {#name, Field::tensor},
#define OPT(name, dtype, dims) {#name, Field::optional},
#define OPT_INOUT(name, dtype, dims) {#name, Field::optional},
#define OPT_OUT(name, dtype, dims) {#name, Field::optional},
#define TMP(name, dtype, dims) {#name, Field::tensor},
#define INT(name) {#name, Field::integer},
#define FLT(name) {#name, Field::real},
#define OP(name, row) inline constexpr FieldInfo name##_fields[] = {row};
#include "ops.def"
#undef OP

inline constexpr OpInfo op_info[] = {
#define OP(name, row) {#name, sizeof(name##_args), name##_fields, sizeof(name##_fields) / sizeof(FieldInfo)},
#include "ops.def"
#undef OP
};

#undef IN
#undef OUT
#undef INOUT
#undef OPT
#undef OPT_INOUT
#undef OPT_OUT
#undef TMP
#undef INT
#undef FLT

// FNV-1a over the text of all rows: a library or an emitter built from another table is refused by this number.
constexpr uint64_t hash_text(const char* text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (; *text; text++) hash = (hash ^ static_cast<uint8_t>(*text)) * 0x100000001b3u;
  return hash;
}
#define OP(name, row) #name " " #row "\n"
inline constexpr uint64_t table_hash = hash_text(
#include "ops.def"
);
#undef OP
#undef FLOPS

}  // namespace rw
