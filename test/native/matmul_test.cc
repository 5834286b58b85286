// matmul_nn, matmul_nt, matmul_tn and linear_cross_entropy of every instruction set of this CPU, against float64: error
// at most 1.5 times that of the naive loops in f32, poisoned outputs and scratch, canaries around every tensor, and the
// same bits with 1, 2 and 3 threads. Under a sanitizer the canaries give way to its own red zones.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/backend.h"
#include "cpu/cpu.h"

namespace {

using namespace rw;

int passed = 0, failed = 0, skipped = 0;

void check(bool ok, const char* what, const char* isa, int64_t m, int64_t n, int64_t k, int variant) {
  if (ok) {
    passed++;
  } else if (failed++ < 20) {
    printf("failed: %s, %s, %lld x %lld x %lld, variant %d\n", what, isa, static_cast<long long>(m),
           static_cast<long long>(n), static_cast<long long>(k), variant);
  }
}

bool tiles = false;  // whether the kernels under test may use them

class Threads final : public cpu::Context {
 public:
  explicit Threads(int count) : memory_(count), size_(count) {}
  ~Threads() { forget(); }
  int threads() const override { return static_cast<int>(memory_.size()); }
  bool permutes_bytes() const override { return false; }
  bool has_tiles() const override { return tiles; }
  void run_tasks(int64_t tasks, cpu::TaskBody body, void* data) override {
    std::atomic<int64_t> next{0};
    auto work = [&](int thread) {
      for (int64_t task; (task = next++) < tasks;) body(data, task, thread);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads(); i++) others.emplace_back(work, i);
    work(0);
    for (auto& thread : others) thread.join();
  }
  void* scratch(int thread, size_t bytes) override {
    if (size_[thread] < bytes) {
      free(memory_[thread]);
      size_[thread] = (bytes + 63) / 64 * 64;
      memory_[thread] = aligned_alloc(64, size_[thread]);
      memset(memory_[thread], 0xff, size_[thread]);
    }
    return memory_[thread];
  }
  void forget() {
    for (size_t i = 0; i < memory_.size(); i++) {
      free(memory_[i]);
      memory_[i] = nullptr;
      size_[i] = 0;
    }
  }

 private:
  std::vector<void*> memory_;
  std::vector<size_t> size_;
};

uint32_t seed = 1;
float random_value() {
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(seed)) * (1.0f / 2147483648.0f);
}

float round_to(DType dtype, float x) {
  if (dtype == DType::f32 || x != x) return x;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  memcpy(&x, &bits, 4);
  return x;
}

// A matrix between canaries. All bits set: NaN as f32 and as bf16, so that what is read outside or not written shows.
class Data {
 public:
  Data(DType dtype, int64_t rows, int64_t columns)
      : tensor_{nullptr, dtype, 2, {rows, columns}}, bytes_(rows * columns * dtype_bytes(dtype)) {
    memory_ = static_cast<unsigned char*>(malloc(bytes_ + 2 * margin));
    memset(memory_, 0xff, bytes_ + 2 * margin);
    tensor_.data = memory_ + margin;
  }
  Data(const Data& other) : Data(other.tensor_.dtype, other.tensor_.dims[0], other.tensor_.dims[1]) {
    memcpy(memory_, other.memory_, bytes_ + 2 * margin);
  }
  Data& operator=(const Data&) = delete;
  ~Data() { free(memory_); }

