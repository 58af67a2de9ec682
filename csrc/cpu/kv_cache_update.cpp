// Writes new K and V rows to their cache slots, rotating K on the way (RoPE, half-split convention).
#include "cpu/attention_tile.h"
#include "cpu/kernels.h"

namespace diffqkv {
namespace {

DIFFQKV_INLINE float element(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::f32) return ((const float*)data)[at];
  const uint16_t x = ((const uint16_t*)data)[at];
  return dtype == DType::bf16 ? float_of_bf16(x) : float_of_f16(x);
}

// out = row with its first d_rot dimensions rotated by the angles of token t.
void rotate(const CacheUpdateParams& p, int64_t b, int64_t t, const float* row, float* out) {
  const int64_t at = b * p.rope_stride_batch + t * p.rope_stride_token;
  for (int64_t c = 0; c < p.d_rot; ++c)
    out[c] = row[c] * element(p.cos, p.rope_dtype, at + c) +
             rope_sign(c, p.d_rot) * row[rope_partner(c, p.d_rot)] * element(p.sin, p.rope_dtype, at + c);
  for (int64_t c = p.d_rot; c < p.d_k; ++c) out[c] = row[c];
}

template <class E>
void update_entry(const CacheUpdateParams& p, int64_t b, int64_t group) {
  using T = typename E::T;
  float row[kMaxHeadDim], rotated[kMaxHeadDim];
  T out[kMaxHeadDim];
  for (int64_t t = 0; t < p.s_new; ++t) {
    const KvSlot slot = new_token_slot(p, b, t);
    if (slot.page < 0) continue;
    for (int64_t i = 0; i < p.heads.k_per_group(); ++i) {
      const int64_t head = group * p.heads.k_per_group() + i;
      const T* src =
          (const T*)p.k_new.data + b * p.k_new.stride_batch + head * p.k_new.stride_head + t * p.k_new.stride_token;
      if (p.d_rot > 0) {
        row_to_float(src, p.k_new.dtype, p.d_k, row);
        rotate(p, b, t, row, rotated);
        for (int64_t c = 0; c < p.d_k; ++c) out[c] = E::put(rotated[c]);
        src = out;
      }
      T* cache = (T*)p.k_cache.data;
      if (p.k_cache.layout == KLayout::rows) {
        __builtin_memcpy(cache + kv_row(p.k_cache, group, i, slot), src, p.d_k * sizeof(T));
        continue;
      }
      T* panel = cache + kv_panel(p.k_cache, group, i, slot);
      for (int64_t c = 0; c < p.d_k; ++c) panel[panel_element(slot.token % kPanelTokens, c, E::dtype)] = src[c];
    }
    for (int64_t i = 0; i < p.heads.v_per_group(); ++i) {
      const int64_t head = group * p.heads.v_per_group() + i;
      const T* src =
          (const T*)p.v_new.data + b * p.v_new.stride_batch + head * p.v_new.stride_head + t * p.v_new.stride_token;
      __builtin_memcpy((T*)p.v_cache.data + kv_row(p.v_cache, group, i, slot), src, p.d_v * sizeof(T));
      if (p.v_stats == nullptr) continue;
      float* stats = p.v_stats + (b * p.heads.n_v + head) * (p.d_v + 1);
      float square = 0.0f;
      for (int64_t c = 0; c < p.d_v; ++c) {
        const float x = E::get(src[c]);
        stats[c] += x;
        square += x * x;
      }
      const float norm = __builtin_sqrtf(square);
      if (norm > stats[p.d_v] || norm != norm) stats[p.d_v] = norm;  // a NaN stays
    }
  }
}

}  // namespace

namespace DIFFQKV_ISA {
void kv_cache_update(const CacheUpdateParams& p, int64_t batch_group) {
  const int64_t groups = p.heads.groups(), b = batch_group / groups, group = batch_group % groups;
  if (p.k_new.dtype == DType::f32) return update_entry<F32>(p, b, group);
  if (p.k_new.dtype == DType::bf16) return update_entry<BF16>(p, b, group);
  update_entry<F16>(p, b, group);
}
}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
