// The only file that knows Node. Handles are numbers in a table owned by the environment (main thread or worker), never
// reused: a stale one is an error, not a dangling pointer. Long work goes to the device's own thread; its promise is
// settled through a thread-safe function.
#include <napi.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "blas.h"
#include "device.h"
#include "loader.h"

namespace rw {
namespace {

// A finished job on its way back: settles its promise on JavaScript's thread.
struct Outcome {
  Napi::Promise::Deferred deferred;
  std::function<Napi::Value(Napi::Env)> result;  // called on JavaScript's thread; may throw Napi::Error
  std::string error;
  const char* code = "ERR_DEVICE";  // of the error
};

struct DeviceEntry;
void settle(Napi::Env env, Napi::Function, DeviceEntry* entry, Outcome* outcome);
using Settle = Napi::TypedThreadSafeFunction<DeviceEntry, Outcome, settle>;

struct DeviceEntry {
  std::shared_ptr<Device> device;
  Settle settle;
  int pending = 0;  // jobs whose promise is open: while there are some, the process stays alive
  std::shared_ptr<DeviceEntry>* held = nullptr;  // by the environment's cleanup hook, until the device is closed
  bool closed = false;
};

struct Plan {
  std::shared_ptr<DeviceEntry> entry;
  std::vector<std::shared_ptr<Buffer>> buffers;
  DecodedPlan decoded;

