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

constexpr int64_t kGroup = 4;  // blocks at a time: 8 KB of states

constexpr DynamicMap kSignedMap = dynamic_map(kSigned), kUnsignedMap = dynamic_map(kUnsigned);

// The new states of a block, and the bits of the largest.
struct Moments {
  vf m[kStateBlock / VL], v[kStateBlock / VL];
  vi most_m, most_v;
};

template <Keep keep, typename G>
inline void update_block(const adamw_8bit_args& a, int64_t block, const AdamWStep& step, const Noise& noise,
                         Moments& out) {
  const auto load_all = [](const auto* p) { return load(p); };
  const auto store_all = [](auto* p, auto x) { store(p, x); };
  const float m_scale = a.m_scale.as<float>()[block], v_scale = a.v_scale.as<float>()[block];
  vi most_m = {}, most_v = {};
  for (int64_t i = 0; i < kStateBlock / VL; i++) {
    const int64_t at = block * kStateBlock + i * VL;
    const vb m_index = load(a.m.as<uint8_t>() + at) + static_cast<uint8_t>(127);
    vf weight = load_weight<keep>(a, at, load_all);
    vf m = decoded_m(kSignedMap, m_scale, widen(m_index));
    vf v = decoded_v(kUnsignedMap, v_scale, widen(load(a.v.as<uint8_t>() + at)));
    update(step, load(a.g.as<G>() + at), weight, m, v);
    store_weight<keep>(a, at, weight, noise, static_cast<int64_t>(a.first), store_all);
    out.m[i] = m;
    out.v[i] = v;
    const vi m_bits = (vi)magnitude_bits(m), v_bits = (vi)magnitude_bits(v);
    most_m = m_bits > most_m ? m_bits : most_m;
    most_v = v_bits > most_v ? v_bits : most_v;
  }
  out.most_m = most_m;
  out.most_v = most_v;
}

inline StateScale scale_of(vi most) {
  int32_t bits = 0;
  for (int64_t i = 0; i < VL; i++) bits = most[i] > bits ? most[i] : bits;
  return state_scale(static_cast<uint32_t>(bits));
}

inline void encode_block(const adamw_8bit_args& a, int64_t block, Moments& in) {
  const StateScale m_scale = scale_of(in.most_m), v_scale = scale_of(in.most_v);
  if (m_scale.odd)
    for (vf& m : in.m) m = tame(m_scale, m);
  if (v_scale.odd)
    for (vf& v : in.v) v = tame(v_scale, v);
  for (int64_t i = 0; i < kStateBlock / VL; i++) {
    const int64_t at = block * kStateBlock + i * VL;
    store(a.m.as<uint8_t>() + at, encoded_m(kSignedMap, m_scale, in.m[i]));
    store(a.v.as<uint8_t>() + at, encoded_v(kUnsignedMap, v_scale, in.v[i]));
  }
  a.m_scale.as<float>()[block] = m_scale.scale;
  a.v_scale.as<float>()[block] = v_scale.scale;
}

template <Keep keep, typename G>
void update_8bit(Context& context, const adamw_8bit_args& a) {
  constexpr int64_t kBlocksOfTask = kBlock / kStateBlock;
  const float* hyper = a.hyper.as<float>();
  const AdamWSettings settings = adamw_settings(a);
  const AdamWStep step = adamw_step(settings, hyper);
  const Noise noise = noise_of(settings.seed, hyper[kStep]);
  const int64_t blocks = a.p.size() / kStateBlock;
  parallel(context, (blocks + kBlocksOfTask - 1) / kBlocksOfTask, [&](int64_t task, int) {
    const int64_t end = (task + 1) * kBlocksOfTask < blocks ? (task + 1) * kBlocksOfTask : blocks;
    Moments moments[kGroup];
    for (int64_t first = task * kBlocksOfTask; first < end; first += kGroup) {
      const int64_t count = end - first < kGroup ? end - first : kGroup;
      for (int64_t i = 0; i < count; i++) update_block<keep, G>(a, first + i, step, noise, moments[i]);
      for (int64_t i = 0; i < count; i++) encode_block(a, first + i, moments[i]);
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
