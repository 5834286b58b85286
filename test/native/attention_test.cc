// The attention rows of every instruction set this CPU has, against a float64 reference: accuracy (at most 1.5 times
// the error of a naive computation in the same precision), finite differences, poisoned outputs and scratch, canaries,
// the same bits for any number of threads and order of tasks, and isolation of packed documents from NaN and infinity.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "cpu/backend.h"
#include "cpu/cpu.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes)
#endif

using namespace rw;

namespace {

int passed = 0, failed = 0, skipped = 0;

void check(bool ok, const std::string& what) {
  ok ? passed++ : failed++;
  if (!ok) printf("FAILED %s\n", what.c_str());
}

uint64_t random_state;
uint32_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(random_state >> 33);
}
int random_int(int n) { return static_cast<int>(random_bits() % static_cast<uint32_t>(n)); }
float random_real() { return static_cast<float>(random_bits()) / 1073741824.0f - 1; }

// Threads that take tasks in a shuffled order, and scratch memory that is full of NaN before every op.
bool tiles = false;  // whether the kernels under test may use them

class TestContext : public cpu::Context {
 public:
  explicit TestContext(int threads) : memory_(threads) {}
  int threads() const override { return static_cast<int>(memory_.size()); }
  bool permutes_bytes() const override { return false; }
  bool has_tiles() const override { return tiles; }
  void run_tasks(int64_t tasks, cpu::TaskBody body, void* data) override {
    std::vector<int64_t> order(tasks);
    for (int64_t i = 0; i < tasks; i++) order[i] = i;
    for (int64_t i = tasks - 1; i > 0; i--) std::swap(order[i], order[random_int(static_cast<int>(i + 1))]);
    std::atomic<int64_t> next{0};
    auto work = [&](int thread) {
      for (int64_t i; (i = next++) < tasks;) body(data, order[i], thread);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads(); i++) others.emplace_back(work, i);
    work(0);
    for (std::thread& other : others) other.join();
  }
  void* scratch(int thread, size_t bytes) override {
    Memory& own = memory_[thread];
    if (own.bytes < bytes) own.allocate(bytes);  // not a byte more, for the address sanitizer
    return own.data;
  }
  void poison() {
    for (Memory& own : memory_) own.poison();
  }

 private:
  struct Memory {
    float* data = nullptr;
    size_t bytes = 0;
    ~Memory() { operator delete(data, std::align_val_t(64)); }
    void allocate(size_t size) {
      operator delete(data, std::align_val_t(64));
      data = static_cast<float*>(operator new(size, std::align_val_t(64)));
      bytes = size;
      poison();
    }
    void poison() { std::fill(data, data + bytes / 4, NAN); }
  };
  std::vector<Memory> memory_;
};

