// The steps of attention over one tile of keys, shared by the kernels for prefill (flash_attention.cpp), decode
// (decode_attention.cpp) and selective_v_attention. Scores of a query row lie in a row of kTile floats; softmax
// overwrites them with probabilities.
//
// K always arrives as compute panels of 32 tokens, [W][32] words of 32 bits: one fp32 per word (W = d_k), or, where the
// CPU has a bf16 dot product and the data is bf16, two neighbouring dimensions per word (W = d_k / 2). kDot names the
// second form. A row of q is broadcast word by word against a panel.
#pragma once
#include "cpu/kernels/dropout.h"
#include "cpu/kernels/simd.h"
#include "params/key_range.h"
#include "params/layout.h"
#include "plan/cpu/attention.h"

namespace diffqkv {
namespace {

typedef uint32_t word;

#if defined(__AVX512F__)
constexpr int kQkRows = 12, kPvRows = 6, kPvVectors = 4;  // 24 accumulators of 32 registers
#else
constexpr int kQkRows = 6, kPvRows = 6, kPvVectors = 2;  // 12 of 16
#endif
constexpr int64_t kRandomBits = kKeyTile + kDraws * kKeysPerDraw;  // room for the random bits of a row's tile

DIFFQKV_INLINE int64_t padded_dim(int64_t d) { return round_up(d, 16); }

struct Scratch {  // hands out 64-byte aligned pieces of a thread's workspace
  char* at;
  explicit Scratch(void* p) : at((char*)(((uintptr_t)p + 63) & ~uintptr_t(63))) {}
  template <class T>
  T* take(int64_t n) {
    T* piece = (T*)at;
    at += round_up(n * int64_t(sizeof(T)), 64);
    return piece;
  }
};

// ---- packing --------------------------------------------------------------------------------------------------------

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

// ---- scores ---------------------------------------------------------------------------------------------------------

template <bool kDot>
DIFFQKV_INLINE vf mac(word a, vf b, vf acc) {
#if defined(__AVX512BF16__)
  if (kDot) return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
#endif
  return vfma(vset(float_of_bits(a)), b, acc);
}

DIFFQKV_INLINE word word_at(const word* p) {  // 16-bit rows may start anywhere
  word x;
  __builtin_memcpy(&x, (const char*)p, 4);
  return x;
}

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

// ---- softmax --------------------------------------------------------------------------------------------------------

struct RowState {
  float max;   // of the raw scores
  float sum;   // of the probabilities 2^((score - max) * c): the lse comes from it
  float norm;  // of the probabilities as they were multiplied with V: the result is divided by it
};
constexpr RowState kEmptyRow = {-kInf, 0.0f, 0.0f};

// Stores two vectors as bf16 and adds what was stored to norm.
DIFFQKV_INLINE vf store_rounded(uint16_t* p, vf e0, vf e1, vf norm) {
#if defined(__AVX512BF16__)
  const __m512bh packed = _mm512_cvtne2ps_pbh(e1, e0);
  _mm512_storeu_si512(p, (__m512i)packed);
  return _mm512_dpbf16_ps(norm, packed, (__m512bh)_mm512_set1_epi16(0x3f80));
#else
  vstore_bf16(p, e0);
  vstore_bf16(p + VL, e1);
  return vadd(norm, vadd(vload_bf16(p), vload_bf16(p + VL)));
#endif
}

// Fills what the vectors of the columns [first, last) have besides the row's own with -inf; returns `least` or the
// maximum, whichever is larger.
DIFFQKV_INLINE float masked_maximum(float* s, KeyRange own, int64_t first, int64_t last, float least) {
  for (int64_t j = first; j < own.lo; ++j) s[j] = -kInf;
  for (int64_t j = own.hi; j < last; ++j) s[j] = -kInf;
  vf m0 = vset(-kInf), m1 = m0;
  int64_t j = first;
  for (; j + 2 * VL <= last; j += 2 * VL) {
    m0 = vmax(vload(s + j), m0);
    m1 = vmax(vload(s + j + VL), m1);
  }
  if (j < last) m0 = vmax(vload(s + j), m0);
  m0 = vmax(m0, m1);
  return vgt_bits(m0, vset(least)) == 0 ? least : vmaximum(m0);  // most tiles of a long row hold no new maximum
}

[[gnu::noinline, gnu::cold]] inline void subtract(float* s, int64_t first, int64_t last, float x) {
  for (int64_t j = first; j < last; j += VL) vstore(s + j, vsub(vload(s + j), vset(x)));
}
// The shift of a row's exponents of 2, score * c + shift. If the maximum is large, its scores in the columns
// [first, last), whole vectors, become differences from it.
DIFFQKV_INLINE float shift_of(float* s, int64_t first, int64_t last, float maximum, float c) {
  const float shift = -maximum * c;
  if (!(__builtin_fabsf(shift) > kLargeExponent)) return shift;
  // Without a finite score so far there is no maximum to subtract.
  if (maximum > -kInf) subtract(s, first, last, maximum);
  return 0.0f;
}

// s[j] = 2^(s[j] * c + shift) for j in [first, last), or with kDot into p, rounded to bf16; their sum, by lanes, and
// with kDot that of the rounded ones.
template <bool kDot>
DIFFQKV_INLINE void exponentials(float* s, uint16_t* p, int64_t first, int64_t last, float c, float shift, vf& sum,
                                 vf& norm) {
  const vf vc = vset(c), vshift = vset(shift);
  vf sum0 = vset(0.0f), sum1 = sum0;
  norm = sum0;
  int64_t j = first;
  for (; j + 2 * VL <= last; j += 2 * VL) {
    const vf e0 = vexp2<kDot>(vfma(vload(s + j), vc, vshift)), e1 = vexp2<kDot>(vfma(vload(s + j + VL), vc, vshift));
    sum0 = vadd(sum0, e0);
    sum1 = vadd(sum1, e1);
    if (kDot) {
      norm = store_rounded(p + j, e0, e1, norm);
    } else {
      vstore(s + j, e0);
      vstore(s + j + VL, e1);
    }
  }
  if (j < last) {
    const vf e = vexp2<kDot>(vfma(vload(s + j), vc, vshift));
    sum0 = vadd(sum0, e);
    if (kDot) {
      vstore_bf16(p + j, e);
      norm = vadd(norm, vload_bf16(p + j));
    } else {
      vstore(s + j, e);
    }
  }
  sum = vadd(sum0, sum1);
}

// Softmax of up to kPvRows rows of scores. Takes the columns own(r) into the state of row r and turns them into
// un-normalised probabilities; the other columns of `zero` become 0. factor[r] is for what the row had accumulated
// before. Step by step for all rows, so that no row waits for the reductions of another. factor: room for 16.
template <bool kDot, int64_t kTile, class Own>
inline void softmax_rows(int64_t rows, float* s, uint16_t* p, const Own& own, KeyRange zero, float c, RowState* state,
                         float* factor) {
  KeyRange vectors[kPvRows];  // the columns of whole vectors that hold a row's own
  float shift[kPvRows], change[16] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const KeyRange columns = own(r);
    if (columns.lo >= columns.hi) {
      vectors[r] = {zero.hi, zero.hi};  // nothing to see: all zeros
      continue;
    }
    vectors[r] = {columns.lo / VL * VL, round_up(columns.hi, VL)};
    const float old = state[r].max;
    const float now = masked_maximum(s + r * kTile, columns, vectors[r].lo, vectors[r].hi, old);
    state[r].max = now;
    change[r] = old > -kInf ? (old - now) * c : 0.0f;  // without a finite score so far there is nothing to scale
    shift[r] = shift_of(s + r * kTile, vectors[r].lo, vectors[r].hi, now, c);
  }
  for (int64_t r = 0; r < rows; r += VL) vstore(factor + r, vexp2(vload(change + r)));
  vf sum[kPvRows], norm[kPvRows];
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * kTile;
    uint16_t* rounded = kDot ? p + r * kTile : nullptr;
    const auto [first, last] = vectors[r];
    sum[r] = norm[r] = vset(0.0f);
    if (first < last) exponentials<kDot>(row, rounded, first, last, c, shift[r], sum[r], norm[r]);
    for (int64_t j = zero.lo; j < first; ++j) kDot ? (void)(rounded[j] = 0) : (void)(row[j] = 0.0f);
    for (int64_t j = last; j < zero.hi; ++j) kDot ? (void)(rounded[j] = 0) : (void)(row[j] = 0.0f);
  }
  float sums[kPvRows], norms[kPvRows];
  vsums(sum, rows, sums);
  if (kDot) vsums(norm, rows, norms);
  for (int64_t r = 0; r < rows; ++r) {
    state[r].sum = state[r].sum * factor[r] + sums[r];
    state[r].norm = kDot ? state[r].norm * factor[r] + norms[r] : state[r].sum;
  }
}

