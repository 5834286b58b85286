// copy_start: y = x on a stream of its own, between the memory of the GPU and pinned memory of the host, while the
// operations that follow go on. copy_wait: what follows comes after the copies started so far.
//
// x, y (N), f32 or bf16. Memory traffic: N elements across the bus, in the background; no kernel takes part. Until the
// wait, x is only read and y belongs to the copy: the record says so, since both operations name both.
#include "device.h"

namespace rw::cuda {

void Context::wait_for_copies() {
  if (!copies.pending) return;
  check(cudaEventRecord(copies.join, copies.stream), "marking the end of copies");
  check(cudaStreamWaitEvent(stream, copies.join, 0), "waiting for copies");
  copies.pending = false;
}

void copy_start(Context& context, const copy_start_args& args) {
  auto& copies = context.copies;
  check(cudaEventRecord(copies.fork, context.stream), "marking the start of a copy");
  check(cudaStreamWaitEvent(copies.stream, copies.fork, 0), "starting a copy");
  copies.pending = true;
  const size_t bytes = static_cast<size_t>(args.x.size() * dtype_bytes(args.x.dtype));
  check(cudaMemcpyAsync(args.y.data, args.x.data, bytes, cudaMemcpyDefault, copies.stream), "copying");
}

void copy_wait(Context& context, const copy_wait_args&) { context.wait_for_copies(); }

}  // namespace rw::cuda
