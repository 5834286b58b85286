// Matrix products of a warpgroup. Each warp computes its own 16 rows, when they are waited for; until then the
// accumulators hold NaN. Operands in shared memory are looked at twice, when the product is issued and when it is done:
// nobody may write them in between.
#include <algorithm>
#include <cstring>

#include "engine.h"
#include "race.h"
#include "warp.h"

namespace simt {
namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kRows = 16, kDepth = 16;

struct Issue {
  float* d;
  int n;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool mn_major_a, mn_major_b, accumulate;
  const void* site;
};

WarpEngine& own_engine() { return engine().warps[static_cast<size_t>(self->warp)]; }

// Offset in shared memory of the eight elements from (mn, k) on: along k if K-major, along mn if MN-major.
size_t chunk(uint64_t descriptor, bool mn_major, int mn, int k) {
  const size_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
               stride = (descriptor >> 32 & 0x3fff) << 4;
  const auto row = static_cast<size_t>(mn), column = static_cast<size_t>(k);
  return swizzle_128(mn_major ? start + row / 64 * leading + column / 8 * stride + column % 8 * 128 + row % 64 * 2
                              : start + row / 8 * stride + row % 8 * 128 + column * 2);
}

// Calls f(offset, mn, k) for every 16 bytes of the rows first .. first + count of a matrix of 16 columns.
template <typename F>
void each_chunk(uint64_t descriptor, bool mn_major, int first, int count, F&& f) {
  for (int mn = first; mn < first + count; mn += mn_major ? 8 : 1)
    for (int k = 0; k < kDepth; k += mn_major ? 1 : 8) f(chunk(descriptor, mn_major, mn, k), mn, k);
}

void check_operand(uint64_t descriptor, bool mn_major, int first, int count, const void* site) {
  const Thread& thread = *(self - self->lane);
  each_chunk(descriptor, mn_major, first, count, [&](size_t offset, int, int) {
    require_shared(block->shared.memory + offset, 16, "wgmma", site);
    access(thread, block->shared.memory + offset, 16, Access::read, site, kAll, true);
  });
}

void check_operands(const WarpProduct& product) {
  if (product.a.empty())
    check_operand(product.a_descriptor, product.mn_major_a, self->warp % 4 * kRows, kRows, product.site);
  check_operand(product.b_descriptor, product.mn_major_b, 0, product.n, product.site);
}

float half(uint32_t x, int i) { return __uint_as_float(i ? x & 0xffff0000u : x << 16); }

// [mn][k]
std::vector<float> read_operand(uint64_t descriptor, bool mn_major, int first, int count) {
  std::vector<float> x(static_cast<size_t>(count * kDepth));
  each_chunk(descriptor, mn_major, first, count, [&](size_t offset, int mn, int k) {
    uint16_t values[8];
    memcpy(values, block->shared.memory + offset, 16);
    for (int i = 0; i < 8; i++) {
      const int row = mn - first + (mn_major ? i : 0), column = k + (mn_major ? 0 : i);
      x[static_cast<size_t>(row * kDepth + column)] = half(values[i], 0);
    }
  });
  return x;
}

// Row and column of accumulator i of a lane.
size_t place(int lane, int i, int n) {
  const int row = lane / 4 + (i / 2 % 2) * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
  return static_cast<size_t>(row * n + column);
}

void issue(void* const* slots, uint32_t) {
  const Quiet silence;
  const Issue& first = *static_cast<Issue*>(slots[0]);
  WarpEngine& warp = own_engine();
  for (int lane = 1; lane < 32; lane++) {
    const Issue& other = *static_cast<Issue*>(slots[lane]);
    if (other.a != first.a || other.b != first.b || other.accumulate != first.accumulate || other.n != first.n)
      fail("wgmma at %s: lanes 0 and %d give different descriptors", describe_site(first.site).c_str(), lane);
  }
  if (!warp.fenced)
    fail("wgmma at %s: no wgmma.fence since registers could have been written", describe_site(first.site).c_str());
  const auto descriptor_is_right = [](uint64_t x) { return x >> 62 == 1 && (x >> 49 & 7) == 0; };
  if (!descriptor_is_right(first.b) || (!first.a_registers && !descriptor_is_right(first.a)))
    fail("wgmma at %s: only matrices in 128-byte swizzled rows are known here", describe_site(first.site).c_str());
  Accumulators& accumulators = warp.accumulators.try_emplace(first.d, Accumulators{{}, first.n, 0, {}}).first->second;
  if (accumulators.pending == 0) {
    accumulators.value.resize(static_cast<size_t>(kRows * first.n));
    for (int lane = 0; lane < 32; lane++) {
      float* const d = static_cast<Issue*>(slots[lane])->d;
      accumulators.d[lane] = d;
      for (int i = 0; i < first.n / 2; i++) accumulators.value[place(lane, i, first.n)] = d[i];
      memset(d, 0xff, static_cast<size_t>(first.n / 2) * 4);
    }
  } else if (accumulators.n != first.n) {
    fail("wgmma at %s: the accumulators are in use by a product of another width", describe_site(first.site).c_str());
  }
  accumulators.pending++;
  WarpProduct product = {{},         first.a,          first.b,          first.n,
                         warp.group, first.mn_major_a, first.mn_major_b, first.accumulate,
                         first.d,    first.site};
  if (first.a_registers) {
    product.a.resize(kRows * kDepth);
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 8; i++) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = lane % 4 * 2 + i / 4 * 8 + i % 2;
        product.a[static_cast<size_t>(row * kDepth + column)] =
            half(static_cast<Issue*>(slots[lane])->a_registers[i / 2], i % 2);
      }
  }
  check_operands(product);
  warp.products.push_back(std::move(product));
  warp.issued++;
}