// Takes the state of another range of keys into a row's; old and now are the factors of what each had accumulated.
struct MergeFactors {
  float old, now;
};
DIFFQKV_INLINE MergeFactors merge(RowState& state, RowState other, float c) {
  const float maximum = other.max > state.max ? other.max : state.max;
  const MergeFactors factor = {state.max > -kInf ? exp2_of((state.max - maximum) * c) : 1.0f,
                               other.max > -kInf ? exp2_of((other.max - maximum) * c) : 1.0f};
  state = {maximum, state.sum * factor.old + other.sum * factor.now, state.norm * factor.old + other.norm * factor.now};
  return factor;
}

DIFFQKV_INLINE void scale_row(float* o, int64_t n, float factor) {
  for (int64_t c = 0; c < n; c += VL) vstore(o + c, vmul(vload(o + c), vset(factor)));
}

// ---- probabilities times V ------------------------------------------------------------------------------------------

// What mac takes as its second operand: columns of fp32, or words of two bf16 rows.
struct Words {
  using T = word;
  static DIFFQKV_INLINE vf load(const T* p) { return vload((const float*)p); }
  static DIFFQKV_INLINE vf load_first(const T* p, int n) { return vload_first((const float*)p, n); }
};

// Where the factor of row i and step t lies: p[i * kRow + t * kStep]. Rows of probabilities, a step being a key (with
// kDot two, that is a word), or the same rows read as columns. kChained: step by step onto what is there, so that it
// does not matter where a sum is interrupted; else added up on its own first, for sums of sums round less.
template <int64_t kRow_, int64_t kStep_, bool kChained_ = false>
struct Walk {
  static constexpr int64_t kRow = kRow_, kStep = kStep_;
  static constexpr bool kChained = kChained_;
};
template <bool kDot, int64_t kTile, bool kChained = false>
using Rows = Walk<kDot ? kTile / 2 : kTile, 1, kChained>;