// bf16 by its definition: the nearest of the two neighbours, ties to even.
uint16_t bf16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  uint32_t low = bits & 0xffff;
  return static_cast<uint16_t>((bits >> 16) + (low > 0x8000 || (low == 0x8000 && (bits >> 16 & 1))));
}
float bf16_value(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
float rounded(float x, DType type) { return type == DType::bf16 ? bf16_value(bf16_bits(x)) : x; }

// A tensor between canaries, starting as far from a 64-byte boundary as its dtype allows.
class Buffer {
 public:
  Buffer(DType type, std::vector<int64_t> dims) : tensor_() {
    tensor_.dtype = type;
    tensor_.ndim = static_cast<int32_t>(dims.size());
    std::copy(dims.begin(), dims.end(), tensor_.dims);
    bytes_.assign(2 * guard_ + tensor_.size() * dtype_bytes(type), canary_);
    tensor_.data = bytes_.data() + guard_;
    fill(NAN);
    ASAN_POISON_MEMORY_REGION(bytes_.data(), guard_);
    ASAN_POISON_MEMORY_REGION(bytes_.data() + bytes_.size() - guard_, guard_);
  }
  ~Buffer() { expose(); }
  Buffer(Buffer&&) = default;
  operator const Tensor&() const { return tensor_; }
  int64_t size() const { return tensor_.size(); }
  DType dtype() const { return tensor_.dtype; }
  float get(int64_t i) const {
    return dtype() == DType::bf16 ? bf16_value(tensor_.as<uint16_t>()[i]) : tensor_.as<float>()[i];
  }
  void set(int64_t i, float x) {
    if (dtype() == DType::bf16) tensor_.as<uint16_t>()[i] = bf16_bits(x);
    if (dtype() == DType::f32) tensor_.as<float>()[i] = x;
  }
  int32_t& index(int64_t i) { return tensor_.as<int32_t>()[i]; }
  void fill(float x) {
    for (int64_t i = 0; i < size(); i++) set(i, x);
  }
  void fill_random(float scale) {
    for (int64_t i = 0; i < size(); i++) set(i, random_real() * scale);
  }
  void fill_from(const std::vector<double>& values) {
    for (int64_t i = 0; i < size(); i++) set(i, static_cast<float>(values[i]));
  }
  template <typename Real>
  std::vector<Real> values() const {
    std::vector<Real> result(size());
    for (int64_t i = 0; i < size(); i++) result[i] = get(i);
    return result;
  }
  std::vector<unsigned char> bits() const { return {bytes_.begin() + guard_, bytes_.end() - guard_}; }
  bool intact() const {
    expose();
    for (size_t i = 0; i < guard_; i++)
      if (bytes_[i] != canary_ || bytes_[bytes_.size() - 1 - i] != canary_) return false;
    return true;
  }

 private:
  void expose() const { ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), bytes_.size()); }

  static constexpr size_t guard_ = 68;
  static constexpr unsigned char canary_ = 0xa5;
  std::vector<unsigned char> bytes_;
  Tensor tensor_;
};

enum class Mask { causal, packed, scattered, alone };

struct Shape {
  int64_t B, T, H, K, D;
  Mask mask;
};

std::string name_of(const Shape& s, DType type, const char* isa) {
  const char* masks[] = {"causal", "packed", "scattered", "alone"};
  char text[200];
  snprintf(text, sizeof(text), "%s %s B%d T%d H%d K%d D%d %s", isa, type == DType::bf16 ? "bf16" : "f32",
           static_cast<int>(s.B), static_cast<int>(s.T), static_cast<int>(s.H), static_cast<int>(s.K),
           static_cast<int>(s.D), masks[static_cast<int>(s.mask)]);
  return text;
}

constexpr int64_t table_rows = 300;

struct Inputs {
  Shape shape;
  Buffer q, k, v, dout, cos, sin, pos, first;
  float scale;

  Inputs(const Shape& s, DType type)
      : shape(s),
        q(type, {s.B, s.T, s.H, s.D}),
        k(type, {s.B, s.T, s.K, s.D}),
        v(type, {s.B, s.T, s.K, s.D}),
        dout(type, {s.B, s.T, s.H, s.D}),
        cos(DType::f32, {table_rows, s.D / 2}),
        sin(DType::f32, {table_rows, s.D / 2}),
        pos(DType::i32, {s.B, s.T}),
        first(DType::i32, {s.B, s.T}),
        scale(0.9f / std::sqrt(static_cast<float>(s.D))) {
    q.fill_random(2);
    k.fill_random(2);
    v.fill_random(1);
    dout.fill_random(1);
    for (int64_t i = 0; i < cos.size(); i++) {
      double angle = random_real() * 3;  // lengths other than 1, as YaRN has them
      cos.set(i, static_cast<float>(1.1 * std::cos(angle)));
      sin.set(i, static_cast<float>(1.1 * std::sin(angle)));
    }
    for (int64_t b = 0; b < s.B; b++) {
      int begin = 0;
      for (int t = 0; t < s.T; t++) {
        if (t && random_int(std::max<int>(2, static_cast<int>(s.T) / 4)) == 0) begin = t;
        pos.index(b * s.T + t) = random_int(table_rows);
        int choice[] = {0, begin, random_int(t + 1), t};
        first.index(b * s.T + t) = choice[static_cast<int>(s.mask)];
      }
    }
  }
};

