#include "ops/checks.h"
#include "ops/device.h"
#include "ops/registration.h"
#include "ops/rope_arguments.h"
#include "ops/views.h"

namespace diffqkv {
namespace {

Tensor rotary_embedding(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  TensorChecks checks("x", x, kFloatingDtypes);
  checks.rows("x", x, kFloatingDtypes, "b t heads d");
  RotaryEmbeddingParams p;
  p.batch = x.size(0), p.tokens = x.size(1), p.heads = x.size(2), p.d = x.size(3);
  check_rope(checks, cos, sin, p.batch, p.tokens, p.d);
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  p.x = {x.data_ptr(), x.stride(0), x.stride(2), x.stride(1), dtype_of(x)};
  p.out = out.data_ptr();
  p.d_rot = cos.size(2);
  p.cos = cos.data_ptr();
  p.sin = sin.data_ptr();
  p.rope_stride_batch = rope_stride_batch(cos);
  p.rope_stride_token = cos.stride(1);
  p.rope_dtype = dtype_of(cos);
  Device("rotary_embedding", x).run(p);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(diffqkv, m) { m.def("rotary_embedding(Tensor x, Tensor cos, Tensor sin) -> Tensor"); }
DIFFQKV_REGISTER_CPU(rotary_embedding)

}  // namespace
}  // namespace diffqkv
