// The two ends of a softmax: scores become exponents of 2, and a row that has seen all its keys becomes a result.
#pragma once
#include <algorithm>
#include <cmath>

#include "cuda/device.cuh"

namespace diffqkv::device {

// The softmax runs on |softmax_scale|, a negative one is folded into q, so that the maximum is the right end.
template <class T>
struct SoftmaxFactors {
  T scale;     // leads from a dot product, or the tanh of its share of the softcap, to a score
  T exponent;  // and on to an exponent of 2
  T inner;     // leads from a dot product to its share of the softcap
  T keep_scale;
  bool capped, negative;

  // Nothing is multiplied by 0: the -inf of a masked score must stay.
  explicit SoftmaxFactors(const AttentionParams& p)
      : scale(T(p.softcap > 0 ? p.softcap : std::abs(p.softmax_scale))),
        exponent(std::max(T((p.softcap > 0 ? p.softcap : std::abs(p.softmax_scale)) * kLog2e<T>), T(1e-37))),
        inner(p.softcap > 0 ? T(std::abs(p.softmax_scale) / p.softcap) : T(0)),
        keep_scale(T(p.dropout.keep_scale())),
        capped(p.softcap > 0),
        negative(p.softmax_scale < 0) {}

  // The base of a row's exponents of 2, x * exponent - base, for its largest x, `most`. Returns whether that is too
  // large for it: then x * exponent has to be the exponent, of x that are differences from `most`.
  DIFFQKV_DEVICE bool base_of(T most, T& base) const {
    base = most * exponent;
    if (base >= T(-kLargeExponent) && base <= T(kLargeExponent)) return false;
    base = T(0);
    return most != T(-INFINITY);  // a row that has seen no key has nothing to subtract
  }

  // Ends a row whose powers of two, all divided by that of the largest x, `most`, sum up to `sum`; most is -inf where
  // there are none. Returns what the products with V are multiplied by. lse is made of `most` as the gradients make it
  // of x.
  DIFFQKV_DEVICE T finish(const AttentionParams& p, int64_t head, T most, T sum, T& lse) const {
    const T score = most == T(-INFINITY) ? most : mul(most, scale);
    const T sink = p.sinks != nullptr ? static_cast<const T*>(p.sinks)[head] : T(-INFINITY);
    const T top = sink > score ? sink : score, base = top == T(-INFINITY) ? T(0) : top;
    const T weight = exp2((score - base) * kLog2e<T>), total = sum * weight + exp2((sink - base) * kLog2e<T>);
    lse = total == T(0) ? T(-INFINITY) : base + log2(total) * kLn2<T>;
    return total == T(0) ? T(0) : keep_scale * weight / total;
  }
};

}  // namespace diffqkv::device
