// adamw_8bit: AdamW (adamw.cc) with m and v in 8 bits, arXiv 2110.02861: blocks of 256 elements with a scale each,
// bytes that index the dynamic map. The arithmetic is that of csrc/adamw.h.
//
// p, g, master, low, m, v flat (N), m_scale, v_scale (N/256). Memory traffic: p, m, v and master or low read and
// written, g read: 10.06 bytes an element with p and g in bf16. Tasks are runs of blocks. A block is decoded and
// updated vector by vector; its new m and v wait in a buffer of 2 KB until the largest of them are known, then they are
// encoded.
#include "weights.h"

namespace rw::cpu::RW_ISA {

namespace {

// The largest lane.
uint32_t largest(vu x) {
  uint32_t most = 0;
  for (int64_t i = 0; i < VL; i++) most = x[i] > most ? x[i] : most;
  return most;
}

template <Keep keep, typename G>
void update_8bit(Context& context, const adamw_8bit_args& a) {
  constexpr int64_t kBlocksOfTask = kBlock / kStateBlock;
  static constexpr DynamicMap signed_map = dynamic_map(kSigned), unsigned_map = dynamic_map(kUnsigned);
  const float* hyper = a.hyper.as<float>();
  const AdamWSettings settings = adamw_settings(a);
  const AdamWStep step = adamw_step(settings, hyper);
  const Noise noise = noise_of(settings.seed, hyper[kStep]);
  const int64_t blocks = a.p.size() / kStateBlock;
  const auto load_all = [](const auto* p) { return load(p); };
  const auto store_all = [](auto* p, auto x) { store(p, x); };
  parallel(context, (blocks + kBlocksOfTask - 1) / kBlocksOfTask, [&](int64_t task, int) {
    const int64_t end = (task + 1) * kBlocksOfTask < blocks ? (task + 1) * kBlocksOfTask : blocks;
    for (int64_t block = task * kBlocksOfTask; block < end; block++) {
      const int64_t start = block * kStateBlock;
      uint8_t *m_bytes = a.m.as<uint8_t>() + start, *v_bytes = a.v.as<uint8_t>() + start;
      float *m_scale = a.m_scale.as<float>() + block, *v_scale = a.v_scale.as<float>() + block;
      vf moments[2][kStateBlock / VL];
      vi most_m = {}, most_v = {};
      for (int64_t i = 0; i < kStateBlock; i += VL) {
        vf weight = load_weight<keep>(a, start + i, load_all);
        vf m = decoded_m(signed_map, *m_scale, load(m_bytes + i));
        vf v = decoded_v(unsigned_map, *v_scale, load(v_bytes + i));
        update(step, load(a.g.as<G>() + start + i), weight, m, v);
        store_weight<keep>(a, start + i, weight, noise, settings.first, store_all);
        moments[0][i / VL] = m;
        moments[1][i / VL] = v;
        const vi m_bits = (vi)magnitude_bits(m), v_bits = (vi)magnitude_bits(v);
        most_m = m_bits > most_m ? m_bits : most_m;
        most_v = v_bits > most_v ? v_bits : most_v;
      }
      const StateScale m_state = state_scale(largest((vu)most_m)), v_state = state_scale(largest((vu)most_v));
      for (int64_t i = 0; i < kStateBlock; i += VL) {
        store(m_bytes + i, encoded_m(signed_map, m_state, moments[0][i / VL]));
        store(v_bytes + i, encoded_v(unsigned_map, v_state, moments[1][i / VL]));
      }
      *m_scale = m_state.scale;
      *v_scale = v_state.scale;
    }
  });
}

}  // namespace

void adamw_8bit(Context& context, const adamw_8bit_args& a) {
  if_applied(a, [&](auto kept) {
    constexpr Keep keep = decltype(kept)::value;
    if (a.g.dtype == DType::bf16) return update_8bit<keep, bf16>(context, a);
    update_8bit<keep, float>(context, a);
  });
}

}  // namespace rw::cpu::RW_ISA
