// The instructions of ptx90.h against what the PTX ISA says, written out once more and plainly. Runs on the emulator
// and, built by nvcc for sm_90a, on a GPU of that kind: the results are hashed, and both must give the hashes that
// stand here.
#include "check.h"
#include "cuda/ptx90.h"

namespace {

template <typename T>
uint64_t hash_of(const std::vector<T>& values) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  return hash;
}

template <typename T>
void compare(const std::string& name, const std::vector<T>& found, const std::vector<T>& expected, uint64_t hash) {
  bool same = found.size() == expected.size();
  for (size_t i = 0; same && i < found.size(); i++) same = std::memcmp(&found[i], &expected[i], sizeof(T)) == 0;
  verify(same, name + ": not what the PTX ISA says");
  const uint64_t own = hash_of(found);
  std::printf("hash %-32s %016llx\n", name.c_str(), static_cast<unsigned long long>(own));
  verify(own == hash, name + ": not the hash that stands here");
}

// ---- loads and stores of boxes
// ----------------------------------------------------------------------------------------

struct alignas(1024) BoxSmem {
  bf16 box[4096];
  MBarrier full;
};

// Copies the box as it lies in shared memory, and stores it at the same coordinates of another tensor.
template <int Rank>
__global__ void box_kernel(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, bf16* out,
                           int elements, int c0, int c1, int c2, int c3) {
  auto& smem = dyn_smem<BoxSmem>();
  if (threadIdx.x == 0) {
    mbarrier_init(smem.full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(from);
    mbarrier_arrive_expect_tx(smem.full, 2 * elements);
    if (Rank == 2) tma_load(smem.box, from, smem.full, c0, c1);
    if (Rank == 3) tma_load(smem.box, from, smem.full, c0, c1, c2);
    if (Rank == 4) tma_load(smem.box, from, smem.full, c0, c1, c2, c3);
  }
  mbarrier_wait(smem.full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < elements; i += 64) out[i] = smem.box[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (Rank == 2) tma_store(to, smem.box, c0, c1);
    if (Rank == 3) tma_store(to, smem.box, c0, c1, c2);
    if (Rank == 4) tma_store(to, smem.box, c0, c1, c2, c3);
    bulk_commit();
    bulk_wait<0>();
  }
}

void test_box(int rank, bool swizzled, const int (&dims)[4], const int (&box)[4], const int (&at)[4],
              uint64_t load_hash, uint64_t store_hash) {
  TensorShape shape = {rank, {}, {}, {}, swizzled};
  size_t size = 1, elements = 1;
  for (int i = 0; i < rank; i++) {
    shape.dims[i] = static_cast<uint64_t>(dims[i]);
    shape.box[i] = static_cast<uint32_t>(box[i]);
    if (i > 0) shape.strides[i - 1] = 2 * size;
    size *= static_cast<size_t>(dims[i]);
    elements *= static_cast<size_t>(box[i]);
  }
  std::vector<bf16> values(size);
  for (size_t i = 0; i < size; i++) values[i].bits = static_cast<uint16_t>(i % 65521 + 1);
  const Array<bf16> from(values), to(std::vector<bf16>(size, bf16{0})), out(elements);
  const auto kernel = rank == 2 ? box_kernel<2> : rank == 3 ? box_kernel<3> : box_kernel<4>;
  launch({1, 64, sizeof(BoxSmem), nullptr}, kernel, make_tensor_map(from.get(), shape),
         make_tensor_map(to.get(), shape), out.get(), static_cast<int>(elements), at[0], at[1], at[2], at[3]);
  std::vector<bf16> loaded(elements), stored(size, bf16{0});
  size_t i = 0;
  for (int l = 0; l < (rank > 3 ? box[3] : 1); l++)
    for (int k = 0; k < (rank > 2 ? box[2] : 1); k++)
      for (int j = 0; j < box[1]; j++)
        for (int c = 0; c < box[0]; c++, i++) {
          const int x[4] = {at[0] + c, at[1] + j, at[2] + k, at[3] + l};
          bool inside = true;
          size_t index = 0, step = 1;
          for (int d = 0; d < rank; d++) {
            inside &= x[d] >= 0 && x[d] < dims[d];
            index += static_cast<size_t>(x[d]) * step;
            step *= static_cast<size_t>(dims[d]);
          }
          // 16-byte chunk c of a 128-byte row r lies at chunk c ^ (r % 8).
          const size_t place = swizzled ? i ^ (i / 64 % 8) * 8 : i;
          loaded[place] = inside ? values[index] : bf16{0};
          if (inside) stored[index] = values[index];
        }
  const std::string name = std::to_string(rank) + "d" + (swizzled ? " swizzled" : "");
  compare("load " + name, out.values(), loaded, load_hash);
  compare("store " + name, to.values(), stored, store_hash);
}

// ---- bulk copies
// ------------------------------------------------------------------------------------------------------

struct alignas(128) BulkSmem {
  float values[256];
  MBarrier full[2];
};

// Two halves by two barriers and three phases, with a sum into `sums` and a copy to `out`.
__global__ void bulk_kernel(const float* from, float* out, float* sums) {
  auto& smem = dyn_smem<BulkSmem>();
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) {
    for (MBarrier& barrier : smem.full) mbarrier_init(barrier, 33);
    mbarrier_init_fence();
  }
  __syncthreads();
  for (int phase = 0; phase < 3; phase++) {
    for (int half = 0; half < 2; half++) {
      if (i == 64) {
        mbarrier_arrive_expect_tx(smem.full[half], 512);
        bulk_load(smem.values + 128 * half, from + 256 * phase + 128 * half, 512, smem.full[half]);
      } else if (i < 32) {
        mbarrier_arrive(smem.full[half]);
      }
    }
    for (MBarrier& barrier : smem.full) mbarrier_wait(barrier, phase % 2);
    for (int j = i; j < 256; j += 96) smem.values[j] *= 2;
    fence_proxy_async();
    __syncthreads();
    if (i == 0) {
      bulk_store(out + 256 * phase, smem.values, 1024);
      bulk_commit();
      bulk_add(sums, smem.values, 1024);
      bulk_commit();
      bulk_wait_read<0>();
    }
    __syncthreads();
  }
  if (i == 0) bulk_wait<0>();
}

