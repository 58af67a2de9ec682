#include <vector>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/registration.h"
#include "ops/views.h"

namespace diffqkv {
namespace {

struct PackedLinearArguments : ArgumentGroup {
  const Tensor x = next<Tensor>(), weight = next<Tensor>();
  const std::optional<Tensor> scales = next<std::optional<Tensor>>(), zeros = next<std::optional<Tensor>>(),
                              bias = next<std::optional<Tensor>>();
  const int64_t out_features = next<int64_t>();
};

WeightForm form_of(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float: return WeightForm::f32;
    case ScalarType::Half: return WeightForm::f16;
    case ScalarType::BFloat16: return WeightForm::bf16;
    case ScalarType::Char: return WeightForm::int8;
    default: return WeightForm::int4;
  }
}

const char* shape_of(WeightForm form) {
  switch (form) {
    case WeightForm::f32:
    case WeightForm::f16: return "panels in_features 32";
    case WeightForm::bf16:
    case WeightForm::int8: return "panels in_features/2 32 2";
    case WeightForm::int4: return "panels in_features/8 32 4";
  }
  return "";
}

// The params but for x and the result, which may have to be copied and made.
PackedLinearParams checked_params(const PackedLinearArguments& a) {
  TensorChecks checks("x", a.x, kFloatingDtypes);
  DIFFQKV_CHECK(a.x.dim() >= 1, "x: got shape [], want [..., in_features]");
  check_at_least("out_features", a.out_features, 1);
  PackedLinearParams p;
  p.dtype = dtype_of(a.x);
  p.in_features = a.x.size(a.x.dim() - 1);
  p.rows = p.in_features == 0 ? 0 : a.x.numel() / p.in_features;
  p.out_features = a.out_features;

  checks.dtype_and_device("weight", a.weight, {checks.dtype(), ScalarType::Char, ScalarType::Byte});
  p.form = form_of(a.weight);
  const int64_t step = p.form == WeightForm::int4                                 ? 8
                       : p.form == WeightForm::bf16 || p.form == WeightForm::int8 ? 2
                                                                                  : 1;
  const int64_t divisor = p.is_integer() ? kLeastGroupSize : step;
  DIFFQKV_CHECK(p.in_features >= divisor && p.in_features % divisor == 0, "x: got ", p.in_features,
                " input features, want a multiple of ", divisor, " for weights of ", name_of(a.weight.scalar_type()));
  checks.shapes.set("in_features", p.in_features);
  checks.shapes.set("in_features/2", p.in_features / 2);
  checks.shapes.set("in_features/8", p.in_features / 8);
  checks.shapes.set("panels", p.panels());
  checks.shapes.set("out_features", p.out_features);
  checks.contiguous("weight", a.weight, {a.weight.scalar_type()}, shape_of(p.form));
  p.weight = a.weight.data_ptr();

  DIFFQKV_CHECK(a.scales.has_value() == p.is_integer(), "scales: got ", a.scales ? "a Tensor" : "None", ", want ",
                p.is_integer() ? "a Tensor" : "None", " for weights of ", name_of(a.weight.scalar_type()));
  DIFFQKV_CHECK(!a.zeros || p.is_integer(), "zeros: got a Tensor, want None for weights of ",
                name_of(a.weight.scalar_type()));
  if (a.scales) {
    checks.contiguous("scales", *a.scales, kFloatingDtypes, "panels groups 32");
    const int64_t groups = checks.shapes["groups"];
    p.group_size = groups == 0 ? 0 : p.in_features / groups;
    DIFFQKV_CHECK(groups > 0 && p.in_features % groups == 0 && p.group_size % kLeastGroupSize == 0 &&
                      p.group_size <= kMostGroupSize,
                  "scales: got ", groups, " groups of ", p.in_features,
                  " input features, want groups of a multiple of ", kLeastGroupSize, " up to ", kMostGroupSize);
    p.scales = a.scales->data_ptr();
    p.scales_dtype = dtype_of(*a.scales);
    if (a.zeros) {
      checks.contiguous("zeros", *a.zeros, {a.scales->scalar_type()}, "panels groups 32");
      p.zeros = a.zeros->data_ptr();
    }
  }
  if (a.bias) {
    checks.vector("bias", *a.bias, {checks.dtype()}, "out_features");
    p.bias = a.bias->data_ptr();
  }
  return p;
}

Tensor packed_linear(const PackedLinearArguments& a) {
  PackedLinearParams p = checked_params(a);
  std::vector<int64_t> sizes(a.x.sizes().begin(), a.x.sizes().end());
  sizes.back() = p.out_features;
  const Tensor x = a.x.is_contiguous() ? a.x : torch::stable::contiguous(a.x);
  const Tensor out = torch::stable::new_empty(a.x, sizes);
  p.x = x.data_ptr();
  p.out = out.data_ptr();
  Device("packed_linear", a.x).run(p);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(diffqkv, m) {
  m.def(
      "packed_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? zeros, Tensor? bias, int out_features) -> "
      "Tensor");
}
DIFFQKV_REGISTER_CPU(packed_linear)

}  // namespace
}  // namespace diffqkv
