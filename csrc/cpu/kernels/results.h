// What becomes of a row's sum and its softmax: out and lse.
#pragma once
#include "cpu/kernels/softmax.h"
#include "params/key_range.h"

namespace diffqkv {
namespace {

template <class E>
DIFFQKV_INLINE void store_scaled(const float* o, int64_t d, float scale, typename E::T* out) {
  int64_t x = 0;
  for (; x + VL <= d; x += VL) E::store(out + x, vmul(vload(o + x), vset(scale)));
  for (; x < d; ++x) out[x] = E::put(o[x] * scale);
}

inline void store_row(const TokenView& view, int64_t at, int64_t d, const float* row, float scale) {
  if (view.dtype == DType::f32)
    store_scaled<F32>(row, d, scale, (float*)view.data + at);
  else if (view.dtype == DType::bf16)
    store_scaled<BF16>(row, d, scale, (uint16_t*)view.data + at);
  else
    store_scaled<F16>(row, d, scale, (uint16_t*)view.data + at);
}

// Scores times this are natural logarithms of weights. The softmax runs on |softmax_scale|; a negative scale is folded
// into q, so that the maximum is the right end. Capped scores are scaled already.
DIFFQKV_INLINE float score_scale(const AttentionParams& p) {
  return p.softcap > 0 ? 1.0f : float(__builtin_fabs(p.softmax_scale));
}
// Scores times this are exponents of 2. A scale of 0 becomes a number that makes nothing of any score, but not a NaN of
// the -inf in masked columns.
DIFFQKV_INLINE float exp2_scale(const AttentionParams& p) {
  const float c = score_scale(p) * kLog2e<float>;
  return c < 1e-37f ? 1e-37f : c;
}

// lse is made of the maximum as the gradients make it of scores: a row of one weight has probabilities of 1, however
// large its scores are.
inline void store_result(const AttentionParams& p, const Entry& entry, int64_t q_head, int64_t query, const float* o,
                         RowState state) {
  const float top = state.max * score_scale(p);
  float lse = state.sum == 0.0f ? -kInf : top + __builtin_log2f(state.sum) * kLn2<float>;
  if (p.sinks != nullptr) {
    const float sink = ((const float*)p.sinks)[q_head];
    if (state.sum == 0.0f) {
      lse = sink;
    } else if (sink > -kInf) {
      const float above = (sink - top) * kLog2e<float>;
      const bool all = above > 126.0f;  // what the row has found itself, at least 1, is nothing beside that
      const float weight = exp2_of(all ? 126.0f : above);
      lse = all ? sink : top + __builtin_log2f(state.sum + weight) * kLn2<float>;
      state.norm += weight;
    }
  }
  const float keep_scale = float(p.dropout.keep_scale());
  store_row(p.out, row_of(p.out, entry, q_head, query), p.d_v, o, state.norm == 0.0f ? 0.0f : keep_scale / state.norm);
  ((float*)p.lse)[lse_of(p, entry, q_head, query)] = lse;
}

}  // namespace
}  // namespace diffqkv
