// What `ropewalk bench` compares with: OpenBLAS, opened at run time where it is installed, and plainly copying
// and reading memory.
#pragma once
#include <cstddef>
#include <string>

namespace rw::blas {

struct Library {
  std::string path;    // the name that was opened
  std::string config;  // version and build options, as the library says
  std::string core;    // the kernels that it chose for this processor
};

// Opens the library once; an empty path stands for the usual names. Throws std::runtime_error where there is none.
const Library& open(const std::string& path);

// Seconds that `repeats` products of random f32 matrices take, c = a b with a (m,k), b (k,n), each stored transposed
// where the flag says so. After open().
double sgemm(bool transpose_a, bool transpose_b, int m, int n, int k, int repeats, int threads);

// Seconds that `threads` threads take to copy `bytes` bytes `repeats` times.
double copy(size_t bytes, int repeats, int threads);

// And to read them: a core that only reads does not reach the rate of one that copies.
double read(size_t bytes, int repeats, int threads);

}  // namespace rw::blas
