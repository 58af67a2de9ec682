// rms_norm: rows over the root of their mean square, in float32, rounded, times the weight.
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/kernels.h"

namespace diffqkv {
namespace {

// Elements whose squares are added up in a row; longer rows are halved, so that the error grows with log(d) alone.
constexpr int64_t kSquares = 512;

// The sum of the squares of n elements, spread over lanes. The order depends on n alone.
template <class E>
vf squares(const typename E::T* x, int64_t n) {
  if (n > kSquares) {
    const int64_t half = round_up(n / 2, kSquares);
    return vadd(squares<E>(x, half), squares<E>(x + half, n - half));
  }
  constexpr int kSums = 4;  // as many additions are under way at once
  vf sums[kSums];
  for (vf& sum : sums) sum = vset(0.0f);
  int64_t i = 0;
  for (; i + kSums * VL <= n; i += kSums * VL) {
    DIFFQKV_UNROLL
    for (int j = 0; j < kSums; ++j) {
      const vf v = E::load(x + i + j * VL);
      sums[j] = vfma(v, v, sums[j]);
    }
  }
  for (; i < n; i += VL) {
    const vf v = i + VL <= n ? E::load(x + i) : load_padded<E>(x + i, n - i);
    sums[0] = vfma(v, v, sums[0]);
  }
  return vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3]));
}

// x as it is when it has lain in memory as an element.
template <class E>
DIFFQKV_INLINE vf rounded_to(vf x) {
  if constexpr (E::dtype == DType::f32) return x;
  typename E::T copy[VL];
  E::store(copy, x);
  return E::load(copy);
}

template <class E, class Weight>
void normalise(const RmsNormParams& p, int64_t begin, int64_t end) {
  const int64_t d = p.d, whole = d / VL * VL;
  const typename Weight::T* weight = (const typename Weight::T*)p.weight;
  for (int64_t row = begin; row < end; ++row) {
    const typename E::T* x = (const typename E::T*)p.x + row * p.stride;
    typename E::T* out = (typename E::T*)p.out + row * d;
    const float mean = vsum(squares<E>(x, d)) / float(d);
    const vf scale = vset(1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(mean + p.eps))));
    for (int64_t i = 0; i < whole; i += VL)
      E::store(out + i, vmul(Weight::load(weight + i), rounded_to<E>(vmul(E::load(x + i), scale))));
    if (whole == d) continue;
    const vf x_rest = load_padded<E>(x + whole, d - whole), w_rest = load_padded<Weight>(weight + whole, d - whole);
    store_first<E>(out + whole, d - whole, vmul(w_rest, rounded_to<E>(vmul(x_rest, scale))));
  }
}

}  // namespace

namespace DIFFQKV_ISA {
void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  const bool wide = p.weight_dtype == DType::f32;
  if (p.dtype == DType::f32) return normalise<F32, F32>(p, begin, end);
  if (p.dtype == DType::bf16) return wide ? normalise<BF16, F32>(p, begin, end) : normalise<BF16, BF16>(p, begin, end);
  wide ? normalise<F16, F32>(p, begin, end) : normalise<F16, F16>(p, begin, end);
}
}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
