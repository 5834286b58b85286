// The CUDA runtime's calls other than memory: devices, streams, events, graphs, and kernel launches as far as they are
// work in a stream. Kernels run at once; copies by DMA (from and to pinned memory) as late as CUDA allows: when
// somebody waits for them, or something else follows on the stream. A staging buffer that is used too early therefore
// shows.
//
// ROPEWALK_SIMT_MACHINE describes another machine than one with a good card, for tests of what is said then:
// "driver=12020,devices=0,capability=75,memory=1000000,smem=101376,fault=3" (version of the driver, 0 for none; cards;
// compute capability; bytes of memory, and of a block's shared memory; the launch, counted from the opening of the
// device, that ends in an illegal access).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "simt.h"

struct simt_stream {
  std::deque<std::function<void()>> late;
  size_t done = 0;  // pieces of late work that have been done
  simt_graph* capture = nullptr;
  bool unjoined = false;  // has work in a capture that began on another stream, which has not waited for it yet
};
struct simt_event {
  simt_stream* stream = nullptr;
  size_t at = 0;                  // `done` of the stream when the event has happened
  simt_graph* capture = nullptr;  // in which it was recorded
};
struct simt_graph {
  std::vector<std::function<void()>> nodes;
};
struct simt_graph_exec : simt_graph {};

namespace {

constexpr int kRuntime = 13000;

struct Machine {
  long driver = kRuntime, devices = 1, capability = 80, memory = 64L << 30, smem = 163 << 10, fault = 0;
};
Machine machine;
long launches = 0;
bool faulted = false;  // an illegal access has happened: every call fails from now on

std::mutex mutex;  // of everything below, and of the late work of all streams
std::set<simt_stream*> streams;
std::map<const char*, size_t> host_memory;
std::map<const void*, size_t> most_dynamic;  // of the kernels that have asked for it

thread_local cudaError_t last_error = cudaSuccess;
thread_local simt_stream* captured = nullptr;
thread_local std::shared_ptr<const std::vector<simt::Range>> tensors;

void read_machine() {
  machine = {};
  launches = 0;
  faulted = false;
  const char* text = std::getenv("ROPEWALK_SIMT_MACHINE");
  if (!text) return;
  const std::pair<const char*, long*> keys[] = {
      {"driver=", &machine.driver}, {"devices=", &machine.devices}, {"capability=", &machine.capability},
      {"memory=", &machine.memory}, {"smem=", &machine.smem},       {"fault=", &machine.fault}};
  for (const auto& [key, value] : keys)
    if (const char* found = std::strstr(text, key)) *value = std::strtol(found + std::strlen(key), nullptr, 10);
}

// What every call gives after an illegal access.
cudaError_t state() { return faulted ? simt::failed(cudaErrorIllegalAddress) : cudaSuccess; }

void do_late_work(simt_stream* stream, size_t until) {
  const std::lock_guard<std::mutex> lock(mutex);
  while (stream->done < until && !stream->late.empty()) {
    stream->late.front()();
    stream->late.pop_front();
    stream->done++;
  }
}

}  // namespace

namespace simt {

cudaError_t failed(cudaError_t error) { return last_error = error; }

cudaError_t may_allocate() {
  if (captured) return failed(cudaErrorStreamCaptureUnsupported);
  return state();
}

size_t shared_limit(const void* kernel, size_t dynamic) {
  constexpr size_t plain = 48 << 10;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto asked = most_dynamic.find(kernel);
  if (asked == most_dynamic.end() || dynamic > asked->second) return plain;
  return std::max(plain, static_cast<size_t>(machine.smem));
}

size_t memory_total() { return static_cast<size_t>(machine.memory); }

void finish_copies() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (simt_stream* stream : streams) {
    for (const auto& work : stream->late) work();
    stream->done += stream->late.size();
    stream->late.clear();
  }
}

bool pinned(const void* memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto* at = static_cast<const char*>(memory);
  auto after = host_memory.upper_bound(at);
  return after != host_memory.begin() && at < (--after)->first + after->second;
}

void enqueue(cudaStream_t stream, bool late, std::function<void()> work) {
  if (faulted) return;
  if (stream && stream->capture) {
    if (stream == captured) return stream->capture->nodes.push_back(std::move(work));
    stream->unjoined = true;
    stream->capture->nodes.push_back([=, work = std::move(work)] {
      const std::lock_guard<std::mutex> lock(mutex);
      stream->late.push_back(work);
    });
  } else if (stream && late) {
    const std::lock_guard<std::mutex> lock(mutex);
    stream->late.push_back(std::move(work));
  } else {
    if (stream) do_late_work(stream, SIZE_MAX);
    work();
  }
}

void limit_device_memory(const Range* ranges, size_t count) {
  tensors = count ? std::make_shared<const std::vector<Range>>(ranges, ranges + count) : nullptr;
}

