// The 32-bit words of which matrix products are made: one fp32 each, or, where the CPU has a bf16 dot product and the
// data is bf16, two bf16. kDot names the second form everywhere.
#pragma once
#include "cpu/kernels/simd.h"

namespace diffqkv {
namespace {

typedef uint32_t word;

// Rows and vectors of the results that a product keeps in registers.
#if defined(__AVX512F__)
constexpr int kQkRows = 12, kPvRows = 6, kPvVectors = 4;  // 24 accumulators of 32 registers
#else
constexpr int kQkRows = 6, kPvRows = 6, kPvVectors = 2;  // 12 of 16
#endif

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

}  // namespace
}  // namespace diffqkv
