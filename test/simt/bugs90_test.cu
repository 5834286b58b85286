// Seeded bugs in what sm_90a adds, as bugs_test.cu: a product of matrices in which one warp has TMA load tiles and a
// warpgroup multiplies them, right and then broken in one place each. Every bug must be found, and the right kernel
// must run without any report in every order of threads and copies.
#include "check.h"
#include "cuda/ptx90.h"
#include "simt/race.h"

namespace {

enum class Bug {
  none,
  no_fence_after_init,
  no_barrier_after_init,
  too_few_bytes,
  too_many_bytes,
  no_full_wait,
  full_wait_wrong_parity,
  no_empty_wait,
  empty_arrivals_too_few,
  empty_arrivals_too_many,
  early_release,
  no_wgmma_wait,
  wgmma_wait_too_few,
  no_wgmma_fence,
  accumulator_touched,
  first_product_accumulates,
  wrong_stride,
  wrong_advance,
  wrong_major,
  no_swizzle,
  one_warp_does_not_multiply,
  lanes_disagree,
  no_proxy_fence,
  no_barrier_before_store,
  no_wait_before_reuse,
  store_not_waited_for,
  unaligned_box,
  unaligned_bulk,
  plain_write_to_barrier,
  registers_of_one_warp,
  two_producers,
  initialised_twice,
  load_outside_of_memory,
  generic_write_before_wgmma,
  load_never_waited_for,
};

constexpr int kStages = 2, kSteps = 5, kDepth = 64 * kSteps, kTiles = 2;

struct alignas(1024) Smem {
  bf16 a[kStages][64 * 64];
  bf16 b[kStages][64 * 64];
  float d[64 * 64];
  MBarrier full[kStages], empty[kStages];
};

// d (128,64) = a (128,320) b (64,320)^T: one block, two tiles of 64 rows; warps 0 .. 3 multiply, warp 4 loads.
template <Bug B>
__global__ void product_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                               float* d) {
  auto& smem = dyn_smem<Smem>();
  const int lane = lane_index(), warp = warp_index();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(smem.full[i], 1);
      mbarrier_init(smem.empty[i], B == Bug::empty_arrivals_too_few    ? 127
                                   : B == Bug::empty_arrivals_too_many ? 129
                                                                       : 128);
    }
    if (B == Bug::initialised_twice) mbarrier_init(smem.full[0], 1);
    if (B != Bug::no_fence_after_init) mbarrier_init_fence();
    if (B == Bug::plain_write_to_barrier) smem.full[1].state = 1;
  }
  if (B == Bug::no_barrier_after_init)
    __syncwarp();
  else
    __syncthreads();
  if (warp == 4) {
    release_registers<40>();
    if (lane != 0 && !(B == Bug::two_producers && lane == 1)) return;
    for (int i = 0; i < kTiles * kSteps; i++) {
      const int stage = i % kStages, round = i / kStages;
      if (B != Bug::no_empty_wait) mbarrier_wait(smem.empty[stage], round % 2 ^ 1);
      mbarrier_arrive_expect_tx(smem.full[stage], 2 * 64 * 64 * 2 + (B == Bug::too_few_bytes    ? -16
                                                                     : B == Bug::too_many_bytes ? 16
                                                                                                : 0));
      tma_load(smem.a[stage] + (B == Bug::unaligned_box ? 8 : 0), map_a, smem.full[stage], i % kSteps * 64,
               i / kSteps * 64);
      tma_load(smem.b[stage], map_b, smem.full[stage], i % kSteps * 64, 0);
    }
    if (B == Bug::load_never_waited_for) {
      mbarrier_wait(smem.empty[0], kTiles * kSteps / kStages % 2 ^ 1);
      mbarrier_arrive_expect_tx(smem.full[0], 64 * 64 * 2);
      tma_load(smem.a[0], map_a, smem.full[0], 0, 0);
    }
    return;
  }
  if (!(B == Bug::registers_of_one_warp && warp == 2)) acquire_registers<232>();
  for (int tile = 0; tile < kTiles; tile++) {
    float sum[32];
    for (float& x : sum) x = __uint_as_float(0x7fc00000u);
    for (int step = 0; step < kSteps; step++) {
      const int i = tile * kSteps + step, stage = i % kStages, round = i / kStages;
      if (B != Bug::no_full_wait)
        mbarrier_wait(smem.full[stage], B == Bug::full_wait_wrong_parity ? round % 2 ^ 1 : round % 2);
      if (B == Bug::generic_write_before_wgmma && step == 1 && threadIdx.x < 8) smem.b[stage][threadIdx.x] = bf16{0};
      if (B != Bug::no_wgmma_fence) wgmma_fence();
      for (int k = 0; k < 4; k++) {
        if (B == Bug::one_warp_does_not_multiply && warp == 3) continue;
        const int advance = (B == Bug::wrong_advance ? 32 : 16) * k % 64;
        const int eight_rows = B == Bug::wrong_stride ? 512 : 1024;
        const uint64_t of_a = matrix_descriptor(smem.a[stage] + advance, eight_rows);
        const uint64_t of_b =
            matrix_descriptor(smem.b[stage] + (B == Bug::lanes_disagree && lane == 9 ? 0 : advance), eight_rows);
        wgmma<64, false, B == Bug::wrong_major>(sum, of_a, of_b,
                                                step > 0 || k > 0 || B == Bug::first_product_accumulates);
      }
      wgmma_commit();
      if (B == Bug::early_release) mbarrier_arrive(smem.empty[stage]);
      if (B == Bug::accumulator_touched) sum[3] = 0;
      if (B == Bug::wgmma_wait_too_few)
        wgmma_wait<1>();
      else if (B != Bug::no_wgmma_wait)
        wgmma_wait<0>();
      if (B != Bug::early_release) mbarrier_arrive(smem.empty[stage]);
    }
    // One thread waits until the last tile has been read, all write, one stores.
    if (threadIdx.x == 0 && B != Bug::no_wait_before_reuse) bulk_wait_read<0>();
    named_barrier(1, 128);
    for (int j = 0; j < 32; j++)
      smem.d[(16 * warp + lane / 4 + j / 2 % 2 * 8) * 64 + j / 4 * 8 + lane % 4 * 2 + j % 2] = sum[j];
    if (B != Bug::no_proxy_fence) fence_proxy_async();
    if (B != Bug::no_barrier_before_store) named_barrier(1, 128);
    if (threadIdx.x == 0) {
      bulk_store(d + tile * 64 * 64 + (B == Bug::unaligned_bulk ? 1 : 0), smem.d,
                 B == Bug::unaligned_bulk ? 16 : sizeof(smem.d));
      bulk_commit();
    }
  }
  if (threadIdx.x == 0 && B != Bug::store_not_waited_for) bulk_wait_read<0>();
}

