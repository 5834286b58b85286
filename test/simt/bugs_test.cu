// Seeded bugs: small kernels that are right, and are then broken in one place each. Every one must be found, by an
// error of the emulator or by wrong numbers; the kernels as they should be must run without any report in every order
// of threads. The table printed says what found each. It needs the race flavour; without it only the right kernels run.
#include <functional>

#include "check.h"
#include "simt/race.h"

namespace {

// ---- a block: shared memory, barriers, bounds
// -------------------------------------------------------------------------

enum class Tile {
  right,
  no_barrier_before_read,
  no_barrier_before_write,
  read_past_array,
  write_past_array,
  read_uninitialised,
  read_past_allocation,
  write_past_allocation,
  divergent_barrier,
  barrier_missed_by_a_warp,
  early_return,
  unaligned_vector,
  read_unwritten_input,
  too_little_shared_memory,
  write_to_input_of_others,
  static_without_barrier,
};

constexpr int kThreads = 96;

struct TileSmem {
  float a[kThreads];
  REDZONE(after_a);
  float b[kThreads];
};

// y[i] = x[i + 1] + x[i + 2] of a ring, in two rounds through shared memory.
template <Tile Bug>
__global__ void tile_kernel(const float* x, float* y) {
  auto& smem = dyn_smem<TileSmem>();
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  struct Count {
    int value;
  };
  auto& last = static_smem<Count, TileSmem>();
  if (Bug == Tile::early_return && i == n - 1) return;
  if (i == 0) last.value = n - 1;
  float value = x[Bug == Tile::read_past_allocation ? i + 1 : i];
  if (Bug == Tile::unaligned_vector && i == 0) *reinterpret_cast<uint4*>(y + 1) = *reinterpret_cast<const uint4*>(x);
  if (Bug == Tile::write_to_input_of_others) const_cast<float*>(x)[(i + 1) % n] = value;
  if (Bug == Tile::static_without_barrier && last.value < 0) value = 0;
  if (!(Bug == Tile::read_uninitialised && i == 7)) smem.a[i] = value;
  if (Bug == Tile::write_past_array) smem.a[i + 1] = value;
  if (Bug == Tile::divergent_barrier) {
    if (i < 32)
      __syncthreads();
    else
      __syncthreads();
  } else if (!(Bug == Tile::barrier_missed_by_a_warp && i < 32) && Bug != Tile::no_barrier_before_read) {
    __syncthreads();
  }
  const int next = Bug == Tile::read_past_array ? i + 1 : i == last.value ? 0 : i + 1;
  smem.b[i] = smem.a[next];
  if (Bug != Tile::no_barrier_before_write) __syncthreads();
  smem.a[i] = smem.b[i == n - 1 ? 0 : i + 1];
  __syncthreads();
  const float sum = smem.a[i] + smem.b[i];
  y[Bug == Tile::write_past_allocation ? i + 1 : i] = sum;
}

template <Tile Bug>
bool run_tile() {
  std::vector<float> x(kThreads);
  for (int i = 0; i < kThreads; i++) x[static_cast<size_t>(i)] = static_cast<float>(i * i % 31);
  const Array<float> dx(x), never(kThreads), dy(kThreads);
  const size_t smem = sizeof(TileSmem) - (Bug == Tile::too_little_shared_memory ? 16 : 0);
  launch({1, kThreads, smem, nullptr}, tile_kernel<Bug>, Bug == Tile::read_unwritten_input ? never.get() : dx.get(),
         dy.get());
  const std::vector<float> y = dy.values();
  bool right = true;
  for (size_t i = 0; i < kThreads; i++) right &= y[i] == x[(i + 1) % kThreads] + x[(i + 2) % kThreads];
  return right;
}

// ---- a warp: shuffles, votes, __syncwarp
// ------------------------------------------------------------------------------

enum class Lanes {
  right,
  not_in_mask,
  half_absent,
  source_outside_mask,
  mask_names_returned,
  no_syncwarp,
  half_syncwarp,
  different_instructions,
  other_half_votes,
};

template <Lanes Bug>
__global__ void lanes_kernel(const int* x, int* y) {
  struct Values {
    int at[64];
  };
  auto& shared = static_smem<Values, Values>();
  const int i = static_cast<int>(threadIdx.x), lane = lane_index();
  int value = x[i];
  if (Bug == Lanes::mask_names_returned && lane == 31) return;
  if (Bug == Lanes::half_absent) {
    if (lane < 16) value += __shfl_xor_sync(kAllLanes, value, 1);
  } else if (Bug == Lanes::different_instructions) {
    if (lane < 16)
      value += __shfl_xor_sync(kAllLanes, value, 1);
    else
      value += static_cast<int>(__ballot_sync(kAllLanes, value));
  } else {
    value += __shfl_xor_sync(Bug == Lanes::not_in_mask ? 0x7fffffffu : kAllLanes, value, 1);
  }
  // The halves of a warp on their own.
  const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  value += __shfl_sync(half, value, Bug == Lanes::source_outside_mask ? 0 : lane & 16);
  if (__any_sync(Bug == Lanes::other_half_votes ? ~half : half, value > 1000000)) value = 0;
  shared.at[i] = value;
  if (Bug != Lanes::no_syncwarp) __syncwarp(Bug == Lanes::half_syncwarp ? half : kAllLanes);
  y[i] = shared.at[i ^ 31];
}

template <Lanes Bug>
bool run_lanes() {
  std::vector<int> x(64), pairs(64), sums(64);
  for (int i = 0; i < 64; i++) x[static_cast<size_t>(i)] = i * 7 % 23;
  for (size_t i = 0; i < 64; i++) pairs[i] = x[i] + x[i ^ 1];
  for (size_t i = 0; i < 64; i++) sums[i] = pairs[i] + pairs[i & ~size_t{15}];
  const Array<int> dx(x), dy(64);
  launch({1, 64, 0, nullptr}, lanes_kernel<Bug>, dx.get(), dy.get());
  const std::vector<int> y = dy.values();
  bool right = true;
  for (size_t i = 0; i < 64; i++) right &= y[i] == sums[i ^ 31];
  return right;
}

// ---- a pipeline: cp.async, ldmatrix, mma
// ------------------------------------------------------------------------------

enum class Pipeline {
  right,
  no_wait,
  wait_too_few,
  no_commit,
  no_barrier_after_wait,
  early_release,
  no_transposition,
  wrong_lane_map,
  no_row_guard,
  no_row_guard_zero,
  unaligned_row,
  unaligned_copy,
  source_overwritten,
  swapped_fragments,
  wrong_result_row,
  copy_out_of_shared_memory,
  late_first_stage,
  one_lane_missing,
};

constexpr int kStages = 3, kSteps = 7, kDepth = 16 * kSteps, kRows = 27;  // 2 tiles of 16 rows, the second one short

struct PipelineSmem {
  bf16 a[kStages][32][16];
  REDZONE(after_a);
  bf16 b[kStages][16][8];
};

// d (27,8) = a (27,112) b (112,8), two warps, one tile of rows each.
template <Pipeline Bug>
__global__ void pipeline_kernel(bf16* a, const bf16* b, float* d) {
  auto& smem = dyn_smem<PipelineSmem>();
  const int i = static_cast<int>(threadIdx.x), lane = lane_index(), warp = warp_index();
  const auto copy = [&](int step) {
    if (step < kSteps) {
      const int stage = step % kStages, row = i / 2, column = i % 2 * 8;
      const bool inside = row < kRows || Bug == Pipeline::no_row_guard || Bug == Pipeline::no_row_guard_zero;
      const bf16* from = a + (row < kRows || Bug == Pipeline::no_row_guard ? row : 0) * kDepth + step * 16 + column;
      bf16* to = &smem.a[Bug == Pipeline::copy_out_of_shared_memory && step == 6 ? 8 : stage][row][column];
      cp_async_16(Bug == Pipeline::unaligned_copy ? to + 1 : to, from, inside);
      if (i < 16) cp_async_16(&smem.b[stage][i][0], b + (step * 16 + i) * 8);
    }
    if (Bug != Pipeline::no_commit) cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; step++) copy(step);
  float sum[4] = {};
  for (int step = 0; step < kSteps; step++) {
    if (Bug == Pipeline::wait_too_few)
      cp_async_wait<kStages - 1>();
    else if (Bug != Pipeline::no_wait && !(Bug == Pipeline::late_first_stage && step == 0))
      cp_async_wait<kStages - 2>();
    if (Bug != Pipeline::no_barrier_after_wait) __syncthreads();
    if (Bug == Pipeline::early_release) {
      copy(step + kStages);  // into the stage that is read below
    } else {
      copy(step + kStages - 1);
    }
    if (Bug == Pipeline::source_overwritten && step == 0 && i == 0)
      a[(kStages - 1) * 16] = bf16{static_cast<uint16_t>(a[(kStages - 1) * 16].bits ^ 1)};
    const int stage = step % kStages;
    uint32_t fa[4], fb[4];
    const int row = Bug == Pipeline::wrong_lane_map ? lane / 2 : lane % 16, column = lane / 16 * 8;
    const bf16* address = &smem.a[stage][16 * warp + row][column];
    if (!(Bug == Pipeline::one_lane_missing && lane == 5))
      ldmatrix_x4(fa, Bug == Pipeline::unaligned_row ? address + 1 : address);
    if (Bug == Pipeline::no_transposition)
      ldmatrix_x4(fb, &smem.b[stage][lane % 16][0]);
    else
      ldmatrix_x4_trans(fb, &smem.b[stage][lane % 16][0]);
    if (Bug == Pipeline::swapped_fragments) {
      const uint32_t kept = fa[1];
      fa[1] = fa[2];
      fa[2] = kept;
    }
    mma_16x8x16(sum, fa, fb[0], fb[1]);
  }
  for (int j = 0; j < 4; j++) {
    const int row = 16 * warp + lane / 4 + (j / 2 == (Bug == Pipeline::wrong_result_row) ? 0 : 8);
    if (row < kRows) d[row * 8 + lane % 4 * 2 + j % 2] = sum[j];
  }
}

template <Pipeline Bug>
bool run_pipeline() {
  const std::vector<bf16> a = small_integers(kRows * kDepth, 1), b = small_integers(kDepth * 8, 2);
  const Array<bf16> da(a), db(b);
  const Array<float> dd(kRows * 8);
  launch({1, 64, sizeof(PipelineSmem), nullptr}, pipeline_kernel<Bug>, da.get(), db.get(), dd.get());
  const std::vector<float> d = dd.values();
  bool right = true;
  for (size_t i = 0; i < kRows; i++)
    for (size_t j = 0; j < 8; j++) {
      float sum = 0;
      for (size_t k = 0; k < kDepth; k++) sum += value_of(a[i * kDepth + k]) * value_of(b[k * 8 + j]);
      right &= d[i * 8 + j] == sum;
    }
  return right;
}

// ---- blocks of a launch
// -----------------------------------------------------------------------------------------------

enum class Blocks { right, plain_sum, reads_result_of_another, overlapping_tiles, atomic_and_plain };

template <Blocks Bug>
__global__ void blocks_kernel(const int* x, int* y, int* total) {
  const int i = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  y[Bug == Blocks::overlapping_tiles && blockIdx.x > 0 && threadIdx.x == 0 ? i - 1 : i] = 2 * x[i];
  const int other = (i + 32) % (32 * static_cast<int>(gridDim.x));
  if (Bug == Blocks::reads_result_of_another) y[i] += y[other] - 2 * x[other];
  if (threadIdx.x != 0) return;
  if (Bug == Blocks::plain_sum)
    total[0] += x[i];
  else
    atomicAdd(total, x[i]);
  if (Bug == Blocks::atomic_and_plain && total[0] < 0) y[i] = 0;
}

template <Blocks Bug>
bool run_blocks() {
  std::vector<int> x(96);
  for (size_t i = 0; i < 96; i++) x[i] = static_cast<int>(i * 5 % 17);
  const Array<int> dx(x), dy(96), total(std::vector<int>{0});
  launch({3, 32, 0, nullptr}, blocks_kernel<Bug>, dx.get(), dy.get(), total.get());
  const std::vector<int> y = dy.values();
  bool right = total.values()[0] == x[0] + x[32] + x[64];
  for (size_t i = 0; i < 96; i++) right &= y[i] == 2 * x[i];
  return right;
}

// ---- named barriers: two warps produce, two consume
// -------------------------------------------------------------------

enum class Roles {
  right,
  no_full_barrier,
  no_empty_barrier,
  wrong_count,
  wrong_id,
  missing_arrival,
  two_counts,
  bad_id
};

template <Roles Bug>
__global__ void roles_kernel(const int* x, int* y) {
  struct Values {
    int at[64];
  };
  auto& shared = static_smem<Values, Values>();
  const int i = static_cast<int>(threadIdx.x % 64);
  const bool produces = threadIdx.x < 64;
  constexpr int kFull = 1, kEmpty = 2;
  for (int round = 0; round < 3; round++) {
    if (produces) {
      if (round > 0 && Bug != Roles::no_empty_barrier) named_barrier(kEmpty, 128);
      shared.at[i] = x[64 * round + i];
      if (Bug == Roles::missing_arrival && round == 2) return;
      if (Bug != Roles::no_full_barrier) named_barrier(kFull, Bug == Roles::two_counts ? 96 : 128);
    } else {
      if (Bug != Roles::no_full_barrier)
        named_barrier(Bug == Roles::wrong_id ? 3
                      : Bug == Roles::bad_id ? 16
                                             : kFull,
                      Bug == Roles::wrong_count ? 64 : 128);
      y[64 * round + i] = shared.at[63 - i];
      if (round < 2 && Bug != Roles::no_empty_barrier) named_barrier(kEmpty, 128);
    }
  }
}

template <Roles Bug>
bool run_roles() {
  std::vector<int> x(192);
  for (size_t i = 0; i < 192; i++) x[i] = static_cast<int>(i * 11 % 101);
  const Array<int> dx(x), dy(192);
  launch({1, 128, 0, nullptr}, roles_kernel<Bug>, dx.get(), dy.get());
  const std::vector<int> y = dy.values();
  bool right = true;
  for (size_t i = 0; i < 192; i++) right &= y[i] == x[i / 64 * 64 + 63 - i % 64];
  return right;
}

// ---- bytes, of which a cell of the race detector has two
// ---------------------------------------------------------------------------------------------

enum class Bytes { right, reads_the_neighbours };

// Each thread has three bytes and changes the first one.
template <Bytes Bug>
__global__ void bytes_kernel(uint8_t* x) {
  uint8_t* own = x + 1 + 3 * (blockIdx.x * blockDim.x + threadIdx.x);
  own[0] = static_cast<uint8_t>(own[0] + own[Bug == Bytes::reads_the_neighbours ? 3 : 2]);
}

template <Bytes Bug>
bool run_bytes() {
  const Array<uint8_t> x(std::vector<uint8_t>(3 * 2 * kThreads + 2, 1));
  launch({2, kThreads, 0, nullptr}, bytes_kernel<Bug>, x.get());
  const std::vector<uint8_t> y = x.values();
  bool right = true;
  for (size_t i = 0; i < y.size() - 1; i++) right &= y[i] == (i % 3 == 1 ? 2 : 1);
  return right;
}

// ---- the host
// ---------------------------------------------------------------------------------------------------------

bool read_device_memory_on_the_host() {
  const Array<float> x(std::vector<float>(8, 1.0f));
  const volatile float* memory = x.get();
  const float sum = memory[0] + memory[1];
  launch({1, kThreads, sizeof(TileSmem), nullptr}, tile_kernel<Tile::right>, x.get(), x.get());
  return sum == 2;
}

// Within the allocation, but beyond the tensor that lies in it.
bool read_past_the_tensor() {
  const Array<float> x(std::vector<float>(2 * kThreads, 1.0f)), y(kThreads);
  const simt::Range tensors[] = {{x.get(), kThreads * 4}, {y.get(), kThreads * 4}};
  struct Limit {
    ~Limit() { simt::limit_device_memory(nullptr, 0); }
  } limit;
  simt::limit_device_memory(tensors, 2);
  launch({1, kThreads, sizeof(TileSmem), nullptr}, tile_kernel<Tile::read_past_allocation>, x.get(), y.get());
  return y.values()[0] == 2;
}

// ---- the table
// --------------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  std::function<bool()> run;
};

