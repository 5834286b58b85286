// The CUDA backend: devices, memory, streams, errors, and the C ABI of backend.h. Built twice: by nvcc into
// libropewalk_cuda.so, and by a host compiler, with simt/ in place of CUDA, into libropewalk_simt.so (tests).
//
// ROPEWALK_DEBUG=1 waits after every operation, so that an error names the one it comes from; ROPEWALK_CUDA_GRAPHS=0
// launches every kernel of every run by itself.
#include "../backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cublaslt.h"
#include "device.h"
#include "gpu.h"
#include "graph.h"
#include "staging.h"

namespace rw::cuda {

void throw_cuda_error(cudaError_t error, const char* what, const char* file, int line) {
  const char* name = std::strrchr(file, '/');
  throw CudaError(error, std::string(what) + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                             "), " + (name ? name + 1 : file) + ":" + std::to_string(line));
}

namespace {

using Kernel = void (*)(Context& context, const void* args);

#define IN(name, dtype, dims)
#define FLOPS(expression)
#define OP(name, row) [](Context& context, const void* args) { name(context, *static_cast<const name##_args*>(args)); },
const Kernel kernels[] = {
#include "../ops.def"
};
#undef IN
#undef OP
#undef FLOPS

// Enough for the parts of one product (matmul.cu) that fill every SM once.
constexpr size_t kWorkspace = size_t{32} << 20;

// Operations between two looks at `cancel`, and in one graph. At most two segments are on their way at a time.
constexpr size_t kSegment = 32;

bool flag_is(const char* name, const char* value) {
  const char* given = std::getenv(name);
  return given && !std::strcmp(given, value);
}

class Device final : public Context {
 public:
  // Not a constructor, so that what has been made is freed where the rest fails.
  void open(int index) {
    const cudaDeviceProp gpu = choose_gpu(index);
    index_ = index;
    description_ = describe_gpu(gpu);
    sm_count = gpu.multiProcessorCount;
    max_smem = gpu.sharedMemPerBlockOptin;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    check(cudaStreamCreateWithFlags(&copies.stream, cudaStreamNonBlocking), "creating a stream");
    for (cudaEvent_t* event : {&copies.fork, &copies.join})
      check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "creating an event");
    for (cudaEvent_t& event : ended_)
      check(cudaEventCreateWithFlags(&event, cudaEventBlockingSync | cudaEventDisableTiming), "creating an event");
    debug_ = flag_is("ROPEWALK_DEBUG", "1");
    graphs_ = !debug_ && !flag_is("ROPEWALK_CUDA_GRAPHS", "0");
  }

  // Errors on the way are of no interest any more: the device may be lost.
  ~Device() {
    if (index_ < 0) return;
    cudaSetDevice(index_);
    if (stream) cudaStreamSynchronize(stream);
    recordings_.clear();
    peer_.reset();
    for (cudaEvent_t event : ended_)
      if (event) cudaEventDestroy(event);
    for (cudaEvent_t event : {copies.fork, copies.join})
      if (event) cudaEventDestroy(event);
    for (cudaStream_t one : {copies.stream, stream})
      if (one) cudaStreamDestroy(one);
    cudaFree(workspace);
  }

  const char* description() const { return description_.c_str(); }

