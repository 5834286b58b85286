// The C ABI of a backend: a table of functions, with the version of this file and the hash of ops.def.
// A backend sees device pointers and commands; it knows neither JavaScript nor models nor other backends.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

#define RW_BACKEND_ABI 3

typedef struct rw_device rw_device;

// One recorded operation: `args` points to the argument struct of row `op` of the table.
typedef struct rw_command {
  uint32_t op;
  const void* args;
} rw_command;

typedef struct rw_open_options {
  int32_t index;    // which device of this backend
  int32_t threads;  // CPU threads, 0 = one per available core
} rw_open_options;

// c (m,n) = a b; a is (m,k), stored as (k,m) where it is transposed, b is (k,n), stored as (n,k).
typedef struct rw_product {
  int32_t dtype;  // rw::DType of all three: f32 or bf16
  int32_t transpose_a, transpose_b;
  int64_t m, n, k;
} rw_product;

enum { RW_OK = 0, RW_ERROR = 1, RW_CANCELLED = 2 };

// Functions that return int give one of the above; after RW_ERROR, last_error() of the same thread says why.
// A device runs, uploads and downloads on one thread at a time; the others may be called from any thread.
typedef struct rw_backend {
  uint32_t abi;         // RW_BACKEND_ABI
  uint64_t table_hash;  // rw::table_hash
  const char* name;
  uint64_t workspace;  // bytes of device memory that an open device takes for itself
  int (*open)(const rw_open_options* options, rw_device** device);
  void (*close)(rw_device* device);
  // One line for people: instruction set and threads, or the card's name. Valid as long as the device.
  const char* (*describe)(rw_device* device);
  int (*alloc)(rw_device* device, size_t bytes, void** memory);
  void (*release)(rw_device* device, void* memory);
  // Memory of the host that the device's operations can use directly: pinned.
  int (*alloc_host)(rw_device* device, size_t bytes, void** memory);
  void (*release_host)(rw_device* device, void* memory);
  int (*upload)(rw_device* device, void* to, const void* from, size_t bytes);
  int (*download)(rw_device* device, void* to, const void* from, size_t bytes);
  // Whether the host may read and write the device's memory through the same pointers.
  int (*host_visible)(rw_device* device);
  // Bytes of memory of its own; both 0 for a device that uses the host's.
  int (*memory)(rw_device* device, uint64_t* free_bytes, uint64_t* total_bytes);
  // Runs the commands in order, and returns when they are done. `cancel` is read between commands, or small groups of
  // them; a non-zero value ends the run.
  int (*run)(rw_device* device, const char* plan, const rw_command* commands, size_t count, const int32_t* cancel);
  // These commands will not be run again: what a device keeps to repeat them can be freed.
  void (*forget)(rw_device* device, const rw_command* commands);
  const char* (*last_error)(void);
  // The maker's own matrix library, as a peer of `ropewalk bench`; both null where a backend knows none. It is opened
  // once, at `path` or, where that is empty, under its usual names; `description` is valid as long as the device.
  int (*peer_open)(rw_device* device, const char* path, const char** description);
  // Computes the product `repeats` times and returns when that is done. `matrices`: a, b, c of each set; the sets are
  // used in turn.
  int (*peer_multiply)(rw_device* device, const rw_product* product, void* const* matrices, size_t sets,
                       size_t repeats);
} rw_backend;

}  // extern "C"