// o[i][0..columns) += sum over n steps of p[i][t] * v[t].
template <bool kDot, class W, class E, int MR, int NV>
inline void accumulate_block(const word* p, const typename E::T* v, int64_t stride_v, int64_t n, float* o,
                             int64_t stride_o, int columns) {
  vf acc[MR][NV];
  DIFFQKV_UNROLL
  for (int i = 0; i < MR; ++i) {
    DIFFQKV_UNROLL
    for (int x = 0; x < NV; ++x) acc[i][x] = W::kChained ? vload(o + i * stride_o + x * VL) : vset(0.0f);
  }
  for (int64_t t = 0; t < n; ++t, p += W::kStep, v += stride_v) {
    vf b[NV];
    DIFFQKV_UNROLL
    for (int x = 0; x < NV; ++x) b[x] = NV == 1 ? E::load_first(v, columns) : E::load(v + x * VL);
    DIFFQKV_UNROLL
    for (int i = 0; i < MR; ++i) {
      DIFFQKV_UNROLL
      for (int x = 0; x < NV; ++x) acc[i][x] = mac<kDot>(p[i * W::kRow], b[x], acc[i][x]);
    }
  }
  DIFFQKV_UNROLL
  for (int i = 0; i < MR; ++i) {
    DIFFQKV_UNROLL
    for (int x = 0; x < NV; ++x) {
      float* sum = o + i * stride_o + x * VL;
      vstore(sum, W::kChained ? acc[i][x] : vadd(vload(sum), acc[i][x]));
    }
  }
}
template <bool kDot, class W, class E, int MR>
inline void accumulate_columns(const word* p, const typename E::T* v, int64_t stride_v, int64_t n, int64_t d, float* o,
                               int64_t stride_o) {
  int64_t c = 0;
  for (; c + kPvVectors * VL <= d; c += kPvVectors * VL)
    accumulate_block<kDot, W, E, MR, kPvVectors>(p, v + c, stride_v, n, o + c, stride_o, VL);
  if constexpr (kPvVectors > 2)
    for (; c + 2 * VL <= d; c += 2 * VL)
      accumulate_block<kDot, W, E, MR, 2>(p, v + c, stride_v, n, o + c, stride_o, VL);
  for (; c < d; c += VL)
    accumulate_block<kDot, W, E, MR, 1>(p, v + c, stride_v, n, o + c, stride_o, int(min_of(VL, d - c)));
}
template <bool kDot, class W, class E, int MR = kPvRows>
inline void accumulate_rows(int64_t rows, const word* p, const typename E::T* v, int64_t stride_v, int64_t n, int64_t d,
                            float* o, int64_t stride_o) {
  if (rows == MR) return accumulate_columns<kDot, W, E, MR>(p, v, stride_v, n, d, o, stride_o);
  if constexpr (MR > 1) accumulate_rows<kDot, W, E, MR - 1>(rows, p, v, stride_v, n, d, o, stride_o);
}