// Rows against rows, all in Real. type: what rotated rows and results are rounded to; f32 leaves double alone.
template <typename Real>
struct Reference {
  std::vector<Real> o, lse, dq, dk, dv;
};

template <typename Real>
std::vector<Real> rotated(const Buffer& x, const Buffer& cos, const Buffer& sin, Buffer& pos, int64_t heads, int64_t D,
                          DType type, bool inverse, const std::vector<Real>* values = nullptr) {
  std::vector<Real> in = values ? *values : x.values<Real>(), out(in.size());
  int64_t E = D / 2;
  for (int64_t row = 0; row < static_cast<int64_t>(in.size()) / D; row++) {
    int64_t angle = pos.index(row / heads) * E;
    for (int64_t i = 0; i < E; i++) {
      Real c = cos.get(angle + i), s = sin.get(angle + i), a = in[row * D + i], b = in[row * D + E + i];
      if (inverse) s = -s;
      out[row * D + i] = a * c - b * s;
      out[row * D + E + i] = b * c + a * s;
    }
  }
  if (type == DType::bf16)
    for (Real& value : out) value = rounded(static_cast<float>(value), type);
  return out;
}

// keys of query t: first[t] .. last(t), rows of kr and v with `keys` a sequence
template <typename Real>
void forward_reference(const Shape& s, int64_t keys, const std::vector<Real>& qr, const std::vector<Real>& kr,
                       const std::vector<Real>& v, Buffer& first, const std::function<int64_t(int64_t, int64_t)>& last,
                       float scale, DType type, Reference<Real>& out) {
  out.o.assign(s.B * s.T * s.H * s.D, 0);
  out.lse.assign(s.B * s.H * s.T, 0);
  std::vector<Real> p(keys);
  for (int64_t b = 0; b < s.B; b++)
    for (int64_t h = 0; h < s.H; h++)
      for (int64_t t = 0; t < s.T; t++) {
        const Real* q = &qr[((b * s.T + t) * s.H + h) * s.D];
        int64_t from = first.index(b * s.T + t), to = last(b, t), head = h / (s.H / s.K);
        Real top = -INFINITY, total = 0;
        for (int64_t n = from; n <= to; n++) {
          const Real* k = &kr[((b * keys + n) * s.K + head) * s.D];
          Real dot = 0;
          for (int64_t d = 0; d < s.D; d++) dot += q[d] * k[d];
          p[n] = dot * scale;
          top = std::max(top, p[n]);
        }
        for (int64_t n = from; n <= to; n++) total += p[n] = std::exp(p[n] - top);
        Real* o = &out.o[((b * s.T + t) * s.H + h) * s.D];
        for (int64_t n = from; n <= to; n++)
          for (int64_t d = 0; d < s.D; d++) o[d] += p[n] / total * v[((b * keys + n) * s.K + head) * s.D + d];
        out.lse[(b * s.H + h) * s.T + t] = top + std::log(total);
      }
  if (type == DType::bf16)
    for (Real& value : out.o) value = rounded(static_cast<float>(value), type);
}

template <typename Real>
Reference<Real> forward_of(Inputs& in, DType type) {
  const Shape& s = in.shape;
  Reference<Real> out;
  forward_reference<Real>(
      s, s.T, rotated<Real>(in.q, in.cos, in.sin, in.pos, s.H, s.D, type, false),
      rotated<Real>(in.k, in.cos, in.sin, in.pos, s.K, s.D, type, false), in.v.values<Real>(), in.first,
      [](int64_t, int64_t t) { return t; }, in.scale, type, out);
  return out;
}

