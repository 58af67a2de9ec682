// The head map of DiffQKV attention (SIGMA, arXiv 2501.13629, eq. 16 and 17). Every division of head counts in this
// library happens here.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define DIFFQKV_HOST_DEVICE __host__ __device__
#else
#define DIFFQKV_HOST_DEVICE
#endif

namespace diffqkv {

// Query head i reads K head i * n_k / n_q and V head i * n_v / n_q. The KV group, G = gcd(n_k, n_v) of them, is the
// smallest set of heads closed under that map: group g owns the contiguous q, K and V heads
// [g * q_per_group(), ...), [g * k_per_group(), ...) and [g * v_per_group(), ...).
struct HeadGroups {
  int64_t n_q = 1, n_k = 1, n_v = 1;

  DIFFQKV_HOST_DEVICE static constexpr int64_t gcd(int64_t a, int64_t b) {
    while (b != 0) {
      const int64_t r = a % b;
      a = b;
      b = r;
    }
    return a;
  }
  // Whether the three counts describe a head map at all.
  DIFFQKV_HOST_DEVICE constexpr bool valid() const {
    return n_q > 0 && n_k > 0 && n_v > 0 && n_q % n_k == 0 && n_q % n_v == 0;
  }
  DIFFQKV_HOST_DEVICE constexpr int64_t groups() const { return gcd(n_k, n_v); }
  DIFFQKV_HOST_DEVICE constexpr int64_t q_per_group() const { return n_q / groups(); }
  DIFFQKV_HOST_DEVICE constexpr int64_t k_per_group() const { return n_k / groups(); }
  DIFFQKV_HOST_DEVICE constexpr int64_t v_per_group() const { return n_v / groups(); }
  DIFFQKV_HOST_DEVICE constexpr int64_t q_per_k() const { return n_q / n_k; }
  DIFFQKV_HOST_DEVICE constexpr int64_t q_per_v() const { return n_q / n_v; }
  DIFFQKV_HOST_DEVICE constexpr int64_t k_head(int64_t q_head) const { return q_head / q_per_k(); }
  DIFFQKV_HOST_DEVICE constexpr int64_t v_head(int64_t q_head) const { return q_head / q_per_v(); }
};

}  // namespace diffqkv
