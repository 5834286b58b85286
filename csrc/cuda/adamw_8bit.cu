// adamw_8bit: AdamW (adamw.cu) with m and v in 8 bits, arXiv 2110.02861: blocks of 256 elements with a scale each,
// bytes that index the dynamic map. The arithmetic is that of csrc/adamw.h.
//
// p, g f32 or bf16, master f32, low u16, m, v u8, flat (N), m_scale, v_scale f32 (N/256). Memory traffic: p, m, v and
// master or low read and written, g read: 10.06 bytes an element with p and g in bf16. Nothing is touched where hyper's
// apply is not 1. Grid: at most 4 blocks of 8 warps an SM. A warp has a block of 256 at a time, a lane 8 elements of
// it: 16 bytes of bf16, 8 of m and v. Its new m and v stay in registers while the warp finds the largest of them.
// Shared memory: the eight pieces of both maps, 320 bytes; the lanes that ask for one piece are served at once, those
// that ask for others by other banks.
#include "weights.h"

namespace rw::cuda {

namespace {

constexpr int kResident = 4;  // blocks of an SM: 64 registers a thread
constexpr int kWarps = kFlatThreads / kWarp;
constexpr int kLane = kStateBlock / kWarp;  // elements of a lane

struct Maps {
  DynamicMap m;
  REDZONE(between);
  DynamicMap v;
};
struct MapsTag;

constexpr int kMapFloats = sizeof(DynamicMap) / sizeof(float);

// Every thread calls it, with a place for one number at most.
__device__ __forceinline__ void fill_map(DynamicMap& map, const DynamicMap& from, int place) {
  if (place < 0 || place >= kMapFloats) return;
  (&map.slope[0])[place] = (&from.slope[0])[place];
}

__device__ __forceinline__ uint32_t byte_of(const Raw<kLane, uint8_t>& raw, int i) {
  return raw.word[i / 4] >> (8 * (i % 4)) & 0xffu;
}
__device__ __forceinline__ void set_byte(Raw<kLane, uint8_t>& raw, int i, uint32_t bits) {
  bits = (bits & 0xffu) << (8 * (i % 4));
  raw.word[i / 4] = i % 4 ? raw.word[i / 4] | bits : bits;
}

template <bool Vector, Keep keep, typename G>
__global__ void __launch_bounds__(kFlatThreads, kResident)
    adamw_8bit_kernel(Weights<keep> weights, const G* g, uint8_t* m, float* m_scale, uint8_t* v, float* v_scale,
                      const float* hyper, AdamWSettings settings, const __grid_constant__ DynamicMap signed_map,
                      const __grid_constant__ DynamicMap unsigned_map, int64_t blocks) {
  if (hyper[kApply] != 1.0f) return;
  auto& maps = static_smem<Maps, MapsTag>();
  fill_map(maps.m, signed_map, threadIdx.x);
  fill_map(maps.v, unsigned_map, static_cast<int>(threadIdx.x) - kMapFloats);
  __syncthreads();
  const AdamWStep step = adamw_step(settings, hyper);
  const Noise noise = noise_of(settings.seed, hyper[kStep]);
  for (int64_t block = int64_t{blockIdx.x} * kWarps + warp_index(); block < blocks;
       block += int64_t{gridDim.x} * kWarps) {
    const int64_t at = block * kStateBlock + lane_index() * kLane;
    float weight[kLane], gradient[kLane], first[kLane], second[kLane];
    auto m_bytes = fetch_some<Vector, kLane>(m + at, kLane), v_bytes = fetch_some<Vector, kLane>(v + at, kLane);
    const float m_before = m_scale[block], v_before = v_scale[block];
    load_some<Vector>(g + at, kLane, gradient);
    load_weights<Vector>(weights, at, weight);
    uint32_t m_most = 0, v_most = 0;
#pragma unroll
    for (int i = 0; i < kLane; i++) {
      first[i] = decoded_m(maps.m, m_before, byte_of(m_bytes, i));
      second[i] = decoded_v(maps.v, v_before, byte_of(v_bytes, i));
      update(step, gradient[i], weight[i], first[i], second[i]);
      const uint32_t m_bits = magnitude_bits(first[i]), v_bits = magnitude_bits(second[i]);
      m_most = m_bits > m_most ? m_bits : m_most;
      v_most = v_bits > v_most ? v_bits : v_most;
    }
    store_weights<Vector>(weights, at, weight, noise.weights, settings.first + at);
    const StateScale m_state = state_scale(__reduce_max_sync(kAllLanes, m_most));
    const StateScale v_state = state_scale(__reduce_max_sync(kAllLanes, v_most));
#pragma unroll
    for (int i = 0; i < kLane; i++) {
      set_byte(m_bytes, i, encoded_m(maps.m, m_state, first[i]));
      set_byte(v_bytes, i, encoded_v(maps.v, v_state, second[i]));
    }
    put_all<Vector>(m + at, m_bytes);
    put_all<Vector>(v + at, v_bytes);
    __syncwarp();  // all lanes have read the old scales
    if (lane_index() == 0) {
      m_scale[block] = m_state.scale;
      v_scale[block] = v_state.scale;
    }
  }
}

template <Keep keep, typename G>
void update_blocks(Context& context, const adamw_8bit_args& args, const Weights<keep>& weights, G) {
  const bool vector =
      all_aligned(args.p, args.master, args.low, args.g) && aligned(args.m.data, 8) && aligned(args.v.data, 8);
  const int64_t blocks = args.p.size() / kStateBlock;
  launch(flat(context, blocks * kWarp, kResident),
         vector ? adamw_8bit_kernel<true, keep, G> : adamw_8bit_kernel<false, keep, G>, weights, args.g.as<G>(),
         args.m.as<uint8_t>(), args.m_scale.as<float>(), args.v.as<uint8_t>(), args.v_scale.as<float>(),
         args.hyper.as<float>(), adamw_settings(args), dynamic_map(kSigned), dynamic_map(kUnsigned), blocks);
}

}  // namespace

void adamw_8bit(Context& context, const adamw_8bit_args& args) {
  with_weights(args, [&](auto weights) {
    with_float_type(args.g.dtype, [&](auto g) { update_blocks(context, args, weights, g); });
  });
}

}  // namespace rw::cuda