  // At the start of every call, on whatever thread it comes.
  void enter() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!lost_.empty()) throw std::runtime_error(lost_);
    }
    check(cudaSetDevice(index_), "choosing a GPU");
  }

  // After a failure: whether the driver refuses everything from now on, as after an illegal access.
  bool broken() {
    cudaGetLastError();  // else the next launch would be blamed for it
    size_t free_bytes, total_bytes;
    const bool refused = cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess;
    cudaGetLastError();
    return refused;
  }

  // The message of a failure. One that the device does not survive is what all later calls fail with.
  std::string diagnose(const std::string& message) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (lost_.empty() && broken()) lost_ = message + ". This device cannot be used any more: restart the process";
    return lost_.empty() ? message : lost_;
  }

  // The workspace comes first: a device that is only asked what it is takes no memory.
  void* alloc(size_t bytes) {
    need_workspace();
    return allocate(bytes);
  }

  void need_workspace() {
    if (workspace) return;
    workspace = static_cast<char*>(allocate(kWorkspace));
    workspace_bytes = kWorkspace;
  }

  void* allocate(size_t bytes) {
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, bytes);
    if (error == cudaErrorMemoryAllocation) {
      size_t free_bytes = 0, total_bytes = 0;
      cudaGetLastError();
      check(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for free memory");
      throw CudaError(error, "out of memory: " + size_text(bytes) + " were asked for, " + size_text(free_bytes) +
                                 " of " + size_text(total_bytes) + " are free");
    }
    check(error, "an allocation");
    return memory;
  }

  // Under simt this is where writing beside a block of memory shows.
  void release(void* memory) {
    cudaSetDevice(index_);
    const cudaError_t error = cudaFree(memory);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (error != cudaSuccess && lost_.empty())
      lost_ = std::string("freeing memory failed: ") + cudaGetErrorString(error) +
              ". This device cannot be used any more: restart the process";
  }

  Staging& staging() { return staging_; }
  void forget(const rw_command* commands) { recordings_.forget(commands); }

  const char* open_peer(const char* path) {
    if (!peer_) peer_ = std::make_unique<Cublaslt>(path);
    return peer_->description().c_str();
  }

  void multiply(const rw_product& product, void* const* matrices, size_t sets, size_t repeats) {
    if (!peer_) throw std::runtime_error("cuBLASLt is not open");
    peer_->multiply(*this, product, matrices, sets, repeats);
    wait();
  }

  int run(const char* plan, const rw_command* commands, size_t count, const int32_t* cancel) {
    const auto cancelled = [flag = reinterpret_cast<const volatile int32_t*>(cancel)] { return flag && *flag; };
    need_workspace();
    size_t done = 0, next = 0;  // operations before `done` have ended, those before `next` were submitted
    try {
      Recording* recording = graphs_ && count > 0 ? &recordings_.of(commands) : nullptr;
      for (size_t segment = 0; next < count; segment++) {
        if (segment >= 2) {
          check(cudaEventSynchronize(ended_[segment % 2]), "waiting for the GPU");
          done = (segment - 1) * kSegment;
        }
        const size_t end = std::min(count, next + kSegment);
        const bool eager = !recording || recording->runs == 0;
        const auto submit = [&] {
          while (next < end && !(eager && cancelled())) {
            const rw_command& command = commands[next++];
            limit_to_tensors(op_info[command.op], command.args);
            kernels[command.op](*this, command.args);
            if (debug_) check(cudaStreamSynchronize(stream), "running it");
          }
          wait_for_copies();  // a graph ends with all that it began
        };
        if (cancelled()) break;
        if (eager) {
          submit();
        } else {
          if (segment == recording->segments.size()) recording->segments.push_back(capture(stream, submit));
          next = end;
          check(cudaGraphLaunch(recording->segments[segment], stream), "launching a graph");
        }
        check(cudaEventRecord(ended_[segment % 2], stream), "submitting work");
      }
      wait();
      if (next < count) return RW_CANCELLED;
      if (recording) recording->runs++;
      return RW_OK;
    } catch (const std::exception& error) {
      // A copy that the failed run had begun must not be waited for by the next one, which may be a graph.
      if (std::exchange(copies.pending, false)) cudaStreamSynchronize(copies.stream);
      throw std::runtime_error(place(plan, commands, done, next) + error.what());
    }
  }

 private:
  // For all that was submitted. An event, and not the stream: waiting for it leaves the processor to others.
  void wait() {
    check(cudaEventRecord(ended_[0], stream), "submitting work");
    check(cudaEventSynchronize(ended_[0]), "waiting for the GPU");
  }

  // Which operation failed: the one submitted last; or, when the device is lost, one of those that had not ended.
  std::string place(const char* plan, const rw_command* commands, size_t done, size_t next) {
    const auto name = [&](size_t at) {
      return std::string(op_info[commands[at].op].name) + " (#" + std::to_string(at);
    };
    const std::string of_plan = std::string("plan \"") + plan + "\"";
    if (next == 0) return of_plan + ": ";
    const size_t last = next - 1, first = !debug_ && broken() ? done : last;
    if (first == last) return name(last) + " of " + of_plan + "): ";
    return "one of the operations " + name(first) + ") to " + name(last) + ") of " + of_plan +
           ", ROPEWALK_DEBUG=1 tells which: ";
  }

  int index_ = -1;
  std::string description_;
  bool debug_ = false, graphs_ = true;
  cudaEvent_t ended_[2] = {};  // of the last two segments
  Staging staging_;
  Recordings recordings_;
  std::unique_ptr<Cublaslt> peer_;
  std::mutex mutex_;
  std::string lost_;  // why the device is lost
};

