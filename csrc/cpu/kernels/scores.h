// Rows of q times panels of K. Scores of a query row lie in a row of kTile floats; a row of q is broadcast word by word
// against a panel.
#pragma once
#include "cpu/kernels/words.h"
#include "params/params.h"

namespace diffqkv {
namespace {

constexpr int64_t kSumWords = 64;  // sums of sums round less

// s[r][0..32) = q[r] . k, or with kAdd += it, for MR query rows.
template <bool kDot, bool kAdd, int64_t kTile, int MR>
inline void score_block(const word* q, int64_t stride_q, const word* panel, int64_t W, float* s) {
  for (int64_t col = 0; col < kPanelTokens; col += 2 * VL) {
    vf acc0[MR], acc1[MR];
    DIFFQKV_UNROLL
    for (int i = 0; i < MR; ++i) acc0[i] = acc1[i] = vset(0.0f);
    const word *k = panel + col, *a = q;
    for (int64_t w = 0; w < W; ++w, k += kPanelTokens, ++a) {
      const vf k0 = vload((const float*)k), k1 = vload((const float*)k + VL);
      DIFFQKV_UNROLL
      for (int i = 0; i < MR; ++i) {
        // Every fourth row has a pointer of its own: one each would need more registers than there are.
        const word x = word_at(a + i / 4 * 4 * stride_q + i % 4 * stride_q);
        acc0[i] = mac<kDot>(x, k0, acc0[i]);
        acc1[i] = mac<kDot>(x, k1, acc1[i]);
      }
    }
    DIFFQKV_UNROLL
    for (int i = 0; i < MR; ++i) {
      float* to = s + i * kTile + col;
      vstore(to, kAdd ? vadd(vload(to), acc0[i]) : acc0[i]);
      vstore(to + VL, kAdd ? vadd(vload(to + VL), acc1[i]) : acc1[i]);
    }
  }
}
template <bool kDot, bool kAdd, int64_t kTile, int MR = kQkRows>
inline void score_part(int64_t rows, const word* q, int64_t stride_q, const word* panel, int64_t W, float* s) {
  for (; rows >= MR; rows -= MR, q += MR * stride_q, s += MR * kTile)
    score_block<kDot, kAdd, kTile, MR>(q, stride_q, panel, W, s);
  if constexpr (MR > 1) score_part<kDot, kAdd, kTile, MR - 1>(rows, q, stride_q, panel, W, s);
}
// s[r][0..32) = q[r] . k for `rows` query rows.
template <bool kDot, int64_t kTile>
DIFFQKV_INLINE void score_rows(int64_t rows, const word* q, int64_t stride_q, const word* panel, int64_t W, float* s) {
  score_part<kDot, false, kTile>(rows, q, stride_q, panel, min_of(W, kSumWords), s);
  for (int64_t w = kSumWords; w < W; w += kSumWords)
    score_part<kDot, true, kTile>(rows, q + w, stride_q, panel + w * kPanelTokens, min_of(W - w, kSumWords), s);
}

// Caps scores, before they are scaled for the exponential; see exp2_scale.
DIFFQKV_INLINE void cap_scores(const AttentionParams& p, int64_t rows, float* s, int64_t stride, int64_t begin,
                               int64_t end) {
  const vf scale = vset(float(__builtin_fabs(p.softmax_scale) / p.softcap)), cap = vset(float(p.softcap));
  for (int64_t r = 0; r < rows; ++r, s += stride)
    for (int64_t j = begin / VL * VL; j < end; j += VL) vstore(s + j, vmul(vtanh(vmul(vload(s + j), scale)), cap));
}

}  // namespace
}  // namespace diffqkv