void test_bulk() {
  std::vector<float> from(768), doubled(768), sums(256, 1), expected(256, 1);
  for (size_t i = 0; i < 768; i++) from[i] = static_cast<float>(i * 7 % 1009);
  for (size_t i = 0; i < 768; i++) doubled[i] = 2 * from[i];
  for (size_t i = 0; i < 768; i++) expected[i % 256] += doubled[i];
  const Array<float> df(from), out(768), ds(sums);
  launch({1, 96, sizeof(BulkSmem), nullptr}, bulk_kernel, df.get(), out.get(), ds.get());
  compare("cp.async.bulk", out.values(), doubled, 0xd4e1eba5dbc7509cu);
  compare("cp.reduce.async.bulk.add.f32", ds.values(), expected, 0x0cf53f73da1ef951u);
}

// ---- wgmma
// ------------------------------------------------------------------------------------------------------------

// a (64,64) and b (64,N) with K the contiguous dimension, or the other one; in boxes of 64 elements by rows.
template <int N>
struct alignas(1024) ProductSmem {
  bf16 a[64 * 64];
  bf16 b[(N + 63) / 64 * 64 * 64];
  MBarrier full;
};

enum class Form { shared, registers };

// d = a b + a b: twice over K = 64, the second time onto the first.
template <int N, bool MnMajorA, bool MnMajorB, Form Where>
__global__ void __launch_bounds__(128, 1)
    product_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const bf16* a,
                   float* d) {
  auto& smem = dyn_smem<ProductSmem<N>>();
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;
  constexpr int kBoxes = (N + 63) / 64;
  if (threadIdx.x == 0) {
    mbarrier_init(smem.full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(smem.full, 64 * 64 * 2 + (MnMajorB ? kBoxes * 64 : N) * 64 * 2);
    tma_load(smem.a, map_a, smem.full, 0, 0);
    if (MnMajorB)  // boxes of 64 n by 64 k
      for (int i = 0; i < kBoxes; i++) tma_load(smem.b + i * 64 * 64, map_b, smem.full, 64 * i, 0);
    else
      tma_load(smem.b, map_b, smem.full, 0, 0);
  }
  mbarrier_wait(smem.full, 0);
  float sum[N / 2];
  for (float& x : sum) x = 0;
  uint32_t fa[4][4];
  for (int k = 0; k < 4; k++)
    for (int i = 0; i < 4; i++) {
      const int row = 16 * warp + g + i % 2 * 8, column = 16 * k + 2 * t + i / 2 * 8;
      fa[k][i] = a[row * 64 + column].bits | static_cast<uint32_t>(a[row * 64 + column + 1].bits) << 16;
    }
#pragma unroll
  for (int round = 0; round < 2; round++) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
      // Sixteen of K are 32 bytes of a K-major row, sixteen rows of 128 bytes otherwise.
      const uint64_t of_a = matrix_descriptor(smem.a + (MnMajorA ? 16 * 64 : 16) * k, 1024, 8192);
      const uint64_t of_b = matrix_descriptor(smem.b + (MnMajorB ? 16 * 64 : 16) * k, 1024, 8192);
      if constexpr (Where == Form::registers)
        wgmma<N, MnMajorB>(sum, fa[k], of_b, round > 0 || k > 0);
      else
        wgmma<N, MnMajorA, MnMajorB>(sum, of_a, of_b, round > 0 || k > 0);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  for (int j = 0; j < N / 8; j++)
    for (int i = 0; i < 4; i++) d[(16 * warp + g + i / 2 * 8) * N + 8 * j + 2 * t + i % 2] = sum[4 * j + i];
}

template <int N, bool MnMajorA, bool MnMajorB, Form Where>
void test_product(uint64_t hash) {
  const std::vector<bf16> a = small_integers(64 * 64, 7), b = small_integers(N * 64, 8);
  // As stored: rows of K, or the other way round.
  std::vector<bf16> stored_a(a), stored_b(b);
  for (size_t i = 0; MnMajorA && i < 64; i++)
    for (size_t k = 0; k < 64; k++) stored_a[k * 64 + i] = a[i * 64 + k];
  for (size_t j = 0; MnMajorB && j < N; j++)
    for (size_t k = 0; k < 64; k++) stored_b[k * N + j] = b[j * 64 + k];
  const Array<bf16> da(stored_a), db(stored_b), plain(a);
  const Array<float> d(64 * N);
  const TensorMap map_a = make_tensor_map(da.get(), {2, {64, 64}, {128}, {64, 64}, true});
  const TensorMap map_b = MnMajorB ? make_tensor_map(db.get(), {2, {N, 64}, {2 * N}, {64, 64}, true})
                                   : make_tensor_map(db.get(), {2, {64, N}, {128}, {64, N}, true});
  launch({1, 128, sizeof(ProductSmem<N>), nullptr}, product_kernel<N, MnMajorA, MnMajorB, Where>, map_a, map_b,
         plain.get(), d.get());
  std::vector<float> expected(64 * N);
  for (size_t i = 0; i < 64; i++)
    for (size_t j = 0; j < N; j++) {
      float sum = 0;
      for (size_t k = 0; k < 64; k++) sum += value_of(a[i * 64 + k]) * value_of(b[j * 64 + k]);
      expected[i * N + j] = 2 * sum;
    }
  compare("wgmma n" + std::to_string(N) +
              (Where == Form::registers ? " a registers"
               : MnMajorA               ? " a mn"
                                        : " a k") +
              (MnMajorB ? " b mn" : " b k"),
          d.values(), expected, hash);
}

}  // namespace

