// adamw_8bit: AdamW (adamw.cc) with m and v in 8 bits, arXiv 2110.02861: blocks of 256 elements with a scale each,
// bytes that index the dynamic map. The arithmetic is that of csrc/adamw.h.
//
// p, g, master, low, m, v flat (N), m_scale, v_scale (N/256). Memory traffic: p, m, v and master or low read and
// written, g read: 10.06 bytes an element with p and g in bf16. Tasks are runs of blocks. The new m and v of a block
// wait in a buffer of 2 KB until the largest of them are known; they are encoded while the next block is updated, whose
// roots and quotients take long.
#include "states.h"

namespace rw::cpu::RW_ISA {

namespace {

constexpr int kRuns = kStateBlock / kRun;

// The new states of a block, as their scales expect them.
struct Moments {
  Run m[kRuns], v[kRuns];
  StateScale m_scale, v_scale;
};

inline StateScale scale_of(vi most) {
  int32_t bits = 0;
  for (int64_t i = 0; i < VL; i++) bits = most[i] > bits ? most[i] : bits;
  return state_scale(static_cast<uint32_t>(bits));
}

inline void tame_all(const StateScale& s, Run (&states)[kRuns]) {
  if (!s.odd) return;
  for (Run& run : states)
    for (vf& x : run.x) x = tame(s, x);
}

inline vi most_of(vi most, const Run& states) {
  for (const vf& x : states.x) {
    const vi bits = (vi)magnitude_bits(x);
    most = bits > most ? bits : most;
  }
  return most;
}

inline void encode_run(const adamw_8bit_args& a, int64_t block, const Moments& from, int run) {
  const int64_t at = block * kStateBlock + run * kRun;
  encode_m(a.m.as<uint8_t>() + at, from.m_scale, from.m[run]);
  encode_v(a.v.as<uint8_t>() + at, from.v_scale, from.v[run]);
}

// Updates a block, and encodes the one before it, if there is one.
template <Keep keep, typename Decoded, bool encode, typename G>
inline void update_block(const adamw_8bit_args& a, int64_t block, const AdamWStep& step, const Noise& noise,
                         const Moments& before, Moments& out) {
  const float m_scale = a.m_scale.as<float>()[block], v_scale = a.v_scale.as<float>()[block];
  vi most_m = {}, most_v = {};
  for (int run = 0; run < kRuns; run++) {
    const int64_t at = block * kStateBlock + run * kRun;
    Run weight = load_weights<keep>(a, at);
    Run m = Decoded::m(a.m.as<uint8_t>() + at, m_scale), v = Decoded::v(a.v.as<uint8_t>() + at, v_scale);
    update(step, load_run(a.g.as<G>() + at), weight, m, v);
    out.m[run] = m;
    out.v[run] = v;
    if constexpr (encode) encode_run(a, block - 1, before, run);
    most_m = most_of(most_m, m);
    most_v = most_of(most_v, v);
    store_weights<keep>(a, at, weight, noise);
  }
  out.m_scale = scale_of(most_m);
  out.v_scale = scale_of(most_v);
  a.m_scale.as<float>()[block] = out.m_scale.scale;
  a.v_scale.as<float>()[block] = out.v_scale.scale;
  tame_all(out.m_scale, out.m);
  tame_all(out.v_scale, out.v);
}

template <Keep keep, typename Decoded, typename G>
inline void update_blocks(const adamw_8bit_args& a, int64_t first, int64_t end, const AdamWStep& step,
                          const Noise& noise) {
  Moments moments[2];
  update_block<keep, Decoded, false, G>(a, first, step, noise, moments[1], moments[0]);
  for (int64_t block = first + 1; block < end; block++) {
    const int64_t odd = (block - first) & 1;
    update_block<keep, Decoded, true, G>(a, block, step, noise, moments[1 - odd], moments[odd]);
  }
  for (int run = 0; run < kRuns; run++) encode_run(a, end - 1, moments[(end - 1 - first) & 1], run);
}

template <Keep keep, typename G>
void update_8bit(Context& context, const adamw_8bit_args& a) {
  constexpr int64_t kBlocksOfTask = kBlock / kStateBlock;
  const float* hyper = a.hyper.as<float>();
  const AdamWSettings settings = adamw_settings(a);
  const AdamWStep step = adamw_step(settings, hyper);
  const Noise noise = noise_of(settings.seed, hyper[kStep]);
  const int64_t blocks = a.p.size() / kStateBlock, tasks = (blocks + kBlocksOfTask - 1) / kBlocksOfTask;
  const auto end_of = [blocks](int64_t task) {
    return (task + 1) * kBlocksOfTask < blocks ? (task + 1) * kBlocksOfTask : blocks;
  };
#if defined(__AVX512F__)
  if (context.permutes_bytes()) {
    return parallel(
        context, tasks, [&](int64_t task, int) __attribute__((target("avx512vbmi"), flatten)) {
          update_blocks<keep, Tables, G>(a, task * kBlocksOfTask, end_of(task), step, noise);
        });
  }
#endif
  parallel(
      context, tasks, [&](int64_t task, int) __attribute__((flatten)) {
        update_blocks<keep, Arithmetic, G>(a, task * kBlocksOfTask, end_of(task), step, noise);
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
