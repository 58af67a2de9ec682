// The softmax of rows of scores, tile by tile: it overwrites scores with probabilities and keeps a state of the row.
#pragma once
#include "cpu/kernels/words.h"
#include "params/key_range.h"

namespace diffqkv {
namespace {

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

}  // namespace
}  // namespace diffqkv
