// add: y = a + b. scale: y = a x. cast: y = x in another (or the same) dtype. fill: y = value. All flat, memory-bound:
// each element is read and written once.
#include "elementwise.h"

namespace rw::cpu::RW_ISA {

namespace {

template <typename F>
void add_as(Context& context, const add_args& a) {
  for_each_vector(context, a.y.size(), [&](int64_t i, auto load, auto store) {
    store(a.y.as<F>() + i, load(a.a.as<F>() + i) + load(a.b.as<F>() + i));
  });
}

template <typename F>
void scale_as(Context& context, const scale_args& a) {
  for_each_vector(context, a.y.size(), [&](int64_t i, auto load, auto store) {
    store(a.y.as<F>() + i, load(a.x.as<F>() + i) * splat(static_cast<float>(a.a)));
  });
}

template <typename F, typename G>
void cast_as(Context& context, const cast_args& a) {
  for_each_vector(context, a.y.size(),
                  [&](int64_t i, auto load, auto store) { store(a.y.as<G>() + i, load(a.x.as<F>() + i)); });
}

template <typename F>
void fill_as(Context& context, const fill_args& a) {
  for_each_vector(context, a.y.size(),
                  [&](int64_t i, auto, auto store) { store(a.y.as<F>() + i, splat(static_cast<float>(a.value))); });
}

}  // namespace

void add(Context& context, const add_args& a) {
  if (a.y.dtype == DType::bf16) return add_as<bf16>(context, a);
  add_as<float>(context, a);
}

void scale(Context& context, const scale_args& a) {
  if (a.y.dtype == DType::bf16) return scale_as<bf16>(context, a);
  scale_as<float>(context, a);
}

void cast(Context& context, const cast_args& a) {
  const bool x16 = a.x.dtype == DType::bf16, y16 = a.y.dtype == DType::bf16;
  if (x16 && y16) return cast_as<bf16, bf16>(context, a);
  if (x16) return cast_as<bf16, float>(context, a);
  if (y16) return cast_as<float, bf16>(context, a);
  cast_as<float, float>(context, a);
}

void fill(Context& context, const fill_args& a) {
  if (a.y.dtype == DType::bf16) return fill_as<bf16>(context, a);
  fill_as<float>(context, a);
}

}  // namespace rw::cpu::RW_ISA
