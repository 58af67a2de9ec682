#include "ops/checks.h"
#include "ops/device.h"
#include "ops/registration.h"
#include "ops/views.h"

namespace diffqkv {
namespace {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  TensorChecks checks("x", x, kFloatingDtypes);
  DIFFQKV_CHECK(x.dim() >= 1, "x: got shape [], want [..., d]");
  RmsNormParams p;
  p.d = x.size(x.dim() - 1);
  checks.shapes.set("d", p.d);
  checks.vector("weight", weight, {checks.dtype(), ScalarType::Float}, "d");
  DIFFQKV_CHECK(eps >= 0.0, "eps: got ", text_of(eps), ", want a number >= 0");
  const std::optional<int64_t> stride = row_stride(x);
  const Tensor rows = stride ? x : torch::stable::contiguous(x);
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  p.rows = p.d == 0 ? 0 : x.numel() / p.d;
  p.stride = stride.value_or(p.d);
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_of(x);
  p.weight_dtype = dtype_of(weight);
  p.x = rows.data_ptr();
  p.weight = weight.data_ptr();
  p.out = out.data_ptr();
  Device("rms_norm", x).run(p);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(diffqkv, m) { m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor"); }
DIFFQKV_REGISTER_CPU(rms_norm)

}  // namespace
}  // namespace diffqkv
