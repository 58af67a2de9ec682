// Products of 16-bit integers, which are exact: two neighbouring ones in each 32-bit lane, multiplied and added.
#pragma once
#include "cpu/kernels/words.h"

namespace diffqkv {
namespace {

#if defined(__AVX512F__)

typedef __m512i vi;
DIFFQKV_INLINE vi vi_set(word x) { return _mm512_set1_epi32(int(x)); }
DIFFQKV_INLINE vi vi_load(const void* p) { return _mm512_loadu_si512(p); }
DIFFQKV_INLINE void vi_store(void* p, vi v) { _mm512_storeu_si512(p, v); }
DIFFQKV_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
DIFFQKV_INLINE vi vi_subtract_int16(vi a, vi b) { return _mm512_sub_epi16(a, b); }
DIFFQKV_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
template <int kBits>
DIFFQKV_INLINE vi vi_shift_right(vi a) {
  return _mm512_srli_epi32(a, kBits);
}
template <int kBits>
DIFFQKV_INLINE vi vi_shift_right_signed(vi a) {
  return _mm512_srai_epi32(a, kBits);
}
template <int kBits>
DIFFQKV_INLINE vi vi_shift_left(vi a) {
  return _mm512_slli_epi32(a, kBits);
}
DIFFQKV_INLINE vi vi_load_int8(const int8_t* p) {  // 2 * VL bytes as 16-bit integers
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
}
DIFFQKV_INLINE vi vi_dot(vi a, vi b, vi sum) {
#if defined(__AVX512VNNI__)
  // GCC 12 copies the sums of the intrinsic back and forth.
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
DIFFQKV_INLINE vf vi_to_float(vi a) { return _mm512_cvtepi32_ps(a); }
// VL numbers as 16-bit integers, rounded to the nearest.
DIFFQKV_INLINE void vstore_int16(int16_t* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
}

#elif defined(__AVX2__)

typedef __m256i vi;
DIFFQKV_INLINE vi vi_set(word x) { return _mm256_set1_epi32(int(x)); }
DIFFQKV_INLINE vi vi_load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
DIFFQKV_INLINE void vi_store(void* p, vi v) { _mm256_storeu_si256((__m256i*)p, v); }
DIFFQKV_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
DIFFQKV_INLINE vi vi_subtract_int16(vi a, vi b) { return _mm256_sub_epi16(a, b); }
DIFFQKV_INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
template <int kBits>
DIFFQKV_INLINE vi vi_shift_right(vi a) {
  return _mm256_srli_epi32(a, kBits);
}
template <int kBits>
DIFFQKV_INLINE vi vi_shift_right_signed(vi a) {
  return _mm256_srai_epi32(a, kBits);
}
template <int kBits>
DIFFQKV_INLINE vi vi_shift_left(vi a) {
  return _mm256_slli_epi32(a, kBits);
}
DIFFQKV_INLINE vi vi_load_int8(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
DIFFQKV_INLINE vi vi_dot(vi a, vi b, vi sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
DIFFQKV_INLINE vf vi_to_float(vi a) { return _mm256_cvtepi32_ps(a); }
DIFFQKV_INLINE void vstore_int16(int16_t* p, vf v) {
  const __m256i n = _mm256_cvtps_epi32(v);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1)));
}

#else

typedef __m128i vi;
DIFFQKV_INLINE vi vi_set(word x) { return _mm_set1_epi32(int(x)); }
DIFFQKV_INLINE vi vi_load(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
DIFFQKV_INLINE void vi_store(void* p, vi v) { _mm_storeu_si128((__m128i*)p, v); }
DIFFQKV_INLINE vi vi_add(vi a, vi b) { return _mm_add_epi32(a, b); }
DIFFQKV_INLINE vi vi_subtract_int16(vi a, vi b) { return _mm_sub_epi16(a, b); }
DIFFQKV_INLINE vi vi_and(vi a, vi b) { return _mm_and_si128(a, b); }
template <int kBits>
DIFFQKV_INLINE vi vi_shift_right(vi a) {
  return _mm_srli_epi32(a, kBits);
}
template <int kBits>
DIFFQKV_INLINE vi vi_shift_right_signed(vi a) {
  return _mm_srai_epi32(a, kBits);
}
template <int kBits>
DIFFQKV_INLINE vi vi_shift_left(vi a) {
  return _mm_slli_epi32(a, kBits);
}
DIFFQKV_INLINE vi vi_load_int8(const int8_t* p) { return _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)); }
DIFFQKV_INLINE vi vi_dot(vi a, vi b, vi sum) { return _mm_add_epi32(sum, _mm_madd_epi16(a, b)); }
DIFFQKV_INLINE vf vi_to_float(vi a) { return _mm_cvtepi32_ps(a); }
DIFFQKV_INLINE void vstore_int16(int16_t* p, vf v) {
  const __m128i n = _mm_cvtps_epi32(v);
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi32(n, n));
}

#endif

}  // namespace
}  // namespace diffqkv
