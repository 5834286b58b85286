// Every instruction of ptx.h against what the PTX ISA says, written out once more and plainly. Runs on the emulator
// and, built by nvcc, on a GPU: the results are hashed, and both must give the hashes that stand here.
#include <cmath>

#include "check.h"

namespace {

// FNV-1a over the words.
template <typename T>
uint64_t hash_of(const std::vector<T>& values) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  return hash;
}

template <typename T>
void compare(const char* name, const std::vector<T>& found, const std::vector<T>& expected, uint64_t hash) {
  bool same = found.size() == expected.size();
  for (size_t i = 0; same && i < found.size(); i++) same = std::memcmp(&found[i], &expected[i], sizeof(T)) == 0;
  verify(same, std::string(name) + ": not what the PTX ISA says");
  const uint64_t own = hash_of(found);
  std::printf("hash %-24s %016llx\n", name, static_cast<unsigned long long>(own));
  verify(own == hash, std::string(name) + ": not the hash that stands here");
}

// ---- ldmatrix and movmatrix
// -------------------------------------------------------------------------------------------

struct Rows {
  uint16_t at[64][8];
};

// Lane l takes its row from where `row` says, so that matrices lie anywhere.
template <bool Transposed>
__global__ void ldmatrix_kernel(const uint16_t* values, const int* row, uint32_t* out) {
  auto& rows = dyn_smem<Rows>();
  const int lane = lane_index();
  for (int i = lane; i < 64 * 8; i += 32) rows.at[i / 8][i % 8] = values[i];
  __syncwarp();
  uint32_t r[4];
  if (Transposed)
    ldmatrix_x4_trans(r, rows.at[row[lane]]);
  else
    ldmatrix_x4(r, rows.at[row[lane]]);
  for (int i = 0; i < 4; i++) out[4 * lane + i] = r[i];
}

void test_ldmatrix(bool transposed, uint64_t hash) {
  std::vector<uint16_t> values(64 * 8);
  for (size_t i = 0; i < values.size(); i++) values[i] = static_cast<uint16_t>(i * 2654435761u >> 7);
  std::vector<int> row(32);
  for (size_t i = 0; i < 32; i++) row[i] = static_cast<int>(i * 37 % 64);
  const Array<uint16_t> dv(values);
  const Array<int> dr(row);
  const Array<uint32_t> out(128);
  launch({1, 32, sizeof(Rows), nullptr}, transposed ? ldmatrix_kernel<true> : ldmatrix_kernel<false>, dv.get(),
         dr.get(), out.get());
  std::vector<uint32_t> expected(128);
  for (size_t lane = 0; lane < 32; lane++)
    for (size_t m = 0; m < 4; m++) {
      uint32_t halves[2];
      for (size_t i = 0; i < 2; i++) {
        const size_t r = transposed ? 2 * (lane % 4) + i : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + i;
        halves[i] = values[static_cast<size_t>(row[8 * m + r]) * 8 + c];
      }
      expected[4 * lane + m] = halves[0] | halves[1] << 16;
    }
  compare(transposed ? "ldmatrix.x4.trans" : "ldmatrix.x4", out.values(), expected, hash);
}

__global__ void movmatrix_kernel(uint32_t* out) {
  const auto lane = static_cast<uint32_t>(lane_index());
  out[lane] = movmatrix_trans(2 * lane | (2 * lane + 1) << 16);
}

void test_movmatrix() {
  const Array<uint32_t> out(32);
  launch({1, 32, 0, nullptr}, movmatrix_kernel, out.get());
  std::vector<uint32_t> expected(32);
  for (uint32_t lane = 0; lane < 32; lane++) {
    const uint32_t g = lane / 4, t = lane % 4;  // element (row, column) of the input is 8 row + column
    expected[lane] = (8 * (2 * t) + g) | (8 * (2 * t + 1) + g) << 16;
  }
  compare("movmatrix.trans", out.values(), expected, 0xfaa6af868e37a225u);
}

// ---- mma
// --------------------------------------------------------------------------------------------------------------