template <typename Real>
void backward_of(Inputs& in, DType type, Reference<Real>& out) {
  const Shape& s = in.shape;
  int64_t T = s.T, H = s.H, K = s.K, D = s.D;
  auto qr = rotated<Real>(in.q, in.cos, in.sin, in.pos, H, D, type, false);
  auto kr = rotated<Real>(in.k, in.cos, in.sin, in.pos, K, D, type, false);
  auto v = in.v.values<Real>(), dout = in.dout.values<Real>();
  std::vector<Real> dq(qr.size()), dk(kr.size());
  out.dv.assign(v.size(), 0);
  for (int64_t b = 0; b < s.B; b++)
    for (int64_t h = 0; h < H; h++)
      for (int64_t t = 0; t < T; t++) {
        int64_t row = ((b * T + t) * H + h) * D;
        Real delta = 0;
        for (int64_t d = 0; d < D; d++) delta += dout[row + d] * out.o[row + d];
        for (int64_t n = in.first.index(b * T + t); n <= t; n++) {
          int64_t key = ((b * T + n) * K + h / (H / K)) * D;
          Real dot = 0, dp = 0;
          for (int64_t d = 0; d < D; d++) {
            dot += qr[row + d] * kr[key + d];
            dp += dout[row + d] * v[key + d];
          }
          Real p = std::exp(dot * in.scale - out.lse[(b * H + h) * T + t]), ds = p * (dp - delta) * in.scale;
          for (int64_t d = 0; d < D; d++) {
            out.dv[key + d] += p * dout[row + d];
            dk[key + d] += ds * qr[row + d];
            dq[row + d] += ds * kr[key + d];
          }
        }
      }
  out.dq = rotated<Real>(in.q, in.cos, in.sin, in.pos, H, D, type, true, &dq);
  out.dk = rotated<Real>(in.k, in.cos, in.sin, in.pos, K, D, type, true, &dk);
  if (type == DType::bf16)
    for (Real& value : out.dv) value = rounded(static_cast<float>(value), type);
}

void check_error(const std::string& what, const Buffer& got, const std::vector<double>& want,
                 const std::vector<float>& naive) {
  double error = 0, naive_error = 0, largest = 2;  // of the size of the inputs where all that is wanted is 0
  for (int64_t i = 0; i < got.size(); i++) {
    double e = std::fabs(got.get(i) - want[i]);
    error = e <= error ? error : e;  // a NaN is kept
    naive_error = std::max(naive_error, std::fabs(naive[i] - want[i]));
    largest = std::max(largest, std::fabs(want[i]));
  }
  double floor = largest * (got.dtype() == DType::bf16 ? 0x1p-10 : 0x1p-21);
  char text[120];
  snprintf(text, sizeof(text), ": error %.3g, naive %.3g, largest %.3g", error, naive_error, largest);
  check(error <= 1.5 * naive_error + floor, what + text);
}

struct Isa {
  const char* name;
  bool present, tiles;
  void (*forward)(cpu::Context&, const attention_fwd_args&);
  void (*delta)(cpu::Context&, const attention_delta_args&);
  void (*backward)(cpu::Context&, const attention_bwd_args&);
  void (*append)(cpu::Context&, const kv_append_args&);
  void (*cached)(cpu::Context&, const attention_cached_args&);
};
#define ISA(isa, name, present, tiles)                                                                 \
  {                                                                                                    \
    name, present, tiles, cpu::isa::attention_fwd, cpu::isa::attention_delta, cpu::isa::attention_bwd, \
        cpu::isa::kv_append, cpu::isa::attention_cached                                                \
  }
#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
const std::vector<Isa> isas = {
    ISA(baseline, "baseline", true, false),
#if defined(__x86_64__)
    ISA(avx2, "avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"),
        false),
    ISA(avx512, "avx512", has_avx512(), false),
    ISA(avx512, "amx", has_avx512() && cpu::avx512::kernels.use_tiles && cpu::enable_tiles(), true),
