// kv_append:         k_cache[slot[t]] = R k[t], v_cache[slot[t]] = v[t]
// attention_cached:  o[t] = softmax(scale R q[t] k_cache^T) v_cache over the slots first[t] .. last[t]
//
// Shapes: k, v (B,T,K,D); q, o (B,T,H,D); k_cache, v_cache (B,K,S,D), keys rotated; f32 or bf16, D even, up to 256.
//
// kv_append is attention_rotate_kernel with other rows to write to, bound by memory: k and v are read and written once.
//
// attention_cached is attention_fwd_kernel (attention.cu), with the cache in the place of rotated keys and last[t] in
// the place of t. The query heads of a kv head share tiles, so the visible part of the cache is read once for up to 128
// rows (token, head). Up to 16 rows take a tile of one warp, of which a multiprocessor holds several, each with its own
// copies under way: a step of generation is bound by reading the cache. Where there are fewer tiles than 4 for each
// multiprocessor, blocks share the slots of a tile, 128 or a multiple of it each, and leave (D + 2) f32 a row in
// scratch memory, which attention_combine_kernel adds up in the order of the slots. How many depends on shapes and on
// the device's multiprocessors, not on what runs at the same time.
//
// Papers: FlashAttention 2205.14135 (the combination of partial softmaxes), RoFormer 2104.09864 (rotation).
#include "attention.h"

namespace rw::cuda {

void kv_append(Context& context, const kv_append_args& args) {
  Rotation rotation = {args.k, args.cos, args.sin, args.pos, args.k_cache.data};
  rotation.slot = args.slot.as<int32_t>();
  rotation.slots = args.k_cache.dims[2];
  rotation.copied = args.v.data;
  rotation.copy_to = args.v_cache.data;
  rotate_rows(context, rotation);
}

void attention_cached(Context& context, const attention_cached_args& args) {
  Attention a(args.scale);
  a.q = args.q.data;
  a.k = args.k_cache.data;
  a.v = args.v_cache.data;
  a.o = args.o.data;
  a.cos = args.cos.as<float>();
  a.sin = args.sin.as<float>();
  a.pos = args.pos.as<int32_t>();
  a.first = args.first.as<int32_t>();
  a.last = args.last.as<int32_t>();
  a.B = static_cast<int>(args.q.dims[0]);
  a.T = static_cast<int>(args.q.dims[1]);
  a.H = static_cast<int>(args.q.dims[2]);
  a.D = static_cast<int>(args.q.dims[3]);
  a.S = static_cast<int>(args.k_cache.dims[2]);
  a.K = static_cast<int>(args.k_cache.dims[1]);
  attend(context, args.q.dtype, a);
}

}  // namespace rw::cuda