__global__ void mma_kernel(const bf16* a, const bf16* b, const float* c, float* d) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const auto pair = [](bf16 low, bf16 high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; };
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; i++) {
    const bf16* at = a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
    fa[i] = pair(at[0], at[1]);
  }
  for (int i = 0; i < 2; i++) fb[i] = pair(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
  float sum[4];
  for (int i = 0; i < 4; i++) sum[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  mma_16x8x16(sum, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; i++) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

void test_mma() {
  const std::vector<bf16> a = small_integers(256, 3), b = small_integers(128, 4);
  std::vector<float> c(128), expected(128);
  for (size_t i = 0; i < 128; i++) c[i] = static_cast<float>(i) - 64;
  const Array<bf16> da(a), db(b);
  const Array<float> dc(c), dd(128);
  launch({1, 32, 0, nullptr}, mma_kernel, da.get(), db.get(), dc.get(), dd.get());
  for (size_t i = 0; i < 16; i++)
    for (size_t j = 0; j < 8; j++) {
      expected[i * 8 + j] = c[i * 8 + j];
      for (size_t k = 0; k < 16; k++) expected[i * 8 + j] += value_of(a[i * 16 + k]) * value_of(b[k * 8 + j]);
    }
  compare("mma.m16n8k16", dd.values(), expected, 0xe16a9945eb6a661au);
}

// ---- cp.async
// ---------------------------------------------------------------------------------------------------------

struct Copies {
  uint32_t wide[32][4];
  uint32_t narrow[32];
};

// Every third lane's copy is not valid and fills zeros; groups are waited for one by one.
__global__ void cp_async_kernel(const uint32_t* from, uint32_t* out) {
  auto& copies = dyn_smem<Copies>();
  const int lane = lane_index();
  cp_async_16(copies.wide[lane], from + 4 * (31 - lane), lane % 3 != 0);
  cp_async_commit();
  cp_async_4(&copies.narrow[lane], from + 128 + lane * 5 % 32, lane % 3 != 1);
  cp_async_commit();
  cp_async_commit();  // an empty group counts
  cp_async_wait<2>();
  for (int i = 0; i < 4; i++) out[5 * lane + i] = copies.wide[lane][i];
  cp_async_wait<0>();
  out[5 * lane + 4] = copies.narrow[lane];
}

void test_cp_async() {
  std::vector<uint32_t> from(160), expected(160);
  for (size_t i = 0; i < from.size(); i++) from[i] = static_cast<uint32_t>(i * 2654435761u);
  const Array<uint32_t> df(from), out(160);
  launch({1, 32, sizeof(Copies), nullptr}, cp_async_kernel, df.get(), out.get());
  for (size_t lane = 0; lane < 32; lane++) {
    for (size_t i = 0; i < 4; i++) expected[5 * lane + i] = lane % 3 != 0 ? from[4 * (31 - lane) + i] : 0;
    expected[5 * lane + 4] = lane % 3 != 1 ? from[128 + lane * 5 % 32] : 0;
  }
  compare("cp.async", out.values(), expected, 0x503938f02588b1f3u);
}

// ---- arithmetic
// -------------------------------------------------------------------------------------------------------

__global__ void pack_kernel(const float* x, uint32_t* out, int n) {
  for (int i = lane_index(); i < n; i += 32) {
    out[2 * i] = pack_bf16(x[i], x[(i + 1) % n]);
    out[2 * i + 1] = to_bf16(x[i]).bits;
  }
}

// To nearest, ties to even. NaN is compared as NaN: its payload is nobody's business.
uint32_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7fff;
  const uint32_t lower = bits & 0xffff, upper = bits >> 16;
  return lower > 0x8000 || (lower == 0x8000 && upper % 2) ? upper + 1 : upper;
}

void test_pack() {
  std::vector<float> x = {0.0f,    -0.0f,         1.0f,    1.00390625f,     1.01171875f, 1.0078125f, 65504.0f,
                          3.4e38f, 3.4028235e38f, -1e-40f, 1e-45f,          INFINITY,    -INFINITY,  0.1f,
                          -0.3f,   1.00390637f,   1e-38f,  1.17549435e-38f, NAN,         123456.789f};
  Random random{5};
  for (int i = 0; i < 200; i++) {
    const uint32_t bits = random() << 1 ^ random();
    float value;
    std::memcpy(&value, &bits, 4);
    x.push_back(std::isnan(value) ? 1.5f : value);
  }
  const auto n = static_cast<int>(x.size());
  const Array<float> dx(x);
  const Array<uint32_t> out(2 * x.size());
  launch({1, 32, 0, nullptr}, pack_kernel, dx.get(), out.get(), n);
  std::vector<uint32_t> found = out.values(), expected(found.size());
  for (size_t i = 0; i < x.size(); i++) {
    expected[2 * i] = rounded(x[i]) | rounded(x[(i + 1) % x.size()]) << 16;
    expected[2 * i + 1] = rounded(x[i]);
  }
  const auto one_nan = [](uint32_t half) { return (half & 0x7fff) > 0x7f80 ? 0x7fffu : half; };
  for (uint32_t& word : found) word = one_nan(word & 0xffff) | one_nan(word >> 16) << 16;
  compare("cvt.rn.bf16x2.f32", found, expected, 0x47fb33dfef0bb80cu);
}

__global__ void approx_kernel(const float* x, float* powers, float* reciprocals, int n) {
  for (int i = lane_index(); i < n; i += 32) {
    powers[i] = exp2_approx(x[i]);
    reciprocals[i] = reciprocal_approx(x[i]);
  }
}

// Approximations: no hash, but the documented errors.
void test_approximations() {
  std::vector<float> x = {0.0f, 1.0f, -1.0f, 10.0f, -126.0f, -127.5f, -150.0f, -INFINITY, 127.0f, 0.5f};
  Random random{6};
  for (int i = 0; i < 500; i++) x.push_back(static_cast<float>(random.below(2000001) - 1000000) / 8192);
  const auto n = static_cast<int>(x.size());
  const Array<float> dx(x), powers(x.size()), reciprocals(x.size());
  launch({1, 32, 0, nullptr}, approx_kernel, dx.get(), powers.get(), reciprocals.get(), n);
  const std::vector<float> p = powers.values(), r = reciprocals.values();
  double worst_power = 0, worst_reciprocal = 0;
  bool flushed = true;
  for (size_t i = 0; i < x.size(); i++) {
    const double power = std::exp2(static_cast<double>(x[i]));
    if (power < 0x1p-126)
      flushed &= p[i] == 0;
    else if (power < 0x1p128)
      worst_power = std::fmax(worst_power, std::fabs(p[i] / power - 1));
    if (x[i] != 0 && std::isfinite(x[i]))
      worst_reciprocal = std::fmax(worst_reciprocal, std::fabs(static_cast<double>(r[i]) * x[i] - 1));
  }
  verify(flushed, "ex2.approx.ftz: results below 2^-126 are not 0");
  verify(p[0] == 1 && p[7] == 0 && p[3] == 1024, "ex2.approx: 2^0, 2^-inf or 2^10");
  verify(worst_power < 0x1p-22, "ex2.approx: relative error " + std::to_string(worst_power));
  verify(worst_reciprocal < 0x1p-22, "rcp.approx: relative error " + std::to_string(worst_reciprocal));
}

// ---- what CUDA itself gives
// -------------------------------------------------------------------------------------------

__global__ void lanes_kernel(uint32_t* out) {
  const int lane = lane_index();
  const auto value = static_cast<uint32_t>(lane * lane);
  uint32_t* own = out + 10 * lane;
  own[0] = __shfl_sync(kAllLanes, value, lane * 7);
  own[1] = __shfl_sync(kAllLanes, value, lane + 3, 8);
  own[2] = __shfl_xor_sync(kAllLanes, value, 5);
  own[3] = __shfl_xor_sync(kAllLanes, value, 20, 16);
  own[4] = __shfl_up_sync(kAllLanes, value, 3);
  own[5] = __shfl_up_sync(kAllLanes, value, 3, 8);
  own[6] = __shfl_down_sync(kAllLanes, value, 5);
  own[7] = __shfl_down_sync(kAllLanes, value, 2, 4);
  own[8] = __ballot_sync(kAllLanes, lane % 5 == 2);
  own[9] = static_cast<uint32_t>((__any_sync(kAllLanes, lane == 9) != 0) + 2 * (__all_sync(kAllLanes, lane != 9) != 0));
}

void test_lanes() {
  const Array<uint32_t> out(320);
  launch({1, 32, 0, nullptr}, lanes_kernel, out.get());
  std::vector<uint32_t> expected;
  uint32_t ballot = 0;
  for (uint32_t lane = 2; lane < 32; lane += 5) ballot |= 1u << lane;
  for (uint32_t lane = 0; lane < 32; lane++) {
    const uint32_t of8 = lane & ~7u, of16 = lane & ~15u, of4 = lane & ~3u;
    // A source beyond the own segment gives the own value; xor may reach into an earlier segment.
    const uint32_t sources[] = {lane * 7 % 32,
                                of8 + (lane + 3) % 8,
                                lane ^ 5,
                                (lane ^ 20) >= of16 + 16 ? lane : lane ^ 20,
                                lane >= 3 ? lane - 3 : lane,
                                lane % 8 >= 3 ? lane - 3 : lane,
                                lane + 5 < 32 ? lane + 5 : lane,
                                lane + 2 < of4 + 4 ? lane + 2 : lane};
    for (const uint32_t source : sources) expected.push_back(source * source);
    expected.push_back(ballot);
    expected.push_back(1);
  }
  compare("shfl and vote", out.values(), expected, 0x710152b9d757db5cu);
}

struct Turn {
  int value;
};

// Four warps add in turn, each waiting for the one before it at a barrier of two warps.
__global__ void named_barrier_kernel(int* out) {
  auto& turn = static_smem<Turn, Turn>();
  const int warp = warp_index();
  if (warp == 0 && lane_index() == 0) turn.value = 1;
  if (warp > 0) named_barrier(warp, 64);
  if (warp > 0 && lane_index() == 0) turn.value = 10 * turn.value + warp;
  if (warp < 3) named_barrier(warp + 1, 64);
  if (thread_index_anew() == 96) out[0] = turn.value;  // the last warp's first lane
}

void test_named_barrier() {
  const Array<int> out(1);
  launch({1, 128, 0, nullptr}, named_barrier_kernel, out.get());
  compare("barrier.sync", out.values(), std::vector<int>{1123}, 0x0f1b8f92ce5b5d52u);
}

}  // namespace

int main() {
  test_ldmatrix(false, 0xe0664df740737d2fu);
  test_ldmatrix(true, 0xa341a64476c6bb73u);
  test_movmatrix();
  test_mma();
  test_cp_async();
  test_pack();
  test_approximations();
  test_lanes();
  test_named_barrier();
  return summary("conformance_test");
}