#endif
};

struct Outputs {
  Buffer o, lse, dq, dk, dv, kr, qr_group, kr_group, delta;
  int64_t groups;
  explicit Outputs(const Shape& s, DType type, int64_t groups = 1)
      : o(type, {s.B, s.T, s.H, s.D}),
        lse(DType::f32, {s.B, s.H, s.T}),
        dq(type, {s.B, s.T, s.H, s.D}),
        dk(type, {s.B, s.T, s.K, s.D}),
        dv(type, {s.B, s.T, s.K, s.D}),
        kr(type, {s.B, s.T, s.K, s.D}),
        qr_group(type, {s.B, s.T, s.H / groups, s.D}),
        kr_group(type, {s.B, s.T, s.K / groups, s.D}),
        delta(DType::f32, {s.B, s.H, s.T}),
        groups(groups) {}
  bool intact() const {
    return o.intact() && lse.intact() && dq.intact() && dk.intact() && dv.intact() && kr.intact() &&
           qr_group.intact() && kr_group.intact() && delta.intact();
  }
  bool same(const Outputs& other) const {
    return o.bits() == other.o.bits() && lse.bits() == other.lse.bits() && dq.bits() == other.dq.bits() &&
           dk.bits() == other.dk.bits() && dv.bits() == other.dv.bits();
  }
};

// Forward and, from the o and lse given (or else from its own), backward.
void run(const Isa& isa, TestContext& context, const Inputs& in, Outputs& out, const Buffer* o = nullptr,
         const Buffer* lse = nullptr) {
  context.poison();
  isa.forward(context, {in.q, in.k, in.v, in.cos, in.sin, in.pos, in.first, out.o, out.lse, out.kr, in.scale});
  context.poison();
  isa.delta(context, {o ? *o : out.o, in.dout, out.delta});
  context.poison();
  isa.backward(context, {in.q, in.k, in.v, in.cos, in.sin, in.pos, in.first, out.delta, lse ? *lse : out.lse, in.dout,
                         out.dq, out.dk, out.dv, out.qr_group, out.kr_group, out.groups, in.scale});
}

// Everything outside one document of each sequence becomes NaN or infinite: inside, no bit may change.
void check_isolation(const std::string& what, const Isa& isa, TestContext& context, Inputs& in, const Outputs& clean,
                     DType type) {
  const Shape& s = in.shape;
  Inputs spoilt(s, type);
  std::vector<int64_t> begin(s.B), end(s.B);
  for (int64_t b = 0; b < s.B; b++) {
    begin[b] = in.first.index(b * s.T + random_int(static_cast<int>(s.T)));
    for (end[b] = begin[b]; end[b] < s.T && in.first.index(b * s.T + end[b]) == begin[b];) end[b]++;
  }
  auto inside = [&](int64_t b, int64_t t) { return t >= begin[b] && t < end[b]; };
  const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, 3.398e38f, 0};
  auto spoil = [&](Buffer& to, const Buffer& from, int64_t heads) {
    for (int64_t i = 0; i < from.size(); i++) {
      int64_t row = i / (heads * s.D);
      to.set(i, inside(row / s.T, row % s.T) ? from.get(i) : odd[random_int(6)]);
    }
  };
  spoil(spoilt.q, in.q, s.H);
  spoil(spoilt.k, in.k, s.K);
  spoil(spoilt.v, in.v, s.K);
  spoil(spoilt.dout, in.dout, s.H);
  for (int64_t i = 0; i < in.cos.size(); i++) {
    spoilt.cos.set(i, in.cos.get(i));
    spoilt.sin.set(i, in.sin.get(i));
  }
  for (int64_t i = 0; i < s.B * s.T; i++) {
    spoilt.pos.index(i) = in.pos.index(i);
    spoilt.first.index(i) = in.first.index(i);
  }
  Outputs out(s, type), reference(s, type);
  run(isa, context, spoilt, out);
  run(isa, context, in, reference);
  bool same = true;
  auto compare = [&](const Buffer& x, const Buffer& y, int64_t heads) {
    for (int64_t i = 0; i < x.size(); i++) {
      int64_t row = i / (heads * s.D);
      float a = x.get(i), b = y.get(i);
      if (inside(row / s.T, row % s.T) && memcmp(&a, &b, 4)) same = false;
    }
  };
  compare(out.o, reference.o, s.H);
  compare(out.dq, reference.dq, s.H);
  compare(out.dk, reference.dk, s.K);
  compare(out.dv, reference.dv, s.K);
  for (int64_t i = 0; i < out.lse.size(); i++) {
    float a = out.lse.get(i), b = reference.lse.get(i);
    if (inside(i / (s.H * s.T), i % s.T) && memcmp(&a, &b, 4)) same = false;
  }
  check(same && clean.intact(), what + ": documents are isolated");
}

