// Checks of arguments that the ops share. Everything is checked before torch is asked for memory and before anything is
// written. python/diffqkv/ops makes the same checks, in the same words, of calls that no kernel takes.
#pragma once
#include <initializer_list>

#include "ops/shapes.h"
#include "params/params.h"

namespace diffqkv {

using Dtypes = std::initializer_list<ScalarType>;
inline constexpr Dtypes kFloatingDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
inline constexpr Dtypes kTrainingDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                           ScalarType::Double};

// Checks the tensors of one call: they have to be where `like` is, and their sizes have to fit each other. Each
// function checks the dtype, the device, rank and sizes, and the strides of a tensor, in this order.
class TensorChecks {
 public:
  // Checks the dtype of `like`, the argument of that name. It has to outlive this object.
  TensorChecks(const char* like_name, const Tensor& like, Dtypes dtypes);

  void dtype_and_device(const char* name, const Tensor& t, Dtypes dtypes) const;
  // The strides of this tensor do not matter.
  void tensor(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want);
  // The elements of its last dimension have to lie side by side.
  void rows(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want);
  void contiguous(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want);
  // The same for a tensor of one dimension, such as one number per batch entry.
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
  // The dtype and the device of `like` as torch numbers them, which is what it tells fastest.
  int32_t dtype_number_, device_type_, device_index_;
};

const char* name_of(ScalarType dtype);
// The number as Python writes it: "-1.0", "1e+39".
std::string text_of(double value);

bool has_unit_last_stride(const Tensor& t);
void check_unit_last_stride(const char* name, const Tensor& t);
void check_head_dim(const char* name, int64_t d);
// name: the argument with K or V, whose n heads the n_q query heads share.
void check_heads(const char* name, int64_t n, int64_t n_q);
void check_at_least(const char* name, int64_t value, int64_t least);

}  // namespace diffqkv
