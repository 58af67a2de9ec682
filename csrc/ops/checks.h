// Checks of arguments that the ops share. Everything is checked before torch is asked for memory and before anything is
// written. python/diffqkv/ops/checks.py makes the same checks, in the same words, of calls that no kernel takes.
#pragma once
#include <initializer_list>

#include "ops/shapes.h"
#include "params/params.h"

namespace diffqkv {

using Dtypes = std::initializer_list<ScalarType>;
inline constexpr Dtypes kFloatingDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
inline constexpr Dtypes kTrainingDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                           ScalarType::Double};

// The tensors of one call: where `like` is, and of sizes that fit each other. Each function checks dtype, device, rank
// and sizes, and strides, in this order.
class TensorChecks {
 public:
  // like_name: the argument that `like` is, whose dtype is checked here.
  TensorChecks(const char* like_name, const Tensor& like, Dtypes dtypes);

  void dtype_and_device(const char* name, const Tensor& t, Dtypes dtypes) const;
  void any_strides(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want);
  void unit_last_stride(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want);
  void contiguous(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want);
  // Of one dimension, contiguous.
  void vector(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want);

  // The dtype of `like`.
  ScalarType dtype() const { return dtype_; }
  // The dtype of lse, and of sinks in the kernels: float32, beside float64 data float64.
  ScalarType wide_dtype() const { return dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  Shapes shapes;

 private:
  bool is_where_like_is(const Tensor& t) const;

  const Tensor& like_;
  ScalarType dtype_;
  // dtype_ and the device of `like` in torch's own numbers, which are read fastest.
  int32_t dtype_number_, device_type_, device_index_;
};

const char* name_of(ScalarType dtype);
// As Python writes a float: "-1.0", "1e+39".
std::string text_of(double value);

bool has_unit_last_stride(const Tensor& t);
void check_unit_last_stride(const char* name, const Tensor& t);
void check_head_dim(const char* name, int64_t d);
// name: K or V, whose n heads the n_q query heads share.
void check_heads(const char* name, int64_t n, int64_t n_q);
void check_at_least(const char* name, int64_t value, int64_t least);

}  // namespace diffqkv