int main() {
#ifdef __CUDACC__
  cudaDeviceProp gpu;
  check(cudaGetDeviceProperties(&gpu, 0), "asking for the GPU's properties");
  if (gpu.major != 9) {
    skipped = 36;
    return summary("conformance90_test");
  }
#endif
  test_box(2, false, {72, 50, 0, 0}, {40, 30, 0, 0}, {40, 25, 0, 0}, 0xee679ba0a33cd4d6u, 0x45dda256bbbcfb56u);
  test_box(2, true, {128, 70, 0, 0}, {64, 64, 0, 0}, {64, 16, 0, 0}, 0x5c90de98f88567d4u, 0xbd8da222b2be1c04u);
  test_box(3, true, {64, 9, 11, 0}, {64, 8, 4, 0}, {0, 3, -1, 0}, 0x7ce199f219e66f73u, 0xd282c3d41e0692b3u);
  test_box(4, true, {72, 5, 6, 3}, {64, 4, 2, 2}, {-16, 2, 4, 1}, 0x763b8061e455326au, 0x7814de9e2b95e45au);
  test_bulk();
  test_product<32, false, false, Form::shared>(0x56a9c83d7c36940fu);
  test_product<64, false, true, Form::shared>(0x2d7d88ca46aa54a6u);
  test_product<64, true, false, Form::shared>(0x2d7d88ca46aa54a6u);
  test_product<128, true, true, Form::shared>(0x520e440987e59fe3u);
  test_product<96, false, false, Form::registers>(0xa618fe0a678607bdu);
  test_product<192, false, true, Form::registers>(0x28324187fbd31881u);
  test_product<256, false, false, Form::shared>(0xd7d807ab8bb9bac4u);
  test_product<256, false, true, Form::registers>(0xd7d807ab8bb9bac4u);
  return summary("conformance90_test");
}