void finish(const WarpProduct& product, WarpEngine& warp) {
  check_operands(product);
  Accumulators& accumulators = warp.accumulators.find(product.accumulators)->second;
  const int n = product.n;
  const std::vector<float> a =
      product.a.empty() ? read_operand(product.a_descriptor, product.mn_major_a, self->warp % 4 * kRows, kRows)
                        : product.a;
  const std::vector<float> b = read_operand(product.b_descriptor, product.mn_major_b, 0, n);
  auto& d = accumulators.value;
  for (int i = 0; i < kRows; i++)
    for (int j = 0; j < n; j++) {
      float sum = 0;
      for (int k = 0; k < kDepth; k++)
        sum += a[static_cast<size_t>(i * kDepth + k)] * b[static_cast<size_t>(j * kDepth + k)];
      float& to = d[static_cast<size_t>(i * n + j)];
      to = product.accumulate ? to + sum : sum;
    }
  if (--accumulators.pending > 0) return;
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < n / 2; i++) {
      float& to = accumulators.d[lane][i];
      if (__float_as_uint(to) != 0xffffffffu)
        fail("wgmma at %s: an accumulator was written before wgmma.wait_group", describe_site(product.site).c_str());
      to = d[place(lane, i, n)];
    }
  warp.accumulators.erase(product.accumulators);
}

void fence(void* const*, uint32_t) { own_engine().fenced = true; }
void commit(void* const*, uint32_t) { own_engine().group++; }

void complete(void* const* slots, uint32_t) {
  const Quiet silence;
  WarpEngine& warp = own_engine();
  const int groups = *static_cast<int*>(slots[0]);
  while (!warp.products.empty() && warp.products.front().group < warp.group - groups) {
    finish(warp.products.front(), warp);
    warp.products.pop_front();
  }
  warp.fenced = false;
}

void change_registers(void* const* slots, uint32_t) { own_engine().registers = *static_cast<int*>(slots[0]); }

}  // namespace

void wgmma(float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool mn_major_a, bool mn_major_b,
           bool accumulate) {
  const void* const site = __builtin_return_address(0);
  Issue own = {d, n, a_registers, a, b, mn_major_a, mn_major_b, accumulate, site};
  collective(kAll, "wgmma", &own, issue, site, true);
}

void wgmma_fence() {
  const void* const site = __builtin_return_address(0);
  if (!skipped("wgmma.fence", site)) collective(kAll, "wgmma.fence", nullptr, fence, site, true);
}

void wgmma_commit() {
  const void* const site = __builtin_return_address(0);
  collective(kAll, "wgmma.commit_group", nullptr, commit, site, true);
}

void wgmma_wait(int groups) {
  const void* const site = __builtin_return_address(0);
  if (!skipped("wgmma.wait_group", site)) collective(kAll, "wgmma.wait_group", &groups, complete, site, true);
}

void set_registers(int count, bool acquire) {
  collective(kAll, acquire ? "setmaxnreg.inc" : "setmaxnreg.dec", &count, change_registers, __builtin_return_address(0),
             true);
}

std::string unfinished_products(const Engine& all) {
  for (size_t w = 0; w < all.warps.size(); w++) {
    const WarpEngine& warp = all.warps[w];
    const std::string name = "warp " + std::to_string(w);
    if (!warp.products.empty())
      return name + " returned without waiting for its wgmma at " + describe_site(warp.products[0].site);
    const WarpEngine& leader = all.warps[w / 4 * 4];
    if (warp.issued != leader.issued || warp.registers != leader.registers)
      return name + " did not execute the same wgmma and setmaxnreg as the other warps of its warpgroup";
  }
  return "";
}

}  // namespace simt
