// The few vector operations that the CPU kernels need, at the width of the instruction set this unit is compiled for.
// Everything is in an anonymous namespace and no library header is used: an inline function with external linkage,
// compiled for AVX-512, could be the copy that the linker keeps for an older CPU.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "params/arithmetic.h"
#include "params/params.h"

// GCC leaves loops of more than 16 iterations rolled, and then keeps an accumulator array in memory.
#define DIFFQKV_UNROLL _Pragma("GCC unroll 64")

namespace diffqkv {
namespace {

DIFFQKV_INLINE float float_of_bits(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
DIFFQKV_INLINE uint32_t bits_of_float(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
constexpr float kInf = __builtin_inff();

DIFFQKV_INLINE float float_of_bf16(uint16_t h) { return float_of_bits(uint32_t(h) << 16); }
DIFFQKV_INLINE uint16_t bf16_of_float(float f) {  // round to nearest even
  const uint32_t u = bits_of_float(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
#if defined(__F16C__)
DIFFQKV_INLINE float float_of_f16(uint16_t h) { return _cvtsh_ss(h); }
DIFFQKV_INLINE uint16_t f16_of_float(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
DIFFQKV_INLINE float float_of_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000u : 0));
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals.
  const float magnitude = float_of_bits(rest << 13) * float_of_bits(uint32_t(127 + 112) << 23);
  return float_of_bits(bits_of_float(magnitude) | sign);
}
DIFFQKV_INLINE uint16_t f16_of_float(float f) {
  const uint32_t u = bits_of_float(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00 | ((a >> 13) & 0x3ff));
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // from 65520 on: rounds to infinity
  if (a < 0x38800000u) {                                 // below 2^-14: let the FPU round to a multiple of 2^-24
    const float magic = float_of_bits(0x3f000000u);      // 0.5, whose last bit is 2^-24
    return uint16_t(sign | (bits_of_float(float_of_bits(a) + magic) - 0x3f000000u));
  }
  return uint16_t(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13));
}
#endif

DIFFQKV_INLINE float vsum4(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
DIFFQKV_INLINE float vmaximum4(__m128 v) {
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}

#if defined(__AVX512F__)

typedef __m512 vf;
typedef __mmask16 vmask;
constexpr int VL = 16;
DIFFQKV_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
DIFFQKV_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
DIFFQKV_INLINE void vstore(float* p, vf v) { _mm512_storeu_ps(p, v); }
DIFFQKV_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
DIFFQKV_INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
DIFFQKV_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
DIFFQKV_INLINE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
DIFFQKV_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
DIFFQKV_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
DIFFQKV_INLINE vf vload_bf16(const uint16_t* p) {
  const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
DIFFQKV_INLINE vf vload_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
DIFFQKV_INLINE void vstore_f16(uint16_t* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#if defined(__AVX512BF16__)
DIFFQKV_INLINE void vstore_bf16(uint16_t* p, vf v) {  // flushes subnormals
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
}
#else
DIFFQKV_INLINE void vstore_bf16(uint16_t* p, vf v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
#endif
// Lanes >= n read as 0.
DIFFQKV_INLINE vf vload_first(const float* p, int n) { return _mm512_maskz_loadu_ps((vmask)((1u << n) - 1), p); }
DIFFQKV_INLINE vf vload_first_u16(const uint16_t* p, int n, bool half) {
  const __m256i h = _mm256_maskz_loadu_epi16((vmask)((1u << n) - 1), p);
  return half ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
DIFFQKV_INLINE vf vselect_less(vf a, vf b, vf yes, vf no) {  // a < b ? yes : no
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
DIFFQKV_INLINE vf vcopysign(vf size, vf sign) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(int(0x80000000u)), _mm512_castps_si512(sign),
                                                       _mm512_castps_si512(size), 0xca));
}
DIFFQKV_INLINE uint32_t vge_bits(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
DIFFQKV_INLINE uint32_t vgt_bits(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
DIFFQKV_INLINE uint32_t vnan_bits(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
DIFFQKV_INLINE vf vexp2_scaled(vf p, vf n) { return _mm512_scalef_ps(p, n); }
DIFFQKV_INLINE float vsum(vf v) { return _mm512_reduce_add_ps(v); }
DIFFQKV_INLINE float vmaximum(vf v) { return _mm512_reduce_max_ps(v); }
DIFFQKV_INLINE vf vround(vf y) { return _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
DIFFQKV_INLINE void vsplit(vf y, vf& whole, vf& rest) {
  whole = vround(y);
  rest = _mm512_reduce_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__AVX2__)

typedef __m256 vf;
constexpr int VL = 8;
DIFFQKV_INLINE vf vset(float x) { return _mm256_set1_ps(x); }
DIFFQKV_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
DIFFQKV_INLINE void vstore(float* p, vf v) { _mm256_storeu_ps(p, v); }
DIFFQKV_INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
DIFFQKV_INLINE vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
DIFFQKV_INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
DIFFQKV_INLINE vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
DIFFQKV_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
DIFFQKV_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
DIFFQKV_INLINE vf vload_bf16(const uint16_t* p) {
  const __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
DIFFQKV_INLINE vf vload_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
DIFFQKV_INLINE void vstore_f16(uint16_t* p, vf v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
DIFFQKV_INLINE void vstore_bf16(uint16_t* p, vf v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
DIFFQKV_INLINE vf vselect_less(vf a, vf b, vf yes, vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
DIFFQKV_INLINE vf vcopysign(vf size, vf sign) {
  const vf top = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_and_ps(top, sign), _mm256_andnot_ps(top, size));
}
DIFFQKV_INLINE uint32_t vge_bits(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
DIFFQKV_INLINE uint32_t vgt_bits(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
DIFFQKV_INLINE uint32_t vnan_bits(vf a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
// p * 2^n for p in [0.7, 1.5]; 0 where the result would be subnormal.
DIFFQKV_INLINE vf vexp2_scaled(vf p, vf n) {
  const vf scaled =
      _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
  return _mm256_andnot_ps(_mm256_cmp_ps(n, _mm256_set1_ps(-125.0f), _CMP_LT_OQ), scaled);
}
DIFFQKV_INLINE float vsum(vf v) { return vsum4(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))); }
DIFFQKV_INLINE float vmaximum(vf v) {
  return vmaximum4(_mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
DIFFQKV_INLINE vf vround(vf y) { return _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#else  // SSE4.2, the x86-64-v2 baseline: no FMA, no half conversion

typedef __m128 vf;
constexpr int VL = 4;
DIFFQKV_INLINE vf vset(float x) { return _mm_set1_ps(x); }
DIFFQKV_INLINE vf vload(const float* p) { return _mm_loadu_ps(p); }
DIFFQKV_INLINE void vstore(float* p, vf v) { _mm_storeu_ps(p, v); }
DIFFQKV_INLINE vf vadd(vf a, vf b) { return _mm_add_ps(a, b); }
DIFFQKV_INLINE vf vsub(vf a, vf b) { return _mm_sub_ps(a, b); }
DIFFQKV_INLINE vf vmul(vf a, vf b) { return _mm_mul_ps(a, b); }
DIFFQKV_INLINE vf vdiv(vf a, vf b) { return _mm_div_ps(a, b); }
DIFFQKV_INLINE vf vmax(vf a, vf b) { return _mm_max_ps(a, b); }
DIFFQKV_INLINE vf vfma(vf a, vf b, vf c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
DIFFQKV_INLINE vf vload_bf16(const uint16_t* p) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p)), 16));
}
DIFFQKV_INLINE vf vload_f16(const uint16_t* p) {
  return _mm_setr_ps(float_of_f16(p[0]), float_of_f16(p[1]), float_of_f16(p[2]), float_of_f16(p[3]));
}
DIFFQKV_INLINE void vstore_f16(uint16_t* p, vf v) {
  float f[4];
  vstore(f, v);
  for (int i = 0; i < 4; ++i) p[i] = f16_of_float(f[i]);
}
DIFFQKV_INLINE void vstore_bf16(uint16_t* p, vf v) {
  float f[4];
  vstore(f, v);
  for (int i = 0; i < 4; ++i) p[i] = bf16_of_float(f[i]);
}
DIFFQKV_INLINE vf vselect_less(vf a, vf b, vf yes, vf no) { return _mm_blendv_ps(no, yes, _mm_cmplt_ps(a, b)); }
DIFFQKV_INLINE vf vcopysign(vf size, vf sign) {
  const vf top = _mm_set1_ps(-0.0f);
  return _mm_or_ps(_mm_and_ps(top, sign), _mm_andnot_ps(top, size));
}
DIFFQKV_INLINE uint32_t vge_bits(vf a, vf b) { return _mm_movemask_ps(_mm_cmpge_ps(a, b)); }
DIFFQKV_INLINE uint32_t vgt_bits(vf a, vf b) { return _mm_movemask_ps(_mm_cmpgt_ps(a, b)); }
DIFFQKV_INLINE uint32_t vnan_bits(vf a) { return _mm_movemask_ps(_mm_cmpunord_ps(a, a)); }
DIFFQKV_INLINE vf vexp2_scaled(vf p, vf n) {
  const vf scaled = _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(p), _mm_slli_epi32(_mm_cvtps_epi32(n), 23)));
  return _mm_andnot_ps(_mm_cmplt_ps(n, _mm_set1_ps(-125.0f)), scaled);
}
DIFFQKV_INLINE float vsum(vf v) { return vsum4(v); }
DIFFQKV_INLINE float vmaximum(vf v) { return vmaximum4(v); }
DIFFQKV_INLINE vf vround(vf y) { return _mm_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#endif

#if !defined(__AVX512F__)
DIFFQKV_INLINE void vsplit(vf y, vf& whole, vf& rest) {
  y = vmax(vset(-1e4f), y);
  whole = vround(y);
  rest = vsub(y, whole);
}
// Head dimensions are multiples of 8, so these narrower registers never meet a partial vector.
DIFFQKV_INLINE vf vload_first(const float* p, int) { return vload(p); }
DIFFQKV_INLINE vf vload_first_u16(const uint16_t* p, int, bool half) { return half ? vload_f16(p) : vload_bf16(p); }
#endif

// 2^y for y <= 128, which is infinite, exactly 1 at 0, 0 below 2^-125 or so, NaN for NaN. Minimax polynomial in y -
// round(y) with constant term 1: of degree 5, relative error 1.9e-7, or of degree 4, 2.9e-6, for what is rounded to
// bf16 afterwards.
template <bool kForBf16 = false>
DIFFQKV_INLINE vf vexp2(vf y) {
  vf n, r;
  vsplit(y, n, r);  // for -inf: r is a number, n makes the result 0
  vf p;
  if (kForBf16) {
    p = vset(0.009582852944731712f);
    p = vfma(p, r, vset(0.055906426161527634f));
    p = vfma(p, r, vset(0.24024099111557007f));
    p = vfma(p, r, vset(0.6931241750717163f));
  } else {
    p = vset(0.001326472731307149f);
    p = vfma(p, r, vset(0.009671512991189957f));
    p = vfma(p, r, vset(0.05550733581185341f));
    p = vfma(p, r, vset(0.24022242426872253f));
    p = vfma(p, r, vset(0.6931470036506653f));
  }
  p = vfma(p, r, vset(1.0f));
  return vexp2_scaled(p, n);
}
DIFFQKV_INLINE float exp2_of(float y) {
  float f[VL];
  vstore(f, vexp2(vset(y)));
  return f[0];
}

// tanh with a relative error of about 2e-7: an odd polynomial near 0, where 1 - 2^y would cancel.
DIFFQKV_INLINE vf vtanh(vf x) {
  const vf size = vcopysign(x, vset(0.0f)), square = vmul(x, x);
  vf p = vset(-0.006282379120149317f);
  p = vfma(p, square, vset(0.02107768669453612f));
  p = vfma(p, square, vset(-0.053853838913771435f));
  p = vfma(p, square, vset(0.13332601482206535f));
  p = vfma(p, square, vset(-0.33333318038641363f));
  const vf small = vfma(vmul(p, square), x, x);
  const vf e = vexp2(vmul(size, vset(-2.0f * kLog2e<float>)));  // e^(-2 |x|)
  const vf large = vcopysign(vdiv(vsub(vset(1.0f), e), vadd(vset(1.0f), e)), x);
  return vselect_less(size, vset(0.55f), small, large);
}

// x, rounded here: compilers make one rounding of a product and a sum.
DIFFQKV_INLINE vf vrounded(vf x) {
  asm("" : "+x"(x));
  return x;
}

// sums[i] = the lanes of v[i] added up.
DIFFQKV_INLINE void vsums(const vf* v, int64_t n, float* sums) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 3 <= n; i += 4) {  // four vectors share the steps of a reduction
    const vf a = v[i], b = v[i + 1], c = v[i + 2], d = i + 3 < n ? v[i + 3] : vset(0.0f);
    const vf ab = vadd(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const vf cd = vadd(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const vf all = vadd(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    if (i + 3 < n)
      _mm_storeu_ps(sums + i, sum);
    else
      _mm_mask_storeu_ps(sums + i, 7, sum);
  }
#endif
  for (; i < n; ++i) sums[i] = vsum(v[i]);
}

// Element types as they lie in memory.
struct F32 {
  using T = float;
  static constexpr DType dtype = DType::f32;
  static DIFFQKV_INLINE vf load(const T* p) { return vload(p); }
  static DIFFQKV_INLINE vf load_first(const T* p, int n) { return vload_first(p, n); }
  static DIFFQKV_INLINE void store(T* p, vf v) { vstore(p, v); }
  static DIFFQKV_INLINE float get(T x) { return x; }
  static DIFFQKV_INLINE T put(float x) { return x; }
};
struct BF16 {
  using T = uint16_t;
  static constexpr DType dtype = DType::bf16;
  static DIFFQKV_INLINE vf load(const T* p) { return vload_bf16(p); }
  static DIFFQKV_INLINE vf load_first(const T* p, int n) { return vload_first_u16(p, n, false); }
  static DIFFQKV_INLINE void store(T* p, vf v) { vstore_bf16(p, v); }
  static DIFFQKV_INLINE float get(T x) { return float_of_bf16(x); }
  static DIFFQKV_INLINE T put(float x) { return bf16_of_float(x); }
};
struct F16 {
  using T = uint16_t;
  static constexpr DType dtype = DType::f16;
  static DIFFQKV_INLINE vf load(const T* p) { return vload_f16(p); }
  static DIFFQKV_INLINE vf load_first(const T* p, int n) { return vload_first_u16(p, n, true); }
  static DIFFQKV_INLINE void store(T* p, vf v) { vstore_f16(p, v); }
  static DIFFQKV_INLINE float get(T x) { return float_of_f16(x); }
  static DIFFQKV_INLINE T put(float x) { return f16_of_float(x); }
};

}  // namespace
}  // namespace diffqkv