void test_training(const Shape& s, DType type) {
  Inputs in(s, type);
  auto exact = forward_of<double>(in, DType::f32);
  auto naive = forward_of<float>(in, type);
  Buffer o(type, {s.B, s.T, s.H, s.D}), lse(DType::f32, {s.B, s.H, s.T});
  o.fill_from(exact.o);
  lse.fill_from(exact.lse);
  backward_of(in, DType::f32, exact);
  Reference<float> naive_backward;
  naive_backward.o = o.values<float>();
  naive_backward.lse = lse.values<float>();
  backward_of(in, type, naive_backward);
  for (const Isa& isa : isas) {
    if (!isa.present) continue;
    tiles = isa.tiles;
    std::string name = name_of(s, type, isa.name);
    TestContext one(1), two(2), three(3);
    Outputs out(s, type), repeated(s, type), on_two(s, type), on_three(s, type), grouped(s, type, s.K);
    run(isa, one, in, out, &o, &lse);
    check_error(name + " o", out.o, exact.o, naive.o);
    check_error(name + " lse", out.lse, exact.lse, naive.lse);
    check_error(name + " dq", out.dq, exact.dq, naive_backward.dq);
    check_error(name + " dk", out.dk, exact.dk, naive_backward.dk);
    check_error(name + " dv", out.dv, exact.dv, naive_backward.dv);
    run(isa, one, in, repeated, &o, &lse);
    run(isa, two, in, on_two, &o, &lse);
    run(isa, three, in, on_three, &o, &lse);
    run(isa, three, in, grouped, &o, &lse);
    check(out.same(grouped) && grouped.intact(), name + ": same bits head by head");
    check(out.same(repeated) && out.same(on_two) && out.same(on_three), name + ": same bits on 1, 2, 3 threads");
    check(out.intact() && on_three.intact() && in.q.intact() && in.k.intact() && in.v.intact() && in.dout.intact(),
          name + ": canaries");
    if (s.mask == Mask::packed) check_isolation(name, isa, two, in, out, type);
  }
}

// The derivative of sum(o dout) by differences of the float64 reference.
void test_differences() {
  Inputs in({1, 19, 4, 2, 8, Mask::packed}, DType::f32);
  auto exact = forward_of<double>(in, DType::f32);
  backward_of(in, DType::f32, exact);
  auto loss = [&] {
    auto o = forward_of<double>(in, DType::f32).o;
    double total = 0;
    for (size_t i = 0; i < o.size(); i++) total += o[i] * in.dout.get(static_cast<int64_t>(i));
    return total;
  };
  auto compare = [&](Buffer& x, const std::vector<double>& gradient, const char* what) {
    double worst = 0;
    for (int trial = 0; trial < 40; trial++) {
      int64_t i = random_int(static_cast<int>(x.size()));
      float kept = x.get(i), step = 0x1p-10f;
      x.set(i, kept + step);
      double up = loss(), up_at = x.get(i);
      x.set(i, kept - step);
      double down = loss(), down_at = x.get(i);
      x.set(i, kept);
      worst = std::max(worst, std::fabs((up - down) / (up_at - down_at) - gradient[i]));
    }
    check(worst < 1e-5, std::string("finite differences of ") + what);
  };
  compare(in.q, exact.dq, "q");
  compare(in.k, exact.dk, "k");
  compare(in.v, exact.dv, "v");
}