thread_local std::string last_error;

// Backend code throws inside; nothing leaves the C ABI but a code and a message.
template <typename Body>
int guarded(Device& device, Body&& body) {
  try {
    device.enter();
    return body();
  } catch (const std::bad_alloc&) {
    last_error = "out of host memory";
  } catch (const std::exception& error) {
    last_error = device.diagnose(error.what());
  }
  return RW_ERROR;
}

Device& from(rw_device* device) { return *reinterpret_cast<Device*>(device); }

int open(const rw_open_options* options, rw_device** device) {
  try {
    auto opened = std::make_unique<Device>();
    opened->open(options->index);
    *device = reinterpret_cast<rw_device*>(opened.release());
    return RW_OK;
  } catch (const std::exception& error) {
    last_error = error.what();
    cudaGetLastError();
    return RW_ERROR;
  }
}

void close(rw_device* device) { delete &from(device); }

const char* describe(rw_device* device) { return from(device).description(); }

int alloc(rw_device* device, size_t bytes, void** memory) {
  return guarded(from(device), [&] {
    *memory = from(device).alloc(bytes);
    return RW_OK;
  });
}

void release(rw_device* device, void* memory) { from(device).release(memory); }

int alloc_host(rw_device* device, size_t bytes, void** memory) {
  return guarded(from(device), [&] {
    const cudaError_t error = cudaHostAlloc(memory, bytes, cudaHostAllocDefault);
    if (error != cudaErrorMemoryAllocation) return check(error, "pinning host memory"), RW_OK;
    cudaGetLastError();
    throw CudaError(error, "out of host memory: " + size_text(bytes) + " were to be pinned");
  });
}

void release_host(rw_device*, void* memory) { cudaFreeHost(memory); }

int upload(rw_device* device, void* to, const void* data, size_t bytes) {
  return guarded(from(device), [&] {
    from(device).staging().upload(from(device).stream, to, data, bytes);
    return RW_OK;
  });
}

int download(rw_device* device, void* to, const void* data, size_t bytes) {
  return guarded(from(device), [&] {
    from(device).staging().download(from(device).stream, to, data, bytes);
    return RW_OK;
  });
}

int host_visible(rw_device*) { return 0; }

int memory(rw_device* device, uint64_t* free_bytes, uint64_t* total_bytes) {
  return guarded(from(device), [&] {
    size_t free_now = 0, total = 0;
    check(cudaMemGetInfo(&free_now, &total), "asking for free memory");
    *free_bytes = free_now;
    *total_bytes = total;
    return RW_OK;
  });
}

int run(rw_device* device, const char* plan, const rw_command* commands, size_t count, const int32_t* cancel) {
  return guarded(from(device), [&] { return from(device).run(plan, commands, count, cancel); });
}

void forget(rw_device* device, const rw_command* commands) { from(device).forget(commands); }

const char* error() { return last_error.c_str(); }

int peer_open(rw_device* device, const char* path, const char** description) {
  return guarded(from(device), [&] {
    *description = from(device).open_peer(path);
    return RW_OK;
  });
}

int peer_multiply(rw_device* device, const rw_product* product, void* const* matrices, size_t sets, size_t repeats) {
  return guarded(from(device), [&] {
    from(device).multiply(*product, matrices, sets, repeats);
    return RW_OK;
  });
}

const rw_backend backend_functions = {RW_BACKEND_ABI, table_hash,   RW_BACKEND_NAME, kWorkspace, open,         close,
                                      describe,       alloc,        release,         alloc_host, release_host, upload,
                                      download,       host_visible, memory,          run,        forget,       error,
                                      peer_open,      peer_multiply};

}  // namespace

// From the end on, so that under simt writing beyond it meets the guard behind the allocation.
void* Context::scratch(size_t bytes) const {
  if (bytes > workspace_bytes)
    throw std::runtime_error("it needs " + size_text(bytes) + " of working memory, the limit is " +
                             size_text(workspace_bytes));
  return workspace + (workspace_bytes - bytes) / 256 * 256;
}

}  // namespace rw::cuda

// What the addon looks up in the library.
extern "C" __attribute__((visibility("default"))) const rw_backend* ropewalk_backend() {
  return &rw::cuda::backend_functions;
}