  explicit Plan(std::shared_ptr<DeviceEntry> entry) : entry(std::move(entry)) {}
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() { entry->device->forget(decoded); }
};

struct Addon {
  uint32_t next = 1;
  std::map<uint32_t, std::shared_ptr<DeviceEntry>> devices;
  std::map<uint32_t, std::shared_ptr<Buffer>> buffers;
  std::map<uint32_t, std::pair<uint32_t, std::shared_ptr<Plan>>> plans;
  std::map<uint32_t, uint32_t> buffer_device;
};

Addon& addon(const Napi::CallbackInfo& info) { return *info.Env().GetInstanceData<Addon>(); }

[[noreturn]] void fail(Napi::Env env, const std::string& message) { throw Napi::Error::New(env, message); }

double number(const Napi::CallbackInfo& info, size_t i) {
  if (i >= info.Length() || !info[i].IsNumber())
    throw Napi::TypeError::New(info.Env(), "argument " + std::to_string(i) + " must be a number");
  return info[i].As<Napi::Number>().DoubleValue();
}

int64_t integer(const Napi::CallbackInfo& info, size_t i, int64_t low, int64_t high) {
  const double value = number(info, i);
  if (!(value >= static_cast<double>(low) && value <= static_cast<double>(high)) || value != std::floor(value))
    throw Napi::RangeError::New(info.Env(), "argument " + std::to_string(i) + " must be a whole number from " +
                                                std::to_string(low) + " to " + std::to_string(high));
  return static_cast<int64_t>(value);
}

constexpr int64_t kMaxSize = int64_t{1} << 52;

template <typename T>
T& find(Napi::Env env, std::map<uint32_t, T>& table, int64_t id, const char* what) {
  const auto found = table.find(static_cast<uint32_t>(id));
  if (found == table.end()) fail(env, std::string("this ") + what + " was disposed");
  return found->second;
}

template <typename T>
T& handle(const Napi::CallbackInfo& info, size_t i, std::map<uint32_t, T>& table, const char* what) {
  return find(info.Env(), table, integer(info, i, 0, UINT32_MAX), what);
}

void settle(Napi::Env env, Napi::Function, DeviceEntry* entry, Outcome* raw) {
  const std::unique_ptr<Outcome> outcome(raw);
  if (env == nullptr) return;  // the environment is going away: nobody listens
  if (--entry->pending == 0 && !entry->closed) entry->settle.Unref(env);
  if (outcome->error.empty()) {
    try {
      outcome->deferred.Resolve(outcome->result ? outcome->result(env) : env.Undefined());
    } catch (const Napi::Error& error) {
      outcome->deferred.Reject(error.Value());
    }
    return;
  }
  Napi::Error error = Napi::Error::New(env, outcome->error);
  error.Set("code", Napi::String::New(env, outcome->code));
  outcome->deferred.Reject(error.Value());
}

// Queues `work` (on the device's thread) and promises what it leaves in the outcome.
Napi::Value enqueue(Napi::Env env, const std::shared_ptr<DeviceEntry>& entry, std::function<void(Outcome&)> work) {
  auto* outcome = new Outcome{Napi::Promise::Deferred::New(env), nullptr, ""};
  const Napi::Value promise = outcome->deferred.Promise();
  DeviceEntry* raw = entry.get();
  const bool taken = entry->device->submit([raw, outcome, work = std::move(work)] {
    try {
      work(*outcome);
    } catch (const std::bad_alloc&) {
      outcome->error = "out of host memory";
    } catch (const FileChanged& error) {
      outcome->error = error.what();
      outcome->code = "ERR_FILE_CHANGED";
    } catch (const std::exception& error) {
      outcome->error = error.what();
    }
    if (raw->settle.BlockingCall(outcome) != napi_ok) delete outcome;
  });
  if (!taken) {
    delete outcome;
    fail(env, "this device was disposed");
  }
  if (entry->pending++ == 0) entry->settle.Ref(env);
  return promise;
}

void close_entry(void* data) {
  auto* held = static_cast<std::shared_ptr<DeviceEntry>*>(data);
  DeviceEntry& entry = **held;
  if (!entry.closed) {
    entry.closed = true;
    entry.device->stop();
    entry.settle.Release();
  }
  delete held;
}

// (backend: string, index: number, threads: number) -> handle
Napi::Value open_device(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  const std::string backend = info[0].ToString();
  const int index = static_cast<int>(integer(info, 1, 0, 1023));
  const int threads = static_cast<int>(integer(info, 2, 0, 1024));
  auto entry = std::make_shared<DeviceEntry>();
  try {
    entry->device = std::make_shared<Device>(backend, index, threads);
  } catch (const std::exception& error) {
    fail(env, error.what());
  }
  entry->settle = Settle::New(env, "ropewalk device", 0, 1, entry.get());
  entry->settle.Unref(env);
  // Registered after the thread-safe function, so that it runs before that is torn down: the thread is then gone.
  auto* held = new std::shared_ptr<DeviceEntry>(entry);
  entry->held = held;
  napi_add_env_cleanup_hook(env, close_entry, held);
  const uint32_t id = addon(info).next++;
  addon(info).devices.emplace(id, std::move(entry));
  return Napi::Number::New(env, id);
}

// (device) -> { description, workspaceBytes }
Napi::Value describe(const Napi::CallbackInfo& info) {
  Device& device = *handle(info, 0, addon(info).devices, "device")->device;
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("description", device.backend().describe(device.handle()));
  result.Set("workspaceBytes", static_cast<double>(device.backend().workspace));
  return result;
}

Napi::Object memory_object(Napi::Env env, uint64_t free_bytes, uint64_t total_bytes) {
  Napi::Object result = Napi::Object::New(env);
  result.Set("freeBytes", static_cast<double>(free_bytes));
  result.Set("totalBytes", static_cast<double>(total_bytes));
  return result;
}

// (device) -> { freeBytes, totalBytes }, undefined where it uses the host's memory
Napi::Value memory(const Napi::CallbackInfo& info) {
  Device& device = *handle(info, 0, addon(info).devices, "device")->device;
  uint64_t free_bytes = 0, total_bytes = 0;
  if (device.backend().memory(device.handle(), &free_bytes, &total_bytes) != RW_OK)
    fail(info.Env(), device.backend().last_error());
  return total_bytes ? memory_object(info.Env(), free_bytes, total_bytes) : info.Env().Undefined();
}

// (device): ends the running plan and those queued
void cancel(const Napi::CallbackInfo& info) { handle(info, 0, addon(info).devices, "device")->device->cancel(); }

Napi::Value add_buffer(const Napi::CallbackInfo& info, std::shared_ptr<Buffer> buffer) {
  const uint32_t id = addon(info).next++;
  addon(info).buffers.emplace(id, std::move(buffer));
  addon(info).buffer_device.emplace(id, static_cast<uint32_t>(info[0].As<Napi::Number>().Uint32Value()));
  return Napi::Number::New(info.Env(), id);
}

// (device, bytes, host: pinned memory of the host?) -> handle
Napi::Value alloc(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  const auto& entry = handle(info, 0, addon(info).devices, "device");
  const int64_t bytes = integer(info, 1, 1, kMaxSize);
  std::shared_ptr<Buffer> buffer;
  try {
    buffer = std::make_shared<Buffer>(entry->device, static_cast<size_t>(bytes), info[2].ToBoolean());
  } catch (const std::exception& error) {
    fail(env, error.what());
  }
  return add_buffer(info, std::move(buffer));
}

// (device, fd, path: string) -> { buffer, bytes }, a buffer that is the file and cannot be written; undefined where the
// device or the system cannot use a file in place
Napi::Value map_file(const Napi::CallbackInfo& info) {
  const auto& device = handle(info, 0, addon(info).devices, "device")->device;
  const int fd = static_cast<int>(integer(info, 1, 0, INT32_MAX));
  if (!device->backend().host_visible(device->handle())) return info.Env().Undefined();
  auto file = Mapping::open(fd, info[2].ToString());
  if (!file) return info.Env().Undefined();
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("bytes", static_cast<double>(file->bytes()));
  result.Set("buffer", add_buffer(info, std::make_shared<Buffer>(device, std::move(file))));
  return result;
}

void free_buffer(const Napi::CallbackInfo& info) {
  const uint32_t id = static_cast<uint32_t>(integer(info, 0, 0, UINT32_MAX));
  addon(info).buffers.erase(id);
  addon(info).buffer_device.erase(id);
}

const std::shared_ptr<DeviceEntry>& device_of(const Napi::CallbackInfo& info, size_t i) {
  const uint32_t device = handle(info, i, addon(info).buffer_device, "buffer");
  return find(info.Env(), addon(info).devices, device, "device");
}

void check_range(const Napi::CallbackInfo& info, const Buffer& buffer, int64_t offset, int64_t bytes) {
  if (offset > static_cast<int64_t>(buffer.bytes()) || bytes > static_cast<int64_t>(buffer.bytes()) - offset)
    throw Napi::RangeError::New(info.Env(), std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
                                                " do not lie inside a buffer of " + std::to_string(buffer.bytes()));
}

void check_writable(const Napi::CallbackInfo& info, const Buffer& buffer) {
  if (buffer.file())
    throw Napi::TypeError::New(info.Env(), buffer.file()->path() + " is used in place: it is only read");
}

// (buffer, offset, bytes: Uint8Array) -> promise. The bytes are copied at once: the caller may reuse its array.
Napi::Value upload(const Napi::CallbackInfo& info) {
  std::shared_ptr<Buffer> buffer = handle(info, 0, addon(info).buffers, "buffer");
  const int64_t offset = integer(info, 1, 0, kMaxSize);
  if (!info[2].IsTypedArray()) throw Napi::TypeError::New(info.Env(), "argument 2 must be a Uint8Array");
  const auto array = info[2].As<Napi::Uint8Array>();
  check_range(info, *buffer, offset, static_cast<int64_t>(array.ByteLength()));
  check_writable(info, *buffer);
  auto bytes = std::make_shared<std::vector<uint8_t>>(array.Data(), array.Data() + array.ByteLength());
  return enqueue(info.Env(), device_of(info, 0), [buffer, offset, bytes](Outcome&) {
    buffer->upload(static_cast<size_t>(offset), bytes->data(), bytes->size());
  });
}

// (buffer, offset, bytes: number) -> promise of a Uint8Array
Napi::Value download(const Napi::CallbackInfo& info) {
  std::shared_ptr<Buffer> buffer = handle(info, 0, addon(info).buffers, "buffer");
  const int64_t offset = integer(info, 1, 0, kMaxSize), size = integer(info, 2, 0, int64_t{1} << 30);
  check_range(info, *buffer, offset, size);
  return enqueue(info.Env(), device_of(info, 0), [buffer, offset, size](Outcome& outcome) {
    auto bytes = std::make_shared<std::vector<uint8_t>>(static_cast<size_t>(size));
    buffer->download(static_cast<size_t>(offset), bytes->data(), bytes->size());
    outcome.result = [bytes](Napi::Env env) -> Napi::Value {
      Napi::ArrayBuffer copy = Napi::ArrayBuffer::New(env, bytes->size());
      std::memcpy(copy.Data(), bytes->data(), bytes->size());
      return Napi::Uint8Array::New(env, bytes->size(), copy, 0);
    };
  });
}

// (buffer, offset, dtype, fd, file offset, file dtype, count) -> promise of the index of the first NaN or infinity, or
// -1
Napi::Value read(const Napi::CallbackInfo& info) {
  std::shared_ptr<Buffer> buffer = handle(info, 0, addon(info).buffers, "buffer");
  const int64_t offset = integer(info, 1, 0, kMaxSize);
  const auto dtype = static_cast<DType>(integer(info, 2, 0, kPlainDTypes - 1));
  const int fd = static_cast<int>(integer(info, 3, 0, INT32_MAX));
  const int64_t file_offset = integer(info, 4, 0, kMaxSize);
  const auto file_dtype = static_cast<FileDType>(integer(info, 5, 0, kFileDTypes - 1));
  const int64_t count = integer(info, 6, 0, kMaxSize / 8);
  const bool same = static_cast<int>(dtype) == static_cast<int>(file_dtype);
  const bool floats = is_float(dtype) && (file_dtype >= FileDType::f16 || is_float(static_cast<DType>(file_dtype)));
  if (!same && !floats) throw Napi::TypeError::New(info.Env(), "integers are not converted to floating point or back");
  check_range(info, *buffer, offset, count * dtype_bytes(dtype));
  check_writable(info, *buffer);
  return enqueue(info.Env(), device_of(info, 0), [=](Outcome& outcome) {
    const int64_t bad = read_file(*buffer, static_cast<size_t>(offset), dtype, fd, file_offset, file_dtype, count);
    outcome.result = [bad](Napi::Env env) -> Napi::Value { return Napi::Number::New(env, static_cast<double>(bad)); };
  });
}

// (buffer, offset, dtype, count) -> promise of the index of the first NaN or infinity, or -1
Napi::Value find_not_finite(const Napi::CallbackInfo& info) {
  std::shared_ptr<Buffer> buffer = handle(info, 0, addon(info).buffers, "buffer");
  const int64_t offset = integer(info, 1, 0, kMaxSize);
  const auto dtype = static_cast<DType>(integer(info, 2, 0, kPlainDTypes - 1));
  const int64_t count = integer(info, 3, 0, kMaxSize / 8);
  check_range(info, *buffer, offset, count * dtype_bytes(dtype));
  if (!buffer->file()) throw Napi::TypeError::New(info.Env(), "argument 0 must be a file that is used in place");
  return enqueue(info.Env(), device_of(info, 0), [=](Outcome& outcome) {
    const int64_t bad = first_not_finite(*buffer, static_cast<size_t>(offset), dtype, count);
    outcome.result = [bad](Napi::Env env) -> Napi::Value { return Napi::Number::New(env, static_cast<double>(bad)); };
  });
}

// The buffers of a device whose handles argument `i`, a Uint32Array, has.
std::vector<std::shared_ptr<Buffer>> buffers_of(const Napi::CallbackInfo& info, size_t i,
                                                const std::shared_ptr<Device>& device) {
  if (!info[i].IsTypedArray())
    throw Napi::TypeError::New(info.Env(), "argument " + std::to_string(i) + " must be a Uint32Array");
  const auto ids = info[i].As<Napi::Uint32Array>();
  std::vector<std::shared_ptr<Buffer>> buffers;
  for (size_t at = 0; at < ids.ElementLength(); at++) {
    buffers.push_back(find(info.Env(), addon(info).buffers, ids[at], "buffer"));
    if (buffers.back()->device() != device) fail(info.Env(), "a buffer belongs to another device");
  }
  return buffers;
}

// (device, name, words: Float64Array, buffers: Uint32Array) -> handle
Napi::Value load_plan(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  auto plan = std::make_shared<Plan>(handle(info, 0, addon(info).devices, "device"));
  const std::string name = info[1].ToString();
  if (!info[2].IsTypedArray()) throw Napi::TypeError::New(env, "argument 2 must be a Float64Array");
  const auto words = info[2].As<Napi::Float64Array>();
  plan->buffers = buffers_of(info, 3, plan->entry->device);
  std::vector<Memory> memory;
  for (const auto& buffer : plan->buffers) memory.push_back({buffer->base(), buffer->bytes()});
  try {
    plan->decoded = decode_plan(name, words.Data(), words.ElementLength(), memory);
  } catch (const std::exception& error) {
    fail(env, "plan \"" + name + "\": " + error.what());
  }
  const uint32_t id = addon(info).next++;
  const uint32_t device = static_cast<uint32_t>(info[0].As<Napi::Number>().Uint32Value());
  addon(info).plans.emplace(id, std::make_pair(device, std::move(plan)));
  return Napi::Number::New(env, id);
}

void free_plan(const Napi::CallbackInfo& info) {
  addon(info).plans.erase(static_cast<uint32_t>(integer(info, 0, 0, UINT32_MAX)));
}

// (plan) -> promise
Napi::Value run(const Napi::CallbackInfo& info) {
  const auto& [device, plan] = handle(info, 0, addon(info).plans, "plan");
  const auto& entry = find(info.Env(), addon(info).devices, device, "device");
  const uint64_t ticket = entry->device->next_ticket();
  return enqueue(info.Env(), entry, [plan = plan, ticket](Outcome& outcome) {
    if (plan->entry->device->run(plan->decoded, ticket) == RW_CANCELLED) {
      outcome.error = "plan \"" + plan->decoded.name + "\" was cancelled";
      outcome.code = "ERR_CANCELLED";
      return;
    }
    for (const auto& buffer : plan->buffers) buffer->check();
  });
}

// (device): waits for the operation that is running, drops what is queued, frees what only this device held
void close_device(const Napi::CallbackInfo& info) {
  const uint32_t id = static_cast<uint32_t>(integer(info, 0, 0, UINT32_MAX));
  const auto found = addon(info).devices.find(id);
  if (found == addon(info).devices.end()) return;
  DeviceEntry& entry = *found->second;
  if (entry.pending > 0) fail(info.Env(), "this device is still at work: await its promises before it is disposed");
  entry.device->stop();
  entry.closed = true;
  entry.settle.Release();
  napi_remove_env_cleanup_hook(info.Env(), close_entry, entry.held);
  delete entry.held;
  for (auto it = addon(info).plans.begin(); it != addon(info).plans.end();)
    it = it->second.first == id ? addon(info).plans.erase(it) : std::next(it);
  for (auto it = addon(info).buffer_device.begin(); it != addon(info).buffer_device.end();) {
    if (it->second == id) {
      addon(info).buffers.erase(it->first);
      it = addon(info).buffer_device.erase(it);
    } else {
      ++it;
    }
  }
  addon(info).devices.erase(found);
}

// (path, fault: string, empty where nothing speaks against it)
void use_cuda_library(const Napi::CallbackInfo& info) { set_cuda_library(info[0].ToString(), info[1].ToString()); }

// () -> [{ name, available, detail, memory?: { freeBytes, totalBytes } }]
Napi::Value backends(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Napi::Array result = Napi::Array::New(env);
  for (const BackendStatus& status : list_backends()) {
    Napi::Object row = Napi::Object::New(env);
    row.Set("name", status.name);
    row.Set("available", status.available);
    row.Set("detail", status.detail);
    if (status.total_bytes) row.Set("memory", memory_object(env, status.free_bytes, status.total_bytes));
    result.Set(result.Length(), row);
  }
  return result;
}

// What follows is for `ropewalk bench`, which alone may block JavaScript's thread.

// (path: string, or '' for the usual names) -> { path, config, core }
Napi::Value blas_open(const Napi::CallbackInfo& info) {
  const blas::Library& library = blas::open(info[0].ToString());
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("path", library.path);
  result.Set("config", library.config);
  result.Set("core", library.core);
  return result;
}

// (a transposed, b transposed, m, n, k, repeats, threads) -> seconds
Napi::Value blas_sgemm(const Napi::CallbackInfo& info) {
  int sizes[5];
  for (size_t i = 0; i < 5; i++) sizes[i] = static_cast<int>(integer(info, i + 2, 1, 1 << 20));
  return Napi::Number::New(info.Env(), blas::sgemm(info[0].ToBoolean(), info[1].ToBoolean(), sizes[0], sizes[1],
                                                   sizes[2], sizes[3], sizes[4]));
}

// (bytes, repeats, threads) -> seconds
template <auto use>
Napi::Value use_memory(const Napi::CallbackInfo& info) {
  const auto count = [&](size_t i) { return static_cast<int>(integer(info, i, 1, 1 << 20)); };
  return Napi::Number::New(info.Env(), use(static_cast<size_t>(integer(info, 0, 1, kMaxSize)), count(1), count(2)));
}

// (device, path: string, or '' for the usual names) -> one line for people
Napi::Value peer_open(const Napi::CallbackInfo& info) {
  Device& device = *handle(info, 0, addon(info).devices, "device")->device;
  return Napi::String::New(info.Env(), device.open_peer(info[1].ToString()));
}

// (device, dtype, a transposed, b transposed, m, n, k, matrices: Uint32Array of a, b, c of each set, repeats) ->
// promise
Napi::Value peer_multiply(const Napi::CallbackInfo& info) {
  const auto& entry = handle(info, 0, addon(info).devices, "device");
  const auto size = [&](size_t i) { return integer(info, i, 1, 1 << 24); };
  const auto dtype = static_cast<int32_t>(integer(info, 1, 0, 1));
  const rw_product product = {dtype, info[2].ToBoolean(), info[3].ToBoolean(), size(4), size(5), size(6)};
  const auto matrices = buffers_of(info, 7, entry->device);
  const auto repeats = static_cast<size_t>(size(8));
  Device* device = entry->device.get();
  return enqueue(info.Env(), entry, [=](Outcome&) { device->multiply(product, matrices, repeats); });
}

Napi::Object export_all(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new Addon());
  char hash[17];
  std::snprintf(hash, sizeof(hash), "%016llx", static_cast<unsigned long long>(table_hash));
  exports.Set("tableHash", hash);
  exports.Set("useCudaLibrary", Napi::Function::New<use_cuda_library>(env));
  exports.Set("backends", Napi::Function::New<backends>(env));
  exports.Set("openDevice", Napi::Function::New<open_device>(env));
  exports.Set("closeDevice", Napi::Function::New<close_device>(env));
  exports.Set("describe", Napi::Function::New<describe>(env));
  exports.Set("memory", Napi::Function::New<memory>(env));
  exports.Set("cancel", Napi::Function::New<cancel>(env));
  exports.Set("alloc", Napi::Function::New<alloc>(env));
  exports.Set("mapFile", Napi::Function::New<map_file>(env));
  exports.Set("free", Napi::Function::New<free_buffer>(env));
  exports.Set("upload", Napi::Function::New<upload>(env));
  exports.Set("download", Napi::Function::New<download>(env));
  exports.Set("read", Napi::Function::New<read>(env));
  exports.Set("findNotFinite", Napi::Function::New<find_not_finite>(env));
  exports.Set("loadPlan", Napi::Function::New<load_plan>(env));
  exports.Set("freePlan", Napi::Function::New<free_plan>(env));
  exports.Set("run", Napi::Function::New<run>(env));
  exports.Set("blasOpen", Napi::Function::New<blas_open>(env));
  exports.Set("blasSgemm", Napi::Function::New<blas_sgemm>(env));
  exports.Set("peerOpen", Napi::Function::New<peer_open>(env));
  exports.Set("peerMultiply", Napi::Function::New<peer_multiply>(env));
  exports.Set("copyMemory", Napi::Function::New<use_memory<blas::copy>>(env));
  exports.Set("readMemory", Napi::Function::New<use_memory<blas::read>>(env));
  return exports;
}

}  // namespace
}  // namespace rw

static Napi::Object init(Napi::Env env, Napi::Object exports) { return rw::export_all(env, exports); }

NODE_API_MODULE(ropewalk, init)
