// How the ops that update weights read and write them: f32, bf16 with masters or their lower halves, or bf16 alone.
#pragma once
#include "elementwise.h"

#include "../adamw.h"

namespace rw::cpu::RW_ISA {

// Weights i .. i + VL; `load` and `store` as for_each_vector gives them.
template <Keep keep, typename Args, typename Load>
vf load_weight(const Args& a, int64_t i, Load load) {
  const uint16_t* upper = a.p.template as<uint16_t>() + i;
  if constexpr (keep == Keep::f32)
    return load(a.p.template as<float>() + i);
  else if constexpr (keep == Keep::master)
    return load(a.master.template as<float>() + i);
  else if constexpr (keep == Keep::low)
    return real_of(master_of(load(upper), load(a.low.template as<uint16_t>() + i)));
  else
    return real_of(load(upper) << 16);
}

template <Keep keep, typename Args, typename Store>
void store_weight(const Args& a, int64_t i, vf weight, const Noise& noise, int64_t first, Store store) {
  uint16_t* upper = a.p.template as<uint16_t>() + i;
  if constexpr (keep == Keep::f32) {
    store(a.p.template as<float>() + i, weight);
  } else if constexpr (keep == Keep::stochastic) {
    store(upper, round_stochastically(weight, random_bits(noise.weights, first + i) >> 16));
  } else {
    const vu bits = sound_bits(weight);
    if constexpr (keep == Keep::master)
      store(a.master.template as<float>() + i, real_of(bits));
    else
      store(a.low.template as<uint16_t>() + i, bits);
    store(upper, upper_of(bits));
  }
}

template <auto keep>
struct Kept {
  static constexpr auto value = keep;
};

// f(Kept<keep>{}) for the way in which this op keeps its weights, unless its step is not to be applied.
template <typename Args, typename F>
void if_applied(const Args& a, F&& f) {
  if (a.hyper.template as<float>()[kApply] != 1.0f) return;
  if (a.p.dtype == DType::f32) return f(Kept<Keep::f32>{});
  if (a.master) return f(Kept<Keep::master>{});
  if (a.low) return f(Kept<Keep::low>{});
  f(Kept<Keep::stochastic>{});
}

}  // namespace rw::cpu::RW_ISA
