// The ends of rows that are no whole vectors: they go through padded copies, so that what an element becomes does not
// depend on where it stands.
#pragma once
#include "cpu/kernels/simd.h"

namespace diffqkv {
namespace {

// The first n < VL lanes from memory, the others 0.
template <class E>
DIFFQKV_INLINE vf load_padded(const typename E::T* p, int64_t n) {
  typename E::T copy[VL] = {};
  for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
  return E::load(copy);
}

// Writes the first n < VL lanes.
template <class E>
DIFFQKV_INLINE void store_first(typename E::T* p, int64_t n, vf v) {
  typename E::T copy[VL];
  E::store(copy, v);
  for (int64_t i = 0; i < n; ++i) p[i] = copy[i];
}

}  // namespace
}  // namespace diffqkv
