#include "plan.h"

#include <cstring>
#include <stdexcept>

#include "ops.h"

namespace rw {
namespace {

class Reader {
 public:
  Reader(const double* words, size_t count) : words_(words), count_(count) {}
  bool done() const { return at_ == count_; }
  double real() {
    if (at_ == count_) throw std::runtime_error("the record ends in the middle of an operation");
    return words_[at_++];
  }
  int64_t integer() {
    const double value = real();
    if (!(value >= -1 && value <= 9007199254740991.0) || value != static_cast<double>(static_cast<int64_t>(value)))
      throw std::runtime_error("the record holds a number that is no valid size or index");
    return static_cast<int64_t>(value);
  }

 private:
  const double* words_;
  size_t count_;
  size_t at_ = 0;
};

constexpr int64_t kMostBytes = int64_t{1} << 58;

Tensor read_tensor(Reader& reader, const std::vector<Memory>& buffers, const char* op, const FieldInfo& field) {
  Tensor tensor = {};
  const int64_t buffer = reader.integer();
  if (buffer < 0) {
    if (field.field != Field::optional) throw std::runtime_error(std::string(op) + ": " + field.name + " is missing");
    return tensor;
  }
  const int64_t offset = reader.integer(), dtype = reader.integer(), rank = reader.integer();
  bool fits = buffer < static_cast<int64_t>(buffers.size()) && offset >= 0 && dtype >= 0 && dtype < kDTypes &&
              rank >= 0 && rank <= 4;
  tensor.dtype = static_cast<DType>(dtype);
  tensor.ndim = static_cast<int32_t>(rank);
  int64_t most = kMostBytes;  // no product of dims that are within it overflows
  for (int64_t i = 0; fits && i < rank; i++) {
    tensor.dims[i] = reader.integer();
    fits = tensor.dims[i] > 0 && tensor.dims[i] <= most;
    if (fits) most /= tensor.dims[i];
  }
  fits = fits && offset <= kMostBytes && (!is_quantized(tensor.dtype) || offset % kQuantizedAlignment == 0) &&
         offset + tensor.bytes() <= static_cast<int64_t>(buffers[buffer].bytes);
  if (!fits) throw std::runtime_error(std::string(op) + ": " + field.name + " does not lie inside its buffer");
  tensor.data = static_cast<char*>(buffers[buffer].base) + offset;
  return tensor;
}

template <typename T>
void put(std::byte* struct_start, size_t& offset, const T& value) {
  offset = (offset + alignof(T) - 1) / alignof(T) * alignof(T);
  std::memcpy(struct_start + offset, &value, sizeof(T));
  offset += sizeof(T);
}

}  // namespace

DecodedPlan decode_plan(std::string name, const double* words, size_t count, const std::vector<Memory>& buffers) {
  // Two passes: the first finds the size of all argument structs together.
  DecodedPlan plan;
  plan.name = std::move(name);
  size_t total = 0;
  for (int pass = 0; pass < 2; pass++) {
    Reader reader(words, count);
    size_t at = 0;
    while (!reader.done()) {
      const int64_t op = reader.integer();
      if (op < 0 || op >= static_cast<int64_t>(Op::count)) throw std::runtime_error("the record holds no such opcode");
      const OpInfo& info = op_info[op];
      std::byte* start = pass ? plan.args.get() + at : nullptr;
      size_t offset = 0;
      for (size_t i = 0; i < info.field_count; i++) {
        const FieldInfo& field = info.fields[i];
        if (field.field == Field::integer) {
          const int64_t value = reader.integer();
          if (pass) put(start, offset, value);
        } else if (field.field == Field::real) {
          const double value = reader.real();
          if (pass) put(start, offset, value);
        } else {
          const Tensor tensor = read_tensor(reader, buffers, info.name, field);
          if (pass) put(start, offset, tensor);
        }
      }
      if (pass) plan.commands.push_back({static_cast<uint32_t>(op), start});
      at += (info.args_size + 15) / 16 * 16;
    }
    total = at;
    if (pass == 0) {
      plan.args = std::make_unique<std::byte[]>(total);
    }
  }
  return plan;
}

}  // namespace rw
