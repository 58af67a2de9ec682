// The k best of a stream of scores: the higher first, among equals the earlier. Nothing is sorted: the k-th best score
// is found by counting, and what is kept stays in the order of its indices.
#pragma once
#include "cpu/kernels/simd.h"

namespace diffqkv {
namespace {

// Integers in the order of the floats. -0 comes before +0, which no comparison of floats tells apart.
DIFFQKV_INLINE uint32_t ordered_of(float x) {
  const uint32_t u = bits_of_float(x);
  return u ^ (uint32_t(int32_t(u) >> 31) | 0x80000000u);
}
DIFFQKV_INLINE float float_of_ordered(uint32_t u) { return float_of_bits(u & 0x80000000u ? u ^ 0x80000000u : ~u); }

// A bit for each of the VL lanes from column j on that lies in [lo, hi).
DIFFQKV_INLINE uint32_t lanes_within(int64_t j, int64_t lo, int64_t hi) {
  uint32_t lanes = (1u << VL) - 1;
  if (j < lo) lanes &= ~0u << (lo - j);
  if (j + VL > hi) lanes &= (1u << (hi - j)) - 1;
  return lanes;
}

// Candidates of one row by ascending index. Both arrays have room for VL more.
struct Candidates {
  float* score;
  uint32_t* index;
  int64_t count;
  float least;  // a later score below this one is not among the best

  // Appends lanes of x, whose first has the index `first`.
  DIFFQKV_INLINE void append(vf x, uint32_t first, uint32_t lanes) {
#if defined(__AVX512F__)
    const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    store(x, _mm512_add_epi32(_mm512_set1_epi32(int(first)), iota), lanes);
#else
    float s[VL];
    vstore(s, x);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      score[count] = s[lane];
      index[count++] = first + uint32_t(lane);
    }
#endif
  }
  // Appends the candidates at places i and up, i >= count, whose lanes are set.
  DIFFQKV_INLINE void move(int64_t i, uint32_t lanes) {
#if defined(__AVX512F__)
    store(vload(score + i), _mm512_loadu_si512(index + i), lanes);
#else
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t from = i + __builtin_ctz(lanes);
      score[count] = score[from];
      index[count++] = index[from];
    }
#endif
  }

#if defined(__AVX512F__)
  // Compressed in registers: compressing stores are slow on some CPUs.
  DIFFQKV_INLINE void store(vf x, __m512i indices, uint32_t lanes) {
    vstore(score + count, _mm512_maskz_compress_ps(vmask(lanes), x));
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(vmask(lanes), indices));
    count += __builtin_popcount(lanes);
  }
#endif
};

// Appends the columns [lo, hi) of s that may be among the best; column j has the index first_index + j. s is readable
// to a multiple of VL. Returns whether one of them is NaN.
inline bool append_candidates(Candidates& best, const float* s, int64_t lo, int64_t hi, uint32_t first_index) {
  uint32_t unordered = 0;
  const vf least = vset(best.least);
  for (int64_t j = lo / VL * VL; j < hi; j += VL) {
    const vf x = vload(s + j);
    const uint32_t lanes = lanes_within(j, lo, hi), passed = vge_bits(x, least) & lanes;
    unordered |= vnan_bits(x) & lanes;
    if (passed != 0) best.append(x, first_index + uint32_t(j), passed);
  }
  return unordered != 0;
}

// The k best of n scores are those above `score` and the first `ties` that equal it.
struct Cut {
  float score;
  int64_t ties;
};

DIFFQKV_INLINE int64_t count_at_least(const float* s, int64_t n, float threshold) {  // n: a multiple of VL
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += VL) count += __builtin_popcount(vge_bits(vload(s + i), vset(threshold)));
  return count;
}

// The cut that keeps the k best of n scores, 1 <= k <= n. None of them is below the float before `least`, and none is
// NaN. What follows them up to a multiple of VL is overwritten.
inline Cut cut_at(float* s, int64_t n, float least, int64_t k) {
  const int64_t padded = round_up(n, VL);
  for (int64_t i = n; i < padded; ++i) s[i] = -kInf;
  vf most = vset(-kInf);
  for (int64_t i = 0; i < padded; i += VL) most = vmax(vload(s + i), most);
  // At least k scores reach lo, fewer than k reach hi.
  uint32_t lo = least > -kInf ? ordered_of(least) - 1 : ordered_of(-kInf), hi = ordered_of(vmaximum(most)) + 1;
  for (int step = 0; hi - lo > 1; ++step) {
    // Halving values is quicker than halving exponents where scores have one scale, but need not end.
    uint32_t mid = ordered_of(0.5f * (float_of_ordered(lo) + float_of_ordered(hi)));
    if (step >= 24 || mid <= lo || mid >= hi) mid = lo + (hi - lo) / 2;
    const int64_t count = count_at_least(s, padded, float_of_ordered(mid));
    if (count == k) return {float_of_ordered(mid), n};
    (count > k ? lo : hi) = mid;
  }
  return {float_of_ordered(lo), k - count_at_least(s, padded, float_of_ordered(hi))};
}

// Drops all but the k best.
inline void keep_best(Candidates& best, int64_t k) {
  const int64_t n = best.count;
  if (n <= k) return;
  auto [score, ties] = cut_at(best.score, n, best.least, k);
  const bool all_ties = ties == n;
  best.least = all_ties ? score : float_of_ordered(ordered_of(score) + 1);  // of equals only earlier ones count
  best.count = 0;
  for (int64_t i = 0; i < n; i += VL) {
    const vf x = vload(best.score + i);
    uint32_t kept = vge_bits(x, vset(score)) & lanes_within(i, 0, n);
    if (!all_ties) {
      uint32_t equal = kept & vge_bits(vset(score), x);
      kept &= ~equal;
      for (; equal != 0 && ties > 0; equal &= equal - 1, --ties) kept |= equal & (0u - equal);
    }
    best.move(i, kept);
  }
}

}  // namespace
}  // namespace diffqkv