template <Bug B>
bool run() {
  const std::vector<bf16> a = small_integers(128 * kDepth, 9), b = small_integers(64 * kDepth, 10);
  const Array<bf16> da(a), db(b);
  const Array<float> dd(128 * 64);
  const uint64_t rows = B == Bug::load_outside_of_memory ? 140 : 128;
  const TensorShape shape = {2, {kDepth, rows}, {2 * kDepth}, {64, 64}, B != Bug::no_swizzle};
  const int first = B == Bug::load_outside_of_memory ? 12 * kDepth : 0;
  launch({1, 160, sizeof(Smem), nullptr}, product_kernel<B>, make_tensor_map(da.get() + first, shape),
         make_tensor_map(db.get(), {2, {kDepth, 64}, {2 * kDepth}, {64, 64}, true}), dd.get());
  const std::vector<float> d = dd.values();
  bool right = true;
  for (size_t i = 0; i < 128; i++)
    for (size_t j = 0; j < 64; j++) {
      float sum = 0;
      for (size_t k = 0; k < kDepth; k++) sum += value_of(a[i * kDepth + k]) * value_of(b[j * kDepth + k]);
      right &= d[i * 64 + j] == sum;
    }
  return right;
}

struct Case {
  const char* name;
  bool (*run)();
};
#define CASE(bug)         \
  {                       \
#bug, run < Bug::bug> \
  }
const Case bugs[] = {CASE(no_fence_after_init),
                     CASE(no_barrier_after_init),
                     CASE(too_few_bytes),
                     CASE(too_many_bytes),
                     CASE(no_full_wait),
                     CASE(full_wait_wrong_parity),
                     CASE(no_empty_wait),
                     CASE(empty_arrivals_too_few),
                     CASE(empty_arrivals_too_many),
                     CASE(early_release),
                     CASE(no_wgmma_wait),
                     CASE(wgmma_wait_too_few),
                     CASE(no_wgmma_fence),
                     CASE(accumulator_touched),
                     CASE(first_product_accumulates),
                     CASE(wrong_stride),
                     CASE(wrong_advance),
                     CASE(wrong_major),
                     CASE(no_swizzle),
                     CASE(one_warp_does_not_multiply),
                     CASE(lanes_disagree),
                     CASE(no_proxy_fence),
                     CASE(no_barrier_before_store),
                     CASE(no_wait_before_reuse),
                     CASE(store_not_waited_for),
                     CASE(unaligned_box),
                     CASE(unaligned_bulk),
                     CASE(plain_write_to_barrier),
                     CASE(registers_of_one_warp),
                     CASE(two_producers),
                     CASE(initialised_twice),
                     CASE(load_outside_of_memory),
                     CASE(generic_write_before_wgmma),
                     CASE(load_never_waited_for)};

// "" where nothing is wrong.
std::string verdict(bool (*run_case)(), const char* order) {
  setenv("ROPEWALK_SIMT_ORDER", order, 1);
  try {
    return run_case() ? "" : "wrong numbers";
  } catch (const std::exception& error) {
    const std::string text = error.what();
    const size_t kernel = text.find("_kernel: ");
    return kernel == std::string::npos ? text : text.substr(kernel + 9);
  }
}

}  // namespace

int main() {
  for (const char* order : {"forward", "reverse", "random:1", "random:2", "random:3", "random:4"}) {
    const std::string found = verdict(run<Bug::none>, order);
    verify(found.empty(), std::string("the right kernel, order ") + order + ": " + found);
  }
  for (const Case& c : bugs) {
    if (!simt::instrumented) {
      skipped++;
      continue;
    }
    bool everywhere = true;
    for (const char* order : {"forward", "reverse", "random:5"}) {
      const std::string found = verdict(c.run, order);
      if (order[0] == 'f') std::printf("%-28s %s\n", c.name, found.c_str());
      everywhere &= !found.empty();
    }
    verify(everywhere, std::string(c.name) + ": not found");
  }
  return summary("bugs90_test");
}