#define TILE(bug) \
  { "tile: " #bug, run_tile<Tile::bug> }
#define LANES(bug) \
  { "lanes: " #bug, run_lanes<Lanes::bug> }
#define PIPELINE(bug) \
  { "pipeline: " #bug, run_pipeline<Pipeline::bug> }
#define BLOCKS(bug) \
  { "blocks: " #bug, run_blocks<Blocks::bug> }
#define BYTES(bug) \
  { "bytes: " #bug, run_bytes<Bytes::bug> }
#define ROLES(bug) \
  { "roles: " #bug, run_roles<Roles::bug> }

const Case right[] = {TILE(right), LANES(right), PIPELINE(right), BLOCKS(right), BYTES(right), ROLES(right)};
const Case bugs[] = {TILE(no_barrier_before_read),
                     TILE(no_barrier_before_write),
                     TILE(read_past_array),
                     TILE(write_past_array),
                     TILE(read_uninitialised),
                     TILE(read_past_allocation),
                     TILE(write_past_allocation),
                     TILE(divergent_barrier),
                     TILE(barrier_missed_by_a_warp),
                     TILE(early_return),
                     TILE(unaligned_vector),
                     TILE(read_unwritten_input),
                     TILE(too_little_shared_memory),
                     TILE(write_to_input_of_others),
                     TILE(static_without_barrier),
                     LANES(not_in_mask),
                     LANES(half_absent),
                     LANES(source_outside_mask),
                     LANES(mask_names_returned),
                     LANES(no_syncwarp),
                     LANES(half_syncwarp),
                     LANES(different_instructions),
                     LANES(other_half_votes),
                     PIPELINE(no_wait),
                     PIPELINE(wait_too_few),
                     PIPELINE(no_commit),
                     PIPELINE(no_barrier_after_wait),
                     PIPELINE(early_release),
                     PIPELINE(no_transposition),
                     PIPELINE(wrong_lane_map),
                     PIPELINE(no_row_guard),
                     PIPELINE(unaligned_row),
                     PIPELINE(unaligned_copy),
                     PIPELINE(source_overwritten),
                     PIPELINE(swapped_fragments),
                     PIPELINE(wrong_result_row),
                     PIPELINE(copy_out_of_shared_memory),
                     PIPELINE(late_first_stage),
                     PIPELINE(one_lane_missing),
                     BLOCKS(plain_sum),
                     BLOCKS(reads_result_of_another),
                     BLOCKS(overlapping_tiles),
                     BLOCKS(atomic_and_plain),
                     BYTES(reads_the_neighbours),
                     ROLES(no_full_barrier),
                     ROLES(no_empty_barrier),
                     ROLES(wrong_count),
                     ROLES(wrong_id),
                     ROLES(missing_arrival),
                     ROLES(two_counts),
                     ROLES(bad_id),
                     {"host: reads device memory", read_device_memory_on_the_host},
                     {"tensors: read past the end", read_past_the_tensor}};

// "" where nothing is wrong.
std::string verdict(const Case& c, const char* order) {
  setenv("ROPEWALK_SIMT_ORDER", order, 1);
  try {
    return c.run() ? "" : "wrong numbers";
  } catch (const std::exception& error) {
    // past the file and the kernel's name
    const std::string text = error.what();
    const size_t kernel = text.find("_kernel: ");
    return kernel == std::string::npos ? text : text.substr(kernel + 9);
  }
}

}  // namespace

int main() {
  for (const Case& c : right)
    for (const char* order : {"forward", "reverse", "random:1", "random:2", "random:3", "random:4"}) {
      const std::string found = verdict(c, order);
      verify(found.empty(), std::string(c.name) + ", order " + order + ": " + found);
    }
  for (const Case& c : bugs) {
    if (!simt::instrumented) {
      skipped++;
      continue;
    }
    bool everywhere = true;
    for (const char* order : {"forward", "reverse", "random:5"}) {
      const std::string found = verdict(c, order);
      if (order[0] == 'f') std::printf("%-36s %s\n", c.name, found.c_str());
      everywhere &= !found.empty();
    }
    verify(everywhere, std::string(c.name) + ": not found");
  }
  return summary("bugs_test");
}
