// Rows of Q, K and V as products take them. K arrives as compute panels of 32 tokens, [W][32] words: W = d_k, or with
// kDot d_k / 2 pairs of neighbouring dimensions. A row of q is W words.
#pragma once
#include "cpu/kernels/words.h"
#include "params/key_range.h"
#include "params/layout.h"

namespace diffqkv {
namespace {

constexpr int64_t kMaxRowWords = kMaxHeadDim;
alignas(64) const word kZeroRow[kMaxRowWords] = {};

DIFFQKV_INLINE void row_to_float(const void* row, DType dtype, int64_t n, float* out) {
  int64_t c = 0;
  if (dtype == DType::f32) {
    for (; c + VL <= n; c += VL) vstore(out + c, vload((const float*)row + c));
    for (; c < n; ++c) out[c] = ((const float*)row)[c];
  } else if (dtype == DType::bf16) {
    for (; c + VL <= n; c += VL) vstore(out + c, vload_bf16((const uint16_t*)row + c));
    for (; c < n; ++c) out[c] = float_of_bf16(((const uint16_t*)row)[c]);
  } else {
    for (; c + VL <= n; c += VL) vstore(out + c, vload_f16((const uint16_t*)row + c));
    for (; c < n; ++c) out[c] = float_of_f16(((const uint16_t*)row)[c]);
  }
}

// dst[w][i] = rows[i][w] for 32 rows of W words.
inline void transpose_panel(const word* const* rows, int64_t W, word* dst) {
  int64_t w = 0;
#if defined(__AVX2__)
  for (; w + 8 <= W; w += 8) {
    for (int i = 0; i < 32; i += 8) {
      __m256 r[8], t[8];
      DIFFQKV_UNROLL
      for (int j = 0; j < 8; ++j) r[j] = _mm256_loadu_ps((const float*)(rows[i + j] + w));
      DIFFQKV_UNROLL
      for (int j = 0; j < 8; j += 2) {
        t[j] = _mm256_unpacklo_ps(r[j], r[j + 1]);
        t[j + 1] = _mm256_unpackhi_ps(r[j], r[j + 1]);
      }
      DIFFQKV_UNROLL
      for (int j = 0; j < 8; j += 4) {
        r[j] = _mm256_shuffle_ps(t[j], t[j + 2], 0x44);
        r[j + 1] = _mm256_shuffle_ps(t[j], t[j + 2], 0xee);
        r[j + 2] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0x44);
        r[j + 3] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0xee);
      }
      DIFFQKV_UNROLL
      for (int j = 0; j < 4; ++j) {
        _mm256_storeu_ps((float*)(dst + (w + j) * 32 + i), _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
        _mm256_storeu_ps((float*)(dst + (w + j + 4) * 32 + i), _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
      }
    }
  }
#endif
  for (; w < W; ++w)
    for (int i = 0; i < 32; ++i) dst[w * 32 + i] = rows[i][w];
}

// The words (even[x], odd[x]) of two bf16 rows.
DIFFQKV_INLINE void pair_rows(const uint16_t* even, const uint16_t* odd, int64_t d, word* words) {
  for (int64_t x = 0; x < d; ++x) words[x] = word(even[x]) | word(odd[x]) << 16;
}

// A K or V head of a batch entry.
struct KvHead {
  const KvView& view;
  const Paging& paging;
  int64_t b, head, heads_per_group, dim;

