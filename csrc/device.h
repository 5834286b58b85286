// A device as the addon sees it: a backend's device, and one thread that works off jobs in order, so that nothing long
// happens on JavaScript's thread and nothing overlaps on the device.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "backend.h"
#include "mapping.h"
#include "ops.h"
#include "plan.h"

namespace rw {

class Buffer;

class Device {
 public:
  // Throws std::runtime_error where the backend or its device is not available.
  Device(const std::string& backend, int index, int threads);
  ~Device();

  const rw_backend& backend() const { return *backend_; }
  rw_device* handle() const { return handle_; }

  // Appends a job for the device's thread. False after stop(): the job was not taken.
  bool submit(std::function<void()> job);
  // Ends the running plan between two operations and those that are queued now.
  void cancel() {
    cancel_before_ = submitted_.load();
    flag_.store(1);
  }
  // Ends the running plan, drops all jobs and joins the thread. Safe to call twice.
  void stop();

  // For jobs: runs a plan; gives RW_OK or RW_CANCELLED, throws std::runtime_error with the backend's message.
  int run(const DecodedPlan& plan, uint64_t ticket);
  uint64_t next_ticket() { return ++submitted_; }
  // The backend's peer of `ropewalk bench` (backend.h): opens it and gives its description; a job that computes with
  // it. Throw std::runtime_error where there is none, it fails, or a buffer is too small.
  std::string open_peer(const std::string& path);
  void multiply(const rw_product& product, const std::vector<std::shared_ptr<Buffer>>& matrices, size_t repeats);
  // This plan will not run again.
  void forget(const DecodedPlan& plan) { backend_->forget(handle_, plan.commands.data()); }

 private:
  void work();

  const rw_backend* backend_;
  rw_device* handle_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  bool stopping_ = false;
  std::atomic<int32_t> flag_{0};
  std::atomic<uint64_t> submitted_{0};
  std::atomic<uint64_t> cancel_before_{0};
  std::thread thread_;
};

// A block of device memory, or a file that is used in place and only read; freed with the last plan or job that uses
// it.
class Buffer {
 public:
  // Throws std::runtime_error when out of memory. `host`: pinned memory of the host, not the device's own.
  Buffer(std::shared_ptr<Device> device, size_t bytes, bool host = false);
  Buffer(std::shared_ptr<Device> device, std::unique_ptr<Mapping> file);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  const std::shared_ptr<Device>& device() const { return device_; }
  char* base() const { return static_cast<char*>(memory_); }
  size_t bytes() const { return bytes_; }
  bool host() const { return host_; }
  const Mapping* file() const { return file_.get(); }

  // After every use: throws FileChanged where this is a file that changed.
  void check() const {
    if (file_) file_->check();
  }

  // On the device's thread. Offsets were checked by the caller.
  void upload(size_t offset, const void* from, size_t bytes);
  void download(size_t offset, void* to, size_t bytes);

 private:
  std::shared_ptr<Device> device_;
  std::unique_ptr<Mapping> file_;
  void* memory_ = nullptr;
  size_t bytes_;
  bool host_ = false;
};

// The first are the plain ones of DType, in its order.
enum class FileDType : int { f32, bf16, i32, u8, u16, f16, f64 };
constexpr int64_t kFileDTypes = 7;
size_t file_dtype_bytes(FileDType dtype);

// Reads `count` elements of a file straight into device memory, converting the dtype on the way where it differs. No
// second copy of the tensor exists: the file is read in place, or through a staging block of a few MB. Gives the index
// of the first element that is NaN or infinite, -1 where there is none; it is looked for while the data are in the
// cache.
int64_t read_file(Buffer& to, size_t offset, DType dtype, int fd, int64_t file_offset, FileDType file_dtype,
                  int64_t count);

// The same for what is in memory that the host sees: index of the first element that is NaN or infinite, -1 for none.
int64_t first_not_finite(const Buffer& buffer, size_t offset, DType dtype, int64_t count);

}  // namespace rw
