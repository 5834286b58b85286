#include "device.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <system_error>
#include <vector>

#include <unistd.h>

#include "loader.h"

namespace rw {

Device::Device(const std::string& backend, int index, int threads) : backend_(find_backend(backend)) {
  const rw_open_options options = {index, threads};
  if (backend_->open(&options, &handle_) != RW_OK) throw std::runtime_error(backend_->last_error());
  try {
    thread_ = std::thread([this] { work(); });
  } catch (...) {
    backend_->close(handle_);
    throw;
  }
}

Device::~Device() {
  stop();
  backend_->close(handle_);
}

bool Device::submit(std::function<void()> job) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) return false;
    jobs_.push_back(std::move(job));
  }
  wake_.notify_one();
  return true;
}

void Device::stop() {
  std::deque<std::function<void()>> dropped;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    dropped.swap(jobs_);
    cancel_before_ = UINT64_MAX;
    flag_.store(1);
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void Device::work() {
  for (;;) {
    std::function<void()> job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (stopping_) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job();
  }
}

int Device::run(const DecodedPlan& plan, uint64_t ticket) {
  if (ticket <= cancel_before_) return RW_CANCELLED;
  flag_.store(0);
  // cancel() may have come between the two lines above
  if (ticket <= cancel_before_) return RW_CANCELLED;
  const int code = backend_->run(handle_, plan.name.c_str(), plan.commands.data(), plan.commands.size(),
                                 reinterpret_cast<const int32_t*>(&flag_));
  if (code == RW_ERROR) throw std::runtime_error(backend_->last_error());
  return code;
}

std::string Device::open_peer(const std::string& path) {
  if (!backend_->peer_open) throw std::runtime_error(std::string("backend ") + backend_->name + " knows no peer");
  const char* description = "";
  if (backend_->peer_open(handle_, path.c_str(), &description) != RW_OK)
    throw std::runtime_error(backend_->last_error());
  return description;
}

void Device::multiply(const rw_product& product, const std::vector<std::shared_ptr<Buffer>>& matrices, size_t repeats) {
  if (!backend_->peer_multiply) throw std::runtime_error(std::string("backend ") + backend_->name + " knows no peer");
  const auto& [dtype, transpose_a, transpose_b, m, n, k] = product;
  const int64_t sizes[] = {m * k, k * n, m * n};
  std::vector<void*> memory;
  for (const auto& matrix : matrices) {
    const int64_t bytes = sizes[memory.size() % 3] * dtype_bytes(static_cast<DType>(dtype));
    if (static_cast<int64_t>(matrix->bytes()) < bytes)
      throw std::runtime_error("matrix " + std::to_string(memory.size()) + " has " + std::to_string(matrix->bytes()) +
                               " bytes, and needs " + std::to_string(bytes));
    memory.push_back(matrix->base());
  }
  if (memory.empty() || memory.size() % 3 != 0) throw std::runtime_error("matrices come in sets of three");
  if (backend_->peer_multiply(handle_, &product, memory.data(), memory.size() / 3, repeats) != RW_OK)
    throw std::runtime_error(backend_->last_error());
}

Buffer::Buffer(std::shared_ptr<Device> device, size_t bytes, bool host)
    : device_(std::move(device)), bytes_(bytes), host_(host) {
  const rw_backend& backend = device_->backend();
  if ((host ? backend.alloc_host : backend.alloc)(device_->handle(), bytes, &memory_) != RW_OK)
    throw std::runtime_error(backend.last_error());
}

Buffer::Buffer(std::shared_ptr<Device> device, std::unique_ptr<Mapping> file)
    : device_(std::move(device)), file_(std::move(file)), memory_(file_->data()), bytes_(file_->bytes()) {}

Buffer::~Buffer() {
  const rw_backend& backend = device_->backend();
  if (!file_) (host_ ? backend.release_host : backend.release)(device_->handle(), memory_);
}

void Buffer::upload(size_t offset, const void* from, size_t bytes) {
  if (host_)
    std::memcpy(base() + offset, from, bytes);
  else if (device_->backend().upload(device_->handle(), base() + offset, from, bytes) != RW_OK)
    throw std::runtime_error(device_->backend().last_error());
}

void Buffer::download(size_t offset, void* to, size_t bytes) {
  if (host_)
    std::memcpy(to, base() + offset, bytes);
  else if (device_->backend().download(device_->handle(), to, base() + offset, bytes) != RW_OK)
    throw std::runtime_error(device_->backend().last_error());
  check();
}

size_t file_dtype_bytes(FileDType dtype) {
  if (static_cast<int64_t>(dtype) < kPlainDTypes) return static_cast<size_t>(dtype_bytes(static_cast<DType>(dtype)));
  return dtype == FileDType::f64 ? 8 : 2;
}

namespace {

void read_exactly(int fd, void* to, size_t bytes, int64_t at) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t got = pread(fd, static_cast<char*>(to) + done, bytes - done, at + static_cast<int64_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw std::runtime_error(std::string("reading failed: ") + std::strerror(errno));
    if (got == 0)
      throw std::runtime_error("the file ends at byte " + std::to_string(at + static_cast<int64_t>(done)) + ", " +
                               std::to_string(bytes - done) +
                               " bytes too early: it is truncated, or changed while it was read");
    done += static_cast<size_t>(got);
  }
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, mantissa = half & 0x3ff;
  const uint32_t exponent = (half >> 10) & 0x1f;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent > 0) return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -tiny : tiny;
}