  Data& fill(float scale = 1) {
    for (int64_t i = 0; i < size(); i++) set(i, random_value() * scale);
    return *this;
  }
  int64_t size() const { return tensor_.dims[0] * tensor_.dims[1]; }
  const Tensor& tensor() const { return tensor_; }
  float operator[](int64_t i) const {
    if (tensor_.dtype == DType::f32) return tensor_.as<float>()[i];
    uint32_t bits = static_cast<uint32_t>(tensor_.as<uint16_t>()[i]) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
  void set(int64_t i, float x) {
    if (tensor_.dtype == DType::f32) {
      tensor_.as<float>()[i] = x;
    } else {
      x = round_to(DType::bf16, x);
      uint32_t bits;
      memcpy(&bits, &x, 4);
      tensor_.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  bool intact() const {
    for (size_t i = 0; i < margin; i++)
      if (memory_[i] != 0xff || memory_[margin + bytes_ + i] != 0xff) return false;
    return true;
  }
  bool same(const Data& other) const { return memcmp(tensor_.data, other.tensor_.data, bytes_) == 0; }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t margin = 0;
#else
  static constexpr size_t margin = 256;
#endif
  Tensor tensor_;
  size_t bytes_;
  unsigned char* memory_;
};

// What the result should be, and what plain loops in f32 would make of it.
struct Expected {
  std::vector<double> exact;
  std::vector<float> naive;
  explicit Expected(int64_t size) : exact(size), naive(size) {}
};

bool accurate(const Data& result, const Expected& expected) {
  double error = 0, naive = 0, scale = 0;
  for (int64_t i = 0; i < result.size(); i++) {
    double x = result[i];
    if (!(std::fabs(x) < 1e30)) return false;
    error = std::fmax(error, std::fabs(x - expected.exact[i]));
    naive = std::fmax(naive, std::fabs(round_to(result.tensor().dtype, expected.naive[i]) - expected.exact[i]));
    scale = std::fmax(scale, std::fabs(expected.exact[i]));
  }
  return error <= 1.5 * naive + 3 * 1.2e-7 * scale;
}

struct Isa {
  const char* name;
  void (*nn)(cpu::Context&, const matmul_nn_args&);
  void (*nt)(cpu::Context&, const matmul_nt_args&);
  void (*tn)(cpu::Context&, const matmul_tn_args&);
  void (*fwd)(cpu::Context&, const linear_cross_entropy_fwd_args&);
  void (*bwd)(cpu::Context&, const linear_cross_entropy_bwd_args&);
};

enum Layout { nn, nt, tn };

// variant: bits 0 to 2 say which of a, b, c are bf16; then 0 no add, 1 add to another tensor, 2 in place.
void test_matmul(const Isa& isa, Layout layout, int64_t m, int64_t n, int64_t k, int variant) {
  const auto dtype = [&](int bit) { return variant >> bit & 1 ? DType::bf16 : DType::f32; };
  const int add_mode = variant >> 3;
  Data a(dtype(0), layout == tn ? k : m, layout == tn ? m : k), b(dtype(1), layout == nt ? n : k, layout == nt ? k : n);
  Data add(dtype(2), m, n);
  a.fill(), b.fill(), add.fill();

  const auto run = [&](int threads, Data& c) {
    Threads context(threads);
    Tensor added = add_mode == 0 ? Tensor{} : add_mode == 1 ? add.tensor() : c.tensor();
    if (layout == nn) isa.nn(context, {a.tensor(), b.tensor(), added, c.tensor()});
    if (layout == nt) isa.nt(context, {a.tensor(), b.tensor(), added, c.tensor()});
    if (layout == tn) isa.tn(context, {a.tensor(), b.tensor(), added, c.tensor()});
  };
  const Data blank(dtype(2), m, n);
  const Data& start = add_mode == 2 ? add : blank;
  const Data a_before(a), b_before(b), add_before(add);
  Data c(start);
  run(1, c);

  Expected expected(m * n);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      double exact = 0;
      float naive = 0;
      for (int64_t l = 0; l < k; l++) {
        const float x = a[layout == tn ? l * m + i : i * k + l], y = b[layout == nt ? j * k + l : l * n + j];
        exact += static_cast<double>(x) * y;
        naive += x * y;
      }
      expected.exact[i * n + j] = exact + (add_mode ? add[i * n + j] : 0);
      expected.naive[i * n + j] = naive + (add_mode ? add[i * n + j] : 0);
    }
  const char* name[] = {"matmul_nn", "matmul_nt", "matmul_tn"};
  check(accurate(c, expected), name[layout], isa.name, m, n, k, variant);
  check(c.intact() && a.intact() && b.intact() && a.same(a_before) && b.same(b_before) && add.same(add_before),
        "only c is written", isa.name, m, n, k, variant);
  if (m * n * k <= 64 * 64 * 64) return;
  for (int threads = 2; threads <= 3; threads++) {
    Data again(start);
    run(threads, again);
    check(again.same(c) && again.intact(), "same bits with more threads", isa.name, m, n, k, variant);
  }
}

// variant: bits 0 and 1 say whether x and w are bf16; then 0 no dw_add, 1 another tensor, 2 in place.
void test_cross_entropy(const Isa& isa, int64_t n, int64_t c, int64_t v, int64_t chunk, int variant) {
  const DType x_dtype = variant & 1 ? DType::bf16 : DType::f32, w_dtype = variant & 2 ? DType::bf16 : DType::f32;
  const int add_mode = variant >> 2;
  Data x(x_dtype, n, c), w(w_dtype, v, c), weight(DType::f32, n, 1), add(DType::f32, v, c);
  x.fill(2), w.fill(2), weight.fill(), add.fill();
  Data labels(DType::f32, n, 1);
  int32_t* label = static_cast<int32_t*>(labels.tensor().data);
  for (int64_t i = 0; i < n; i++) label[i] = i % 5 == 3 ? (i % 2 ? -1 : -100) : static_cast<int32_t>(i * 7919 % v);
  if (n > 6) label[6] = static_cast<int32_t>(v);

  Expected nll(n), dx(n * c), dw(v * c);
  for (int64_t i = 0; i < v * c && add_mode; i++) dw.exact[i] = dw.naive[i] = add[i];
  for (int64_t i = 0; i < n; i++) {
    if (label[i] < 0 || label[i] >= v) continue;
    std::vector<double> z(v);
    std::vector<float> y(v);
    double top = -1e30, total = 0;
    float naive_top = -1e30f, naive_total = 0;
    for (int64_t j = 0; j < v; j++) {
      for (int64_t l = 0; l < c; l++) {
        z[j] += static_cast<double>(x[i * c + l]) * w[j * c + l];
        y[j] += x[i * c + l] * w[j * c + l];
      }
      top = std::fmax(top, z[j]);
      naive_top = std::fmax(naive_top, y[j]);
    }
    for (int64_t j = 0; j < v; j++) {
      total += std::exp(z[j] - top);
      naive_total += std::exp(y[j] - naive_top);
    }
    nll.exact[i] = top - z[label[i]] + std::log(total);
    nll.naive[i] = naive_top - y[label[i]] + std::log(naive_total);
    for (int64_t j = 0; j < v; j++) {
      const double dz = weight[i] * (std::exp(z[j] - top) / total - (j == label[i]));
      const float dy = weight[i] * (std::exp(y[j] - naive_top) / naive_total - static_cast<float>(j == label[i]));
      for (int64_t l = 0; l < c; l++) {
        dx.exact[i * c + l] += dz * w[j * c + l];
        dx.naive[i * c + l] += dy * w[j * c + l];
        dw.exact[j * c + l] += dz * x[i * c + l];
        dw.naive[j * c + l] += dy * x[i * c + l];
      }
    }
  }

  const Data blank(DType::f32, v, c);
  Data first_dx(x_dtype, n, c), first_dw(DType::f32, v, c);
  for (int threads = 1; threads <= 3; threads++) {
    Threads context(threads);
    Data logits(DType::f32, chunk, v), nll_fwd(DType::f32, n, 1), nll_bwd(DType::f32, n, 1), out_dx(x_dtype, n, c);
    Data out_dw(add_mode == 2 ? add : blank);
    const Tensor added = add_mode == 0 ? Tensor{} : add_mode == 1 ? add.tensor() : out_dw.tensor();
    isa.fwd(context, {x.tensor(), w.tensor(), labels.tensor(), nll_fwd.tensor(), logits.tensor(), chunk});
    isa.bwd(context, {x.tensor(), w.tensor(), labels.tensor(), weight.tensor(), added, nll_bwd.tensor(),
                      out_dx.tensor(), out_dw.tensor(), logits.tensor(), chunk});
    if (threads == 1) {
      memcpy(first_dx.tensor().data, out_dx.tensor().data, n * c * dtype_bytes(x_dtype));
      memcpy(first_dw.tensor().data, out_dw.tensor().data, v * c * sizeof(float));
    }
    check(accurate(nll_fwd, nll), "nll", isa.name, n, c, v, variant);
    check(nll_bwd.same(nll_fwd), "nll of the backward pass", isa.name, n, c, v, variant);
    check(accurate(out_dx, dx), "dx", isa.name, n, c, v, variant);
    check(accurate(out_dw, dw), "dw", isa.name, n, c, v, variant);
    check(out_dx.same(first_dx) && out_dw.same(first_dw), "same bits with more threads", isa.name, n, c, v, variant);
    check(logits.intact() && nll_fwd.intact() && nll_bwd.intact() && out_dx.intact() && out_dw.intact(), "canaries",
          isa.name, n, c, v, variant);
  }
}

// A NaN or an infinity in a row of x makes that row's nll NaN and leaves the others alone.
void test_not_finite(const Isa& isa) {
  const int64_t n = 5, c = 9, v = 70;
  Data x(DType::f32, n, c), w(DType::f32, v, c), labels(DType::f32, n, 1), nll(DType::f32, n, 1);
  Data logits(DType::f32, n, v), clean(DType::f32, n, 1);
  x.fill(), w.fill();
  memset(labels.tensor().data, 0, n * sizeof(int32_t));
  Threads context(1);
  isa.fwd(context, {x.tensor(), w.tensor(), labels.tensor(), clean.tensor(), logits.tensor(), n});
  x.set(1 * c + 3, NAN);
  x.set(2 * c + 8, INFINITY);
  x.set(3 * c, -INFINITY);
  isa.fwd(context, {x.tensor(), w.tensor(), labels.tensor(), nll.tensor(), logits.tensor(), n});
  check(std::isnan(nll[1]) && std::isnan(nll[2]) && std::isnan(nll[3]), "not finite", isa.name, n, c, v, 0);
  check(nll[0] == clean[0] && nll[4] == clean[4], "finite rows unchanged", isa.name, n, c, v, 0);
}

void test(const Isa& isa) {
  int turn = 0;  // goes through all 24 combinations of dtypes and add, and the three layouts
  const auto all = [&](int64_t m, int64_t n, int64_t k) {
    for (Layout layout : {nn, nt, tn}) test_matmul(isa, layout, m, n, k, turn++ * 7 % 24);
  };
  for (int variant = 0; variant < 24; variant++)
    for (Layout layout : {nn, nt, tn}) {
      test_matmul(isa, layout, 3, 67, 261, variant);
      test_matmul(isa, layout, 31, 37, 517, variant);
      test_matmul(isa, layout, 131, 41, 523, variant);
      test_matmul(isa, layout, 129, 32, 19, variant);
    }
  for (int64_t m = 1; m <= 33; m++) all(m, 1 + m * 13 % 37, 1 + m * 29 % 53);
  for (int64_t n = 1; n <= 67; n++) all(1 + n * 5 % 19, n, 1 + n * 11 % 31);
  for (int64_t k = 1; k <= 67; k++) all(1 + k * 7 % 23, 1 + k * 3 % 41, k);
  for (int64_t m = 127; m <= 144; m++) all(m, 1 + m * 5 % 71, 1 + m * 3 % 23);
  for (int64_t k = 254; k <= 258; k++) all(17, 5, k), all(133, 33, k), all(5, 35, k);
  all(1, 1, 1), all(1, 1, 1031), all(1, 1031, 1), all(1031, 1, 1), all(700, 1, 7), all(1, 700, 300);
  all(129, 1100, 11), all(701, 67, 23), all(137, 577, 149), all(16, 129, 600), all(128, 130, 520);

  for (int variant = 0; variant < 12; variant++) {
    test_cross_entropy(isa, 11, 13, 67, 4, variant);
    test_cross_entropy(isa, 150, 19, 101, 140, variant);
  }
  for (int64_t v = 1; v <= 40; v++) test_cross_entropy(isa, 1 + v % 9, 1 + v * 5 % 11, v, 1 + v % 4, v % 12);
  test_cross_entropy(isa, 8, 67, 2053, 3, 5);
  test_not_finite(isa);
}

}  // namespace

int main() {
#define ISA(name)                          \
  Isa{#name,                               \
      cpu::name::matmul_nn,                \
      cpu::name::matmul_nt,                \
      cpu::name::matmul_tn,                \
      cpu::name::linear_cross_entropy_fwd, \
      cpu::name::linear_cross_entropy_bwd}
  test(ISA(baseline));
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) test(ISA(avx2));
  if (avx512) test(ISA(avx512));
  tiles = avx512 && cpu::avx512::kernels.use_tiles && cpu::enable_tiles();
  if (tiles) {
    Isa isa = ISA(avx512);
    isa.name = "amx";
    test(isa);
  }
  if (!avx2) skipped++, printf("avx2: skipped, this CPU does not have it\n");
  if (!avx512) skipped++, printf("avx512: skipped, this CPU does not have it\n");
  if (!tiles) skipped++, printf("amx: skipped, this CPU or this compiler does not have it\n");
  printf("matmul: %d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return failed ? 1 : 0;
}
