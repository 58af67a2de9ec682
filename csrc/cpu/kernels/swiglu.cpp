// swiglu computes silu(gate) * up and its gradients element by element, in fp32.
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/kernels.h"

namespace diffqkv {
namespace {

DIFFQKV_INLINE vf sigmoid(vf x) {
  // 2^128, which vexp2 makes infinite: the sigmoid is 0 from there on, or its product with a huge x were not small.
  const vf y = vmax(vset(-128.0f), vmul(x, vset(kLog2e<float>)));
  return vdiv(vset(1.0f), vadd(vset(1.0f), vexp2(vsub(vset(0.0f), y))));
}

// Runs body(in, out) on [begin, end) of arrays of E, VL elements at a time.
template <class E, int kIn, int kOut, class Body>
DIFFQKV_INLINE void map(const typename E::T* const (&in)[kIn], typename E::T* const (&out)[kOut], int64_t begin,
                        int64_t end, Body body) {
  vf x[kIn], y[kOut];
  int64_t i = begin;
  for (; i + VL <= end; i += VL) {
    for (int a = 0; a < kIn; ++a) x[a] = E::load(in[a] + i);
    body(x, y);
    for (int a = 0; a < kOut; ++a) E::store(out[a] + i, y[a]);
  }
  if (i == end) return;
  for (int a = 0; a < kIn; ++a) x[a] = load_padded<E>(in[a] + i, end - i);
  body(x, y);
  for (int a = 0; a < kOut; ++a) store_first<E>(out[a] + i, end - i, y[a]);
}

template <class E>
void forward(const SwigluParams& p, int64_t begin, int64_t end) {
  using T = typename E::T;
  const int64_t width = p.width > 0 ? p.width : p.numel;
  for (int64_t row = begin / width, next; begin < end; ++row, begin = next) {
    next = min_of(end, (row + 1) * width);
    const T* const in[] = {(const T*)p.gate + row * p.gate_stride, (const T*)p.up + row * p.up_stride};
    T* const out[] = {(T*)p.out + row * width};
    map<E>(in, out, begin - row * width, next - row * width,
           [](const vf* x, vf* y) { y[0] = vmul(vmul(x[0], sigmoid(x[0])), x[1]); });
  }
}

template <class E>
void backward(const SwigluBackwardParams& bp, int64_t begin, int64_t end) {
  using T = typename E::T;
  const T* const in[] = {(const T*)bp.forward.gate, (const T*)bp.forward.up, (const T*)bp.dout};
  T* const out[] = {(T*)bp.dgate, (T*)bp.dup};
  map<E>(in, out, begin, end, [](const vf* x, vf* y) {
    const vf s = sigmoid(x[0]), silu = vmul(x[0], s);
    // d silu / d gate = s + silu * (1 - s)
    y[0] = vmul(vmul(x[2], x[1]), vfma(silu, vsub(vset(1.0f), s), s));
    y[1] = vmul(x[2], silu);
  });
}

}  // namespace

namespace DIFFQKV_ISA {
void swiglu(const SwigluParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::f32) return forward<F32>(p, begin, end);
  if (p.dtype == DType::bf16) return forward<BF16>(p, begin, end);
  forward<F16>(p, begin, end);
}
void swiglu_backward(const SwigluBackwardParams& bp, int64_t begin, int64_t end) {
  if (bp.forward.dtype == DType::f32) return backward<F32>(bp, begin, end);
  if (bp.forward.dtype == DType::bf16) return backward<BF16>(bp, begin, end);
  backward<F16>(bp, begin, end);
}
}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
