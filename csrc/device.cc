#include "device.h"

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <vector>

#include <unistd.h>

#include "loader.h"

namespace rw {

Device::Device(const std::string& backend, int index, int threads) : backend_(find_backend(backend)) {
  const rw_open_options options = {index, threads};
  if (backend_->open(&options, &handle_) != RW_OK) throw std::runtime_error(backend_->last_error());
  thread_ = std::thread([this] { work(); });
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

Buffer::Buffer(std::shared_ptr<Device> device, size_t bytes) : device_(std::move(device)), bytes_(bytes) {
  if (device_->backend().alloc(device_->handle(), bytes, &memory_) != RW_OK)
    throw std::runtime_error(device_->backend().last_error());
}

Buffer::~Buffer() { device_->backend().release(device_->handle(), memory_); }

void Buffer::upload(size_t offset, const void* from, size_t bytes) {
  if (device_->backend().upload(device_->handle(), base() + offset, from, bytes) != RW_OK)
    throw std::runtime_error(device_->backend().last_error());
}

void Buffer::download(size_t offset, void* to, size_t bytes) {
  if (device_->backend().download(device_->handle(), to, base() + offset, bytes) != RW_OK)
    throw std::runtime_error(device_->backend().last_error());
}

size_t file_dtype_bytes(FileDType dtype) {
  return dtype == FileDType::f64 ? 8 : dtype == FileDType::f32 || dtype == FileDType::i32 ? 4 : 2;
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

}  // namespace

void read_file(Buffer& to, size_t offset, DType dtype, int fd, int64_t file_offset, FileDType file_dtype,
               int64_t count) {
  const size_t from_bytes = file_dtype_bytes(file_dtype), to_bytes = static_cast<size_t>(dtype_bytes(dtype));
  const bool same = static_cast<int>(file_dtype) == static_cast<int>(dtype);
  const Device& device = *to.device();
  if (same && device.backend().host_visible(device.handle()))
    return read_exactly(fd, to.base() + offset, static_cast<size_t>(count) * from_bytes, file_offset);
  constexpr int64_t kStage = int64_t{1} << 20;  // elements
  std::vector<char> raw(static_cast<size_t>(std::min(count, kStage)) * from_bytes);
  std::vector<char> converted(same ? 0 : static_cast<size_t>(std::min(count, kStage)) * to_bytes);
  for (int64_t at = 0; at < count; at += kStage) {
    const int64_t part = std::min(kStage, count - at);
    read_exactly(fd, raw.data(), static_cast<size_t>(part) * from_bytes,
                 file_offset + at * static_cast<int64_t>(from_bytes));
    if (!same) {
      for (int64_t i = 0; i < part; i++) {
        const float value = element(raw.data(), file_dtype, i);
        if (dtype == DType::bf16)
          reinterpret_cast<uint16_t*>(converted.data())[i] = to_bf16(value);
        else
          reinterpret_cast<float*>(converted.data())[i] = value;
      }
    }
    to.upload(offset + static_cast<size_t>(at) * to_bytes, same ? raw.data() : converted.data(),
              static_cast<size_t>(part) * to_bytes);
  }
}

}  // namespace rw
