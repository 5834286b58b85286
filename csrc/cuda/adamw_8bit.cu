// adamw_8bit: AdamW (adamw.cu) with m and v in 8 bits, arXiv 2110.02861: blocks of 256 elements with a scale each,
// bytes that index the dynamic map. The arithmetic is that of csrc/adamw.h.
//
// p, g f32 or bf16, master f32, low u16, m, v u8, flat (N), m_scale, v_scale f32 (N/256). Memory traffic: p, m, v and
// master or low read and written, g read: 10.06 bytes an element with p and g in bf16. Nothing is touched where hyper's
// apply is not 1. Grid: at most 4 blocks of 8 warps an SM. A warp has a block of 256 at a time, a lane 8 elements of
// it: 16 bytes of bf16, 8 of m and v. Its new m and v stay in registers while the warp finds the largest of them.
// Shared memory: both maps, 3.3 KB: the values by their bytes, and what encodes by octaves. Instructions are what
// limits this kernel, so that a look-up whose lanes meet in some bank is better than a dozen of them.
#include "weights.h"

namespace rw::cuda {

namespace {

constexpr int kResident = 4;  // blocks of an SM: 64 registers a thread
constexpr int kWarps = kFlatThreads / kWarp;
constexpr int kLane = kStateBlock / kWarp;  // elements of a lane

struct alignas(16) Map {
  uint32_t carry[32];
  float4 piece[32];  // rise, shift and last of an octave
  float value[256];  // by the byte
};
struct Maps {
  Map m;
  REDZONE(between);
  Map v;
};
struct MapsTag;

// Every thread writes one value of a map, and 32 of them an octave.
__device__ __forceinline__ void fill_map(Map& map, const OctaveMap& from, float value) {
  static_assert(kFlatThreads == 256, "a thread for each value");
  const int place = threadIdx.x;
  map.value[place] = value;
  if (place >= 32) return;
  map.carry[place] = from.carry[place];
  map.piece[place] = float4{from.rise[place], from.shift[place], from.last[place], 0.0f};
}

// The whole part of nearest()'s y, for x from 2^-24 to 1.
__device__ __forceinline__ int32_t whole_y(const Map& map, float x) {
  const uint32_t bits = bits_of(x), carried = bits + map.carry[bits >> 23 & 31];
  const float4 piece = map.piece[carried >> 23 & 31];
  return to_whole(fminf(x * piece.x + piece.y, piece.z));
}

// As encoded_m() and encoded_v().
__device__ __forceinline__ uint32_t byte_of_m(const Map& map, const StateScale& s, float m) {
  const int32_t number = whole_y(map, fmaxf(fabsf(m * s.inverse), 0x1p-24f));
  return static_cast<uint32_t>(bits_of(m) >> 31 ? max(-number, -127) : number);
}
__device__ __forceinline__ uint32_t byte_of_v(const Map& map, const StateScale& s, float v) {
  // what is not 0 is at least what is nearest to the smallest value
  const int32_t number = whole_y(map, fmaxf(v * s.inverse, 0x1p-22f)) - 1;
  return bits_of(v) ? static_cast<uint32_t>(number) : 0u;
}

__device__ __forceinline__ uint32_t byte_of(const Raw<kLane, uint8_t>& raw, int i) {
  return raw.word[i / 4] >> (8 * (i % 4)) & 0xffu;
}
__device__ __forceinline__ void set_byte(Raw<kLane, uint8_t>& raw, int i, uint32_t bits) {
  bits = (bits & 0xffu) << (8 * (i % 4));
  raw.word[i / 4] = i % 4 ? raw.word[i / 4] | bits : bits;
}

struct BothMaps {
  DynamicMap signed_map, unsigned_map;
  OctaveMap signed_octaves, unsigned_octaves;
};
BothMaps both_maps() {
  constexpr DynamicMap signed_map = dynamic_map(kSigned), unsigned_map = dynamic_map(kUnsigned);
  constexpr OctaveMap signed_octaves = octave_map(signed_map, kSigned);
  constexpr OctaveMap unsigned_octaves = octave_map(unsigned_map, kUnsigned);
  return {signed_map, unsigned_map, signed_octaves, unsigned_octaves};
}

template <bool Vector, Keep keep, typename G>
__global__ void __launch_bounds__(kFlatThreads, kResident)
    adamw_8bit_kernel(Weights<keep> weights, const G* g, uint8_t* m, float* m_scale, uint8_t* v, float* v_scale,
                      const float* hyper, AdamWSettings settings, const __grid_constant__ BothMaps given,
                      int64_t blocks) {
  if (hyper[kApply] != 1.0f) return;
  auto& maps = static_smem<Maps, MapsTag>();
  fill_map(maps.m, given.signed_octaves, decoded_m(given.signed_map, 1.0f, (threadIdx.x + 127u) & 0xffu));
  fill_map(maps.v, given.unsigned_octaves, decoded_v(given.unsigned_map, 1.0f, threadIdx.x));
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
      first[i] = maps.m.value[byte_of(m_bytes, i)] * m_before;
      second[i] = maps.v.value[byte_of(v_bytes, i)] * v_before;
      update(step, gradient[i], weight[i], first[i], second[i]);
      const uint32_t m_bits = magnitude_bits(first[i]), v_bits = magnitude_bits(second[i]);
      m_most = m_bits > m_most ? m_bits : m_most;
      v_most = v_bits > v_most ? v_bits : v_most;
    }
    store_weights<Vector>(weights, at, weight, noise.weights, settings.first + at);
    const StateScale m_state = state_scale(__reduce_max_sync(kAllLanes, m_most));
    const StateScale v_state = state_scale(__reduce_max_sync(kAllLanes, v_most));
    if (m_state.odd || v_state.odd) {
#pragma unroll
      for (int i = 0; i < kLane; i++) {
        if (m_state.odd) first[i] = tame(m_state, first[i]);
        if (v_state.odd) second[i] = tame(v_state, second[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kLane; i++) {
      set_byte(m_bytes, i, byte_of_m(maps.m, m_state, first[i]));
      set_byte(v_bytes, i, byte_of_v(maps.v, v_state, second[i]));
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
         args.hyper.as<float>(), adamw_settings(args), both_maps(), blocks);
}

}  // namespace

void adamw_8bit(Context& context, const adamw_8bit_args& args) {
  with_weights(args, [&](auto weights) {
    with_float_type(args.g.dtype, [&](auto g) { update_blocks(context, args, weights, g); });
  });
}

}  // namespace rw::cuda
