// Rows of probabilities times V, or of any such factors times rows.
#pragma once
#include "cpu/kernels/words.h"

namespace diffqkv {
namespace {

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

}  // namespace
}  // namespace diffqkv