// Keys and values go to slots offset + t (in turn from both ends); queries see random ranges of slots.
void test_cache(const Shape& s, int64_t S, DType type) {
  Inputs in(s, type);
  Shape filled = s;
  filled.T = S;
  Inputs fill(filled, type);
  Buffer slot(DType::i32, {s.B, S}), first(DType::i32, {s.B, s.T}), last(DType::i32, {s.B, s.T});
  std::vector<int64_t> used(s.B);  // slots from here on are never written nor seen
  for (int64_t b = 0; b < s.B; b++) {
    used[b] = S;
    for (int64_t t = 0; t < S; t++) slot.index(b * S + t) = static_cast<int32_t>(t % 2 ? S - 1 - t / 2 : t / 2);
    for (int64_t t = 0; t < s.T; t++) {
      int x = random_int(static_cast<int>(S)), y = random_int(static_cast<int>(S));
      bool all = s.mask == Mask::causal;
      first.index(b * s.T + t) = all ? 0 : std::min(x, y);
      last.index(b * s.T + t) = all ? static_cast<int32_t>(S - 1) : std::max(x, y);
    }
  }
  auto exact_k = rotated<double>(fill.k, fill.cos, fill.sin, fill.pos, s.K, s.D, DType::f32, false);
  auto naive_k = rotated<float>(fill.k, fill.cos, fill.sin, fill.pos, s.K, s.D, type, false);
  int64_t row = s.K * s.D;
  auto placed = [&](const auto& from) {
    auto to = from;
    for (int64_t i = 0; i < s.B * S; i++)
      std::copy_n(from.begin() + i * row, row, to.begin() + (i / S * S + slot.index(i)) * row);
    return to;
  };
  // (B,S,K,D) as the references have it -> (B,K,S,D) as the cache does
  auto at_slot = [&](int64_t b, int64_t n, int64_t i) { return ((b * s.K + i / s.D) * S + n) * s.D + i % s.D; };
  auto by_head = [&](const auto& from) {
    auto to = from;
    for (int64_t b = 0; b < s.B; b++)
      for (int64_t n = 0; n < S; n++)
        for (int64_t i = 0; i < row; i++) to[at_slot(b, n, i)] = from[(b * S + n) * row + i];
    return to;
  };
  auto want_k = placed(exact_k), want_v = placed(fill.v.values<double>());
  auto near_k = placed(naive_k), near_v = placed(fill.v.values<float>());
  for (const Isa& isa : isas) {
    if (!isa.present) continue;
    tiles = isa.tiles;
    std::string name = name_of(s, type, isa.name) + " cached S" + std::to_string(S);
    TestContext one(1), three(3);
    Buffer k_cache(type, {s.B, s.K, S, s.D}), v_cache(type, {s.B, s.K, S, s.D});
    isa.append(three, {fill.k, fill.v, fill.cos, fill.sin, fill.pos, slot, k_cache, v_cache});
    check_error(name + " k_cache", k_cache, by_head(want_k), by_head(near_k));
    check(v_cache.values<double>() == by_head(want_v) && k_cache.intact() && v_cache.intact(), name + " v_cache");

    Reference<double> exact;
    Reference<float> naive;
    auto to = [&](int64_t b, int64_t t) -> int64_t { return last.index(b * s.T + t); };
    forward_reference<double>(s, S, rotated<double>(in.q, in.cos, in.sin, in.pos, s.H, s.D, DType::f32, false), want_k,
                              want_v, first, to, in.scale, DType::f32, exact);
    forward_reference<float>(s, S, rotated<float>(in.q, in.cos, in.sin, in.pos, s.H, s.D, type, false), near_k, near_v,
                             first, to, in.scale, type, naive);
    for (int64_t b = 0; b < s.B; b++)  // what nobody sees is poison
      for (int64_t n = 0; n < S; n++) {
        bool seen = false;
        for (int64_t t = 0; t < s.T; t++) seen |= first.index(b * s.T + t) <= n && n <= last.index(b * s.T + t);
        for (int64_t i = 0; i < row && !seen; i++) {
          k_cache.set(at_slot(b, n, i), NAN);
          v_cache.set(at_slot(b, n, i), NAN);
        }
      }
    Buffer o(type, {s.B, s.T, s.H, s.D}), again(type, {s.B, s.T, s.H, s.D});
    one.poison();
    isa.cached(one, {in.q, k_cache, v_cache, in.cos, in.sin, in.pos, first, last, o, in.scale});
    three.poison();
    isa.cached(three, {in.q, k_cache, v_cache, in.cos, in.sin, in.pos, first, last, again, in.scale});
    check_error(name + " o", o, exact.o, naive.o);
    check(o.bits() == again.bits() && o.intact() && again.intact(), name + ": same bits on 1, 3 threads, canaries");
  }
}

}  // namespace

