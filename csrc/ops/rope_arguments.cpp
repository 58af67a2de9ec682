#include "ops/rope_arguments.h"

namespace diffqkv {
namespace {

// One of cos and sin.
void check_angles(const TensorChecks& checks, const char* name, const Tensor& t, int64_t batch, int64_t tokens,
                  int64_t d) {
  checks.dtype_and_device(name, t, {ScalarType::Float, checks.dtype()});
  const auto sizes = t.sizes();
  DIFFQKV_CHECK(sizes.size() == 3 && (sizes[0] == 1 || sizes[0] == batch) && sizes[1] == tokens && sizes[2] % 2 == 0 &&
                    sizes[2] <= d,
                name, ": got shape ", list_of(sizes), ", want [", batch, " or 1, ", tokens, ", an even number <= ", d,
                "]");
  check_unit_last_stride(name, t);
}

}  // namespace

int64_t rope_stride_batch(const Tensor& angles) { return angles.size(0) == 1 ? 0 : angles.stride(0); }

void check_rope(const TensorChecks& checks, const Tensor& cos, const Tensor& sin, int64_t batch, int64_t tokens,
                int64_t d) {
  check_angles(checks, "cos", cos, batch, tokens, d);
  check_angles(checks, "sin", sin, batch, tokens, d);
  DIFFQKV_CHECK(sin.scalar_type() == cos.scalar_type(), "sin: got dtype ", name_of(sin.scalar_type()), ", want ",
                name_of(cos.scalar_type()), ", that of cos");
  DIFFQKV_CHECK(sin.sizes().equals(cos.sizes()), "sin: got shape ", list_of(sin.sizes()),
                ", want the shape of cos = ", list_of(cos.sizes()));
  DIFFQKV_CHECK(rope_stride_batch(sin) == rope_stride_batch(cos) && sin.stride(1) == cos.stride(1), "sin: got strides ",
                list_of(sin.strides()), ", want ", list_of(cos.strides()), ", those of cos");
}

}  // namespace diffqkv
