// RoPE of one row in float32, rounded once (half-split convention): the same bits of Q and of K.
#pragma once
#include "cpu/kernels/simd.h"

namespace diffqkv {
namespace {

// out = row of d elements, the first d_rot of which are rotated; cos and sin have d_rot elements.
template <class E, class Rope>
void rotate(const typename E::T* row, const typename Rope::T* cos, const typename Rope::T* sin, int64_t d_rot,
            int64_t d, typename E::T* out) {
  const int64_t half = d_rot / 2;
  int64_t c = 0;
  for (; c + VL <= half; c += VL) {
    const vf x = E::load(row + c), y = E::load(row + half + c);
    E::store(out + c, vsub(vmul(x, Rope::load(cos + c)), vmul(y, Rope::load(sin + c))));
    E::store(out + half + c, vfma(y, Rope::load(cos + half + c), vmul(x, Rope::load(sin + half + c))));
  }
  for (; c < half; ++c) {
    const float x = E::get(row[c]), y = E::get(row[half + c]);
    out[c] = E::put(x * Rope::get(cos[c]) - y * Rope::get(sin[c]));
    out[half + c] = E::put(y * Rope::get(cos[half + c]) + x * Rope::get(sin[half + c]));
  }
  __builtin_memcpy(out + d_rot, row + d_rot, (d - d_rot) * sizeof(out[0]));
}

}  // namespace
}  // namespace diffqkv
