// The two ends of a softmax: scores become exponents of 2, and a row that has seen all its keys becomes a result.
#pragma once
#include <algorithm>
#include <cmath>

#include "cuda/device.cuh"

namespace diffqkv::device {

// The softmax runs on |softmax_scale|, a negative one is folded into q, so that the maximum is the right end.
template <class T>
struct SoftmaxFactors {
  static constexpr T kLog2e = T(1.4426950408889634074), kLn2 = T(0.6931471805599453094);

  T exponent;  // of a dot product, or of the tanh of its share of the softcap, to an exponent of 2
  T inner;     // of a dot product to its share of the softcap
  T keep_scale;
  bool capped, negative;

  // Nothing is multiplied by 0: the -inf of a masked score must stay.
  explicit SoftmaxFactors(const AttentionParams& p)
      : exponent(std::max(T((p.softcap > 0 ? p.softcap : std::abs(p.softmax_scale)) * kLog2e), T(1e-37))),
        inner(p.softcap > 0 ? T(std::abs(p.softmax_scale) / p.softcap) : T(0)),
        keep_scale(T(p.dropout.keep_scale())),
        capped(p.softcap > 0),
        negative(p.softmax_scale < 0) {}

  // Of a row whose powers of two, all divided by 2^most, sum up to `sum`; most is -inf where there are none. Returns
  // what the products with V are multiplied by.
  DIFFQKV_DEVICE T finish(const AttentionParams& p, int64_t head, T most, T sum, T& lse) const {
    T sink = T(-INFINITY);
    if (p.sinks != nullptr) sink = static_cast<const T*>(p.sinks)[head] * kLog2e;
    const T top = sink > most ? sink : most, base = top == T(-INFINITY) ? T(0) : top;
    const T total = sum * exp2(most - base) + exp2(sink - base);
    lse = total == T(0) ? T(-INFINITY) : (base + log2(total)) * kLn2;
    return total == T(0) ? T(0) : keep_scale * exp2(most - base) / total;
  }
};

}  // namespace diffqkv::device