  template <class T>
  T* at(KvSlot slot, int64_t offset) const {
    return head_at<T>(view, slot.page, head, heads_per_group) + offset;
  }
  const void* row(int64_t token) const {
    const KvSlot slot = kv_page(paging, b, token);
    const int64_t offset = slot.token * view.stride_token;
    return view.dtype == DType::f32 ? (const void*)at<const float>(slot, offset) : at<const uint16_t>(slot, offset);
  }
};
DIFFQKV_INLINE KvHead k_head_of(const AttentionParams& p, int64_t b, int64_t head) {
  return {p.k, p.paging, b, head, p.heads.k_per_group(), p.d_k};
}
DIFFQKV_INLINE KvHead v_head_of(const AttentionParams& p, int64_t b, int64_t head) {
  return {p.v, p.paging, b, head, p.heads.v_per_group(), p.d_v};
}

// The compute panel of the keys [t0, t0 + 32) of a head, t0 a multiple of 32: the cache's own memory where it has that
// form already, else a copy in `panel`. Keys outside `valid` are never read from rows; their columns hold anything.
// `rows` is room for 32 fp32 rows.
template <bool kDot>
inline const word* key_panel(const KvHead& keys, int64_t t0, KeyRange valid, word* panel, float* rows) {
  const int64_t d = keys.dim;
  const DType dtype = keys.view.dtype;
  if (keys.view.layout == KLayout::panels) {
    const KvSlot slot = kv_page(keys.paging, keys.b, t0);
    const int64_t offset = slot.token / kPanelTokens * keys.view.stride_panel;
    if (dtype == DType::f32) return keys.at<const word>(slot, offset);
    const uint16_t* src = keys.at<const uint16_t>(slot, offset);
    if (dtype == DType::bf16) {
      if (kDot) return (const word*)src;
      const word* pairs = (const word*)src;
      for (int64_t w = 0; w < d / 2; ++w)
        for (int64_t i = 0; i < kPanelTokens; ++i) {
          const word x = pairs[w * kPanelTokens + i];
          panel[2 * w * kPanelTokens + i] = x << 16;
          panel[(2 * w + 1) * kPanelTokens + i] = x & 0xffff0000u;
        }
    } else {
      for (int64_t i = 0; i < d * kPanelTokens; i += VL) vstore((float*)panel + i, vload_f16(src + i));
    }
    return panel;
  }
  const word* row[kPanelTokens];
  for (int64_t i = 0; i < kPanelTokens; ++i) {
    const int64_t t = t0 + i;
    row[i] = kZeroRow;
    if (t < valid.lo || t >= valid.hi) continue;
    row[i] = (const word*)keys.row(t);
    if (dtype == DType::f32) continue;
    float* copy = rows + i * d;
    if (kDot)
      __builtin_memcpy(copy, row[i], d * 2);
    else
      row_to_float(row[i], dtype, d, copy);
    row[i] = (const word*)copy;
  }
  transpose_panel(row, kDot ? d / 2 : d, panel);
  return panel;
}

DIFFQKV_INLINE const void* row_at(const TokenView& view, const Entry& entry, int64_t head, int64_t query) {
  return (const char*)view.data + row_of(view, entry, head, query) * (view.dtype == DType::f32 ? 4 : 2);
}

// Packs rows [t0, t0 + n) of a head as fp32 rows, or with kDot as pairs of rows; rows outside `valid` become zeros.
template <bool kDot>
void pack_rows(const KvHead& head, int64_t t0, int64_t n, KeyRange valid, word* dst, int64_t stride) {
  const auto row = [&](int64_t t) { return t < valid.lo || t >= valid.hi ? kZeroRow : head.row(t); };
  for (int64_t t = t0; t < t0 + n; t += kDot ? 2 : 1, dst += stride)
    if (kDot)
      pair_rows((const uint16_t*)row(t), (const uint16_t*)row(t + 1), head.dim, dst);
    else
      row_to_float(row(t), head.view.dtype, head.dim, (float*)dst);
}

// Copies a query row as words, [W]; `negate` turns the smallest score into the largest.
template <bool kDot>
inline void copy_query(const void* src, DType dtype, int64_t d, bool negate, word* words) {
  if (kDot)
    __builtin_memcpy(words, src, d * 2);
  else
    row_to_float(src, dtype, d, (float*)words);
  const word sign = kDot ? 0x80008000u : 0x80000000u;
  for (int64_t w = 0; negate && w < (kDot ? d / 2 : d); ++w) words[w] ^= sign;
}

}  // namespace
}  // namespace diffqkv