void submit(dim3 grid, dim3 block, size_t smem, cudaStream_t stream, const char* file, int line, const void* kernel,
            const Call& body) {
  Call call = body;
  call.tensors = tensors;
  enqueue(stream, false, [=] {
    if (machine.fault > 0 && ++launches == machine.fault) faulted = true;
    if (!faulted) run_grid(grid, block, smem, file, line, kernel, call);
  });
}

}  // namespace simt

using simt::failed;

// ---- errors ---------------------------------------------------------------------------------------------------------

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureUnjoined:
      return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation:
      return "cudaErrorStreamCaptureIsolation";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

// ---- devices --------------------------------------------------------------------------------------------------------

// The first call of whoever opens a device: the machine is looked at anew.
cudaError_t cudaDriverGetVersion(int* version) {
  read_machine();
  *version = static_cast<int>(machine.driver);
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kRuntime;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  if (machine.driver / 1000 < kRuntime / 1000) return failed(cudaErrorInsufficientDriver);
  *count = static_cast<int>(machine.devices);
  return *count > 0 ? cudaSuccess : failed(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int index) {
  return index >= 0 && index < machine.devices ? state() : failed(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  if (index < 0 || index >= machine.devices) return failed(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "%s", "the CPU in place of a GPU (tests only)");
  properties->totalGlobalMem = static_cast<size_t>(machine.memory);
  properties->sharedMemPerBlockOptin = static_cast<size_t>(machine.smem);
  properties->major = static_cast<int>(machine.capability / 10);
  properties->minor = static_cast<int>(machine.capability % 10);
  properties->multiProcessorCount = 4;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return state();
  if (value > machine.smem) return failed(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(mutex);
  most_dynamic[kernel] = static_cast<size_t>(value);
  return state();
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  if (faulted) return state();
  *total_bytes = simt::memory_total();
  *free_bytes = *total_bytes - std::min(*total_bytes, simt::memory_used());
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  if (const cudaError_t error = simt::may_allocate()) return error;
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!*memory) return failed(cudaErrorMemoryAllocation);
  const std::lock_guard<std::mutex> lock(mutex);
  host_memory[static_cast<const char*>(*memory)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  simt::finish_copies();
  const std::lock_guard<std::mutex> lock(mutex);
  if (!memory) return cudaSuccess;
  if (host_memory.erase(static_cast<const char*>(memory)) == 0) return failed(cudaErrorInvalidValue);
  std::free(memory);
  return cudaSuccess;
}

// ---- streams and events ---------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new simt_stream;
  const std::lock_guard<std::mutex> lock(mutex);
  streams.insert(*stream);
  return state();
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  do_late_work(stream, SIZE_MAX);
  const std::lock_guard<std::mutex> lock(mutex);
  streams.erase(stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (captured) return failed(cudaErrorStreamCaptureUnsupported);
  if (stream) do_late_work(stream, SIZE_MAX);
  return state();
}

cudaError_t cudaDeviceSynchronize() {
  if (captured) return failed(cudaErrorStreamCaptureUnsupported);
  simt::finish_copies();
  return state();
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new simt_event;
  return state();
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  *event = {stream, stream->done + stream->late.size(), stream->capture};
  return state();
}

// Work that is not late has been done when an event is recorded, so that only late work is waited for.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  simt_stream* const other = event->stream;
  if (!event->capture && !stream->capture) {
    if (other && other != stream) do_late_work(other, event->at);
    return state();
  }
  // A second stream becomes part of a capture by waiting for it, and has to be waited for by the first one.
  if (!event->capture || (stream->capture && stream->capture != event->capture))
    return failed(cudaErrorStreamCaptureIsolation);
  if (!stream->capture) {
    stream->capture = event->capture;
  } else if (other != stream && other->capture) {
    other->unjoined = false;
    stream->capture->nodes.push_back([=] { do_late_work(other, SIZE_MAX); });
  }
  return state();
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (captured) return failed(cudaErrorStreamCaptureUnsupported);
  if (event->stream) do_late_work(event->stream, event->at);
  return state();
}

// ---- graphs ---------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (captured || stream->capture) return failed(cudaErrorStreamCaptureUnsupported);
  stream->capture = new simt_graph;
  captured = stream;
  return state();
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (captured != stream) return failed(cudaErrorInvalidValue);
  captured = nullptr;
  *graph = stream->capture;
  bool joined = true;
  const std::lock_guard<std::mutex> lock(mutex);
  for (simt_stream* one : streams) {
    if (one->capture != *graph) continue;
    one->capture = nullptr;
    joined &= !one->unjoined;
    one->unjoined = false;
  }
  return joined ? state() : failed(cudaErrorStreamCaptureUnjoined);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new simt_graph_exec{*graph};
  return state();
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (captured) return failed(cudaErrorStreamCaptureUnsupported);
  for (const auto& node : exec->nodes) simt::enqueue(stream, false, node);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
