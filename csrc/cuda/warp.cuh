// Sums and maxima over the lanes of a warp, which every lane gets.
#pragma once
#include "cuda/device.cuh"

namespace diffqkv::device {

template <class T>
DIFFQKV_DEVICE T warp_sum(T x) {
  DIFFQKV_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <class T>
DIFFQKV_DEVICE T warp_max(T x) {
  DIFFQKV_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    const T y = shuffle_xor(x, mask);
    x = y > x ? y : x;
  }
  return x;
}

// The larger one, and NaN where there is one: a bound that hides a NaN is none.
DIFFQKV_DEVICE float max_norm(float a, float b) { return b > a || b != b ? b : a; }

}  // namespace diffqkv::device
