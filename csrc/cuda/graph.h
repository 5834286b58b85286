// CUDA graphs of plans: the kernels of a plan are captured when it runs for the second time (many plans run
// only once) and replayed from then on, so that the processor no longer has to launch each of them. A
// plan is captured in segments, so that a run can be ended between them. For backend.cu.
#pragma once
#include <mutex>
#include <unordered_map>
#include <vector>

#include "../backend.h"
#include "device.h"

namespace rw::cuda {

// One plan's graphs, in the order of its commands.
struct Recording {
  int runs = 0;  // that came to their end
  std::vector<cudaGraphExec_t> segments;

  Recording() = default;
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  ~Recording() {
    for (cudaGraphExec_t segment : segments) cudaGraphExecDestroy(segment);
  }
};

// The recordings of all plans of a device, by their commands. Any thread may forget one while another plan runs.
class Recordings {
 public:
  Recording& of(const rw_command* commands) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return recordings_[commands];
  }
  void forget(const rw_command* commands) {
    const std::lock_guard<std::mutex> lock(mutex_);
    recordings_.erase(commands);
  }
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    recordings_.clear();
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const rw_command*, Recording> recordings_;
};

// What `submit` puts into the stream, as a graph. Only this thread must keep from what a capture forbids (allocations,
// waiting): others may go on.
template <typename Submit>
cudaGraphExec_t capture(cudaStream_t stream, Submit&& submit) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "starting a capture");
  try {
    submit();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "ending a capture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(error, "instantiating a graph");
  return executable;
}

}  // namespace rw::cuda