int main() {
  for (const Isa& isa : isas)
    if (!isa.present) {
      skipped++;
      printf("skipped: this CPU has no %s\n", isa.name);
    }
  const Shape shapes[] = {
      {1, 1, 1, 1, 2, Mask::causal},       {2, 2, 2, 1, 8, Mask::packed},      {1, 3, 4, 4, 12, Mask::scattered},
      {2, 17, 4, 2, 16, Mask::packed},     {1, 47, 2, 2, 40, Mask::packed},    {1, 48, 1, 1, 64, Mask::causal},
      {1, 49, 8, 1, 12, Mask::packed},     {2, 63, 2, 1, 80, Mask::packed},    {1, 64, 4, 1, 64, Mask::alone},
      {1, 65, 2, 2, 128, Mask::packed},    {2, 97, 8, 1, 40, Mask::scattered}, {1, 127, 2, 1, 64, Mask::packed},
      {1, 128, 1, 1, 128, Mask::causal},   {1, 129, 4, 2, 24, Mask::packed},   {1, 193, 2, 2, 8, Mask::packed},
      {1, 200, 8, 2, 16, Mask::scattered}, {1, 257, 1, 1, 96, Mask::packed},   {1, 800, 2, 1, 16, Mask::packed},
      {1, 1001, 1, 1, 8, Mask::scattered}, {1, 67, 1, 1, 256, Mask::packed},
  };
  for (DType type : {DType::f32, DType::bf16}) {
    for (const Shape& s : shapes) {
      random_state = static_cast<uint64_t>(s.T * 1000 + s.D);
      test_training(s, type);
    }
    random_state = 5;
    test_cache({1, 1, 4, 2, 64, Mask::causal}, 1300, type);
    test_cache({2, 1, 8, 1, 128, Mask::causal}, 515, type);
    test_cache({2, 1, 3, 3, 12, Mask::scattered}, 600, type);
    test_cache({1, 3, 4, 2, 40, Mask::scattered}, 1100, type);
    test_cache({2, 8, 2, 1, 2, Mask::scattered}, 9, type);
    test_cache({1, 1, 2, 2, 16, Mask::causal}, 1, type);
    test_cache({1, 9, 4, 1, 16, Mask::scattered}, 70, type);
    test_cache({2, 65, 2, 2, 64, Mask::scattered}, 300, type);
    test_cache({1, 200, 2, 1, 80, Mask::causal}, 211, type);
  }
  test_training({11, 16, 128, 128, 256, Mask::causal}, DType::bf16);  // more heads than are summed at a time
  test_differences();
  printf("attention: %d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return failed ? 1 : 0;
}
