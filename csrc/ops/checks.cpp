#include "ops/checks.h"

#include <algorithm>
#include <charconv>

namespace diffqkv {
namespace {

std::string names_of(Dtypes dtypes) {
  std::string text;
  for (const ScalarType* dtype = dtypes.begin(); dtype != dtypes.end(); ++dtype)
    if (std::find(dtypes.begin(), dtype, *dtype) == dtype)
      text += (text.empty() ? "" : " or ") + std::string(name_of(*dtype));
  return text;
}

void check_dtype(const char* name, ScalarType dtype, Dtypes wanted) {
  DIFFQKV_CHECK(std::find(wanted.begin(), wanted.end(), dtype) != wanted.end(), name, ": got dtype ", name_of(dtype),
                ", want ", names_of(wanted));
}

std::string text_of(const torch::stable::Device& device) {
  using torch::headeronly::DeviceType;
  switch (device.type()) {
    case DeviceType::CPU: return "cpu";
    case DeviceType::CUDA: return "cuda:" + std::to_string(device.index());
    case DeviceType::Meta: return "meta";
    default: return "another device";
  }
}

}  // namespace

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "of another kind";
  }
}

std::string text_of(double value) {
  char digits[32];
  std::string text(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
  if (text.find_first_not_of("-0123456789") == std::string::npos) text += ".0";
  return text;
}

TensorChecks::TensorChecks(const char* like_name, const Tensor& like, Dtypes dtypes)
    : like_(like), dtype_(like.scalar_type()), dtype_number_(dtype_number(like)) {
  check_dtype(like_name, dtype_, dtypes);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type_));
  device_index_ = like.get_device_index();
}

bool TensorChecks::is_where_like_is(const Tensor& t) const {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type == device_type_ && (type == aoti_torch_device_type_cpu() || t.get_device_index() == device_index_);
}

void TensorChecks::dtype_and_device(const char* name, const Tensor& t, Dtypes dtypes) const {
  check_dtype(name, dtype_number(t) == dtype_number_ ? dtype_ : t.scalar_type(), dtypes);
  DIFFQKV_CHECK(is_where_like_is(t), name, ": got device ", text_of(t.device()), ", want ", text_of(like_.device()),
                ", where the other tensors are");
}

void TensorChecks::tensor(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want) {
  dtype_and_device(name, t, dtypes);
  shapes.check(name, t, want);
}

void TensorChecks::rows(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want) {
  tensor(name, t, dtypes, want);
  check_unit_last_stride(name, t);
}

void TensorChecks::contiguous(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want) {
  tensor(name, t, dtypes, want);
  DIFFQKV_CHECK(t.is_contiguous(), name, ": got strides ", list_of(t.strides()), ", want a contiguous tensor");
}

void TensorChecks::vector(const char* name, const Tensor& t, Dtypes dtypes, std::string_view want) {
  tensor(name, t, dtypes, want);
  DIFFQKV_CHECK(t.is_contiguous(), name, ": got stride ", t.stride(0), ", want 1");
}

// The strides of empty tensors mean nothing, and those that come from numpy have odd ones.
bool has_unit_last_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 || t.numel() == 0;
}

void check_unit_last_stride(const char* name, const Tensor& t) {
  DIFFQKV_CHECK(has_unit_last_stride(t), name, ": got stride ", t.stride(t.dim() - 1),
                " in the last dimension, want 1");
}

void check_head_dim(const char* name, int64_t d) {
  DIFFQKV_CHECK(d >= 8 && d <= kMaxHeadDim && d % 8 == 0, name, ": got head dimension ", d,
                ", want a multiple of 8 from 8 to ", kMaxHeadDim);
}

void check_heads(const char* name, int64_t n, int64_t n_q) {
  DIFFQKV_CHECK(n > 0 && n_q % n == 0, name, ": got ", n, " heads, want a divisor of q's ", n_q, " heads");
}

void check_at_least(const char* name, int64_t value, int64_t least) {
  DIFFQKV_CHECK(value >= least, name, ": got ", value, ", want an integer >= ", least);
}

}  // namespace diffqkv