float element(const void* block, FileDType dtype, int64_t i) {
  switch (dtype) {
    case FileDType::bf16:
      return from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(block)[i]) << 16);
    case FileDType::f16:
      return from_f16(static_cast<const uint16_t*>(block)[i]);
    case FileDType::f64:
      return static_cast<float>(static_cast<const double*>(block)[i]);
    default:
      return static_cast<const float*>(block)[i];
  }
}

// Index of the first NaN or infinity among `count` elements, -1 for none. All bits of the exponent are set in those.
template <typename Bits>
int64_t first_not_finite(const void* block, int64_t count, Bits exponent) {
  const auto* bits = static_cast<const Bits*>(block);
  constexpr int64_t kRun = 4096;
  for (int64_t at = 0; at < count; at += kRun) {
    const int64_t end = std::min(count, at + kRun);
    Bits found = 0;  // as wide as the elements: a bool costs a vector loop three to nine times as much
    for (int64_t i = at; i < end; i++) found |= (bits[i] & exponent) == exponent ? static_cast<Bits>(-1) : Bits{0};
    for (int64_t i = at; found && i < end; i++)
      if ((bits[i] & exponent) == exponent) return i;
  }
  return -1;
}

int64_t first_not_finite(const void* block, DType dtype, int64_t count) {
  if (!is_float(dtype)) return -1;
  return dtype == DType::bf16 ? first_not_finite<uint16_t>(block, count, 0x7f80)
                              : first_not_finite<uint32_t>(block, count, 0x7f800000u);
}

void convert(void* to, DType dtype, const void* from, FileDType file_dtype, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const float value = element(from, file_dtype, i);
    if (dtype == DType::bf16)
      static_cast<uint16_t*>(to)[i] = to_bf16(value);
    else
      static_cast<float*>(to)[i] = value;
  }
}

constexpr int64_t kBlock = int64_t{1} << 18;  // elements; 1 MB of f32 stays in the cache from the read to the check

// Hands blocks of `count` elements to up to four threads. Each makes a worker of its own, whose call with the place and
// size of a block gives the index of what it looks for in there, -1 for none. Gives the smallest such place, -1 for
// none.
template <typename MakeWorker>
int64_t first_in_blocks(int64_t count, bool several, MakeWorker&& make_worker) {
  std::atomic<int64_t> next{0};
  int64_t first = INT64_MAX;
  std::exception_ptr failure;
  std::mutex mutex;
  const auto work = [&] {
    try {
      auto worker = make_worker();
      for (int64_t at; (at = next.fetch_add(kBlock)) < count;) {
        const int64_t found = worker(at, std::min(kBlock, count - at));
        if (found < 0) continue;
        std::lock_guard<std::mutex> lock(mutex);
        first = std::min(first, at + found);
      }
    } catch (...) {
      next = count;
      std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  const int64_t helpers = several ? std::min<int64_t>({blocks - 1, 3, std::thread::hardware_concurrency() - 1L}) : 0;
  std::vector<std::thread> threads;
  try {
    for (int64_t i = 0; i < helpers; i++) threads.emplace_back(work);
  } catch (const std::system_error&) {  // with those there are it takes longer, no more
  }
  work();
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
  return first == INT64_MAX ? -1 : first;
}

}  // namespace

int64_t read_file(Buffer& to, size_t offset, DType dtype, int fd, int64_t file_offset, FileDType file_dtype,
                  int64_t count) {
  const auto from_bytes = static_cast<int64_t>(file_dtype_bytes(file_dtype)), to_bytes = dtype_bytes(dtype);
  const bool same = static_cast<int>(file_dtype) == static_cast<int>(dtype);
  const Device& device = *to.device();
  const bool in_place = to.host() || device.backend().host_visible(device.handle());
  // A page that is touched first costs more than its copy: several threads share that. A staged device takes one.
  return first_in_blocks(count, in_place, [&] {
    const auto block_bytes = [&](int64_t size) { return static_cast<size_t>(std::min(count, kBlock) * size); };
    return [&, raw = std::vector<char>(same ? 0 : block_bytes(from_bytes)),
            stage = std::vector<char>(in_place ? 0 : block_bytes(to_bytes))](int64_t at, int64_t part) mutable {
      const int64_t place = static_cast<int64_t>(offset) + at * to_bytes;
      char* block = in_place ? to.base() + place : stage.data();
      read_exactly(fd, same ? block : raw.data(), static_cast<size_t>(part * from_bytes),
                   file_offset + at * from_bytes);
      if (!same) convert(block, dtype, raw.data(), file_dtype, part);
      const int64_t found = first_not_finite(block, dtype, part);
      if (!in_place) to.upload(static_cast<size_t>(place), block, static_cast<size_t>(part * to_bytes));
      return found;
    };
  });
}

int64_t first_not_finite(const Buffer& buffer, size_t offset, DType dtype, int64_t count) {
  const char* start = buffer.base() + offset;
  const int64_t found = first_in_blocks(count, true, [&] {
    return [&](int64_t at, int64_t part) { return first_not_finite(start + at * dtype_bytes(dtype), dtype, part); };
  });
  buffer.check();
  return found;
}

}  // namespace rw
