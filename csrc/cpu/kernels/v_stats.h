// Statistics of V rows: their sum and their largest norm.
#pragma once
#include "cpu/kernels/simd.h"

namespace diffqkv {
namespace {

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

}  // namespace
}  // namespace diffqkv