#if defined(__AVX512BF16__)
// Rows of bf16 V meet the dot product two at a time, interleaved in registers: unpacking works within 128-bit lanes, so
// a block of 32 columns is accumulated as the columns 8x + 0..3 and then 8x + 4..7. unshuffle puts them right.
constexpr int kPairColumns = 32;

template <int64_t kTile, int MR, int NB>
inline void accumulate_row_pairs(const word* p, const uint16_t* even, const uint16_t* odd, int64_t stride_v, int64_t n,
                                 float* o, int64_t stride_o) {
  vf acc[MR][2 * NB];
  DIFFQKV_UNROLL
  for (int i = 0; i < MR; ++i) {
    DIFFQKV_UNROLL
    for (int x = 0; x < 2 * NB; ++x) acc[i][x] = vload(o + i * stride_o + x * VL);
  }
  for (int64_t t = 0; t < n; ++t, ++p, even += stride_v, odd += stride_v) {
    vf b[2 * NB];
    DIFFQKV_UNROLL
    for (int x = 0; x < NB; ++x) {
      const __m512i v0 = _mm512_loadu_si512(even + x * kPairColumns), v1 = _mm512_loadu_si512(odd + x * kPairColumns);
      b[2 * x] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(v0, v1));
      b[2 * x + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(v0, v1));
    }
    DIFFQKV_UNROLL
    for (int i = 0; i < MR; ++i) {
      DIFFQKV_UNROLL
      for (int x = 0; x < 2 * NB; ++x) acc[i][x] = mac<true>(p[i * (kTile / 2)], b[x], acc[i][x]);
    }
  }
  DIFFQKV_UNROLL
  for (int i = 0; i < MR; ++i) {
    DIFFQKV_UNROLL
    for (int x = 0; x < 2 * NB; ++x) vstore(o + i * stride_o + x * VL, acc[i][x]);
  }
}
template <int64_t kTile, int MR = kPvRows>
inline void accumulate_pairs(int64_t rows, const word* p, const uint16_t* even, const uint16_t* odd, int64_t stride_v,
                             int64_t n, int64_t d, float* o, int64_t stride_o) {
  if (rows == MR) {
    int64_t c = 0;
    for (; c + 2 * kPairColumns <= d; c += 2 * kPairColumns)
      accumulate_row_pairs<kTile, MR, 2>(p, even + c, odd + c, stride_v, n, o + c, stride_o);
    for (; c < d; c += kPairColumns)
      accumulate_row_pairs<kTile, MR, 1>(p, even + c, odd + c, stride_v, n, o + c, stride_o);
    return;
  }
  if constexpr (MR > 1) accumulate_pairs<kTile, MR - 1>(rows, p, even, odd, stride_v, n, d, o, stride_o);
}
DIFFQKV_INLINE void unshuffle(float* o, int64_t d) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t c = 0; c < d; c += kPairColumns) {
    const vf low = vload(o + c), high = vload(o + c + VL);
    vstore(o + c, _mm512_permutex2var_ps(low, first, high));
    vstore(o + c + VL, _mm512_permutex2var_ps(low, second, high));
  }
}
#endif

// ---- statistics of V ------------------------------------------------------------------------------------------------

// Adds a V row to the sum, and its norm to the largest.
template <class E>
inline void add_to_stats(const typename E::T* row, int64_t d, float* stats) {
  vf squares = vset(0.0f);
  int64_t c = 0;
  for (; c + VL <= d; c += VL) {
    const vf x = E::load(row + c);
    vstore(stats + c, vadd(vload(stats + c), x));
    squares = vfma(x, x, squares);
  }
  float square = vsum(squares);
  for (; c < d; ++c) {
    const float x = E::get(row[c]);
    stats[c] += x;
    square += x * x;
  }
  const float norm = __builtin_sqrtf(square);
  if (norm > stats[d] || norm != norm) stats[d] = norm;  // a NaN stays
}

// ---- results --------------------------------------------------------------------------------------------------------

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
