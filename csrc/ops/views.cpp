#include "ops/views.h"

namespace diffqkv {

DType dtype_of(const Tensor& t) {
  const int32_t number = dtype_number(t);
  if (number == aoti_torch_dtype_bfloat16()) return DType::bf16;
  if (number == aoti_torch_dtype_float16()) return DType::f16;
  return number == aoti_torch_dtype_float64() ? DType::f64 : DType::f32;
}

TokenView token_view(const Tensor& t) {
  const auto strides = t.strides();
  if (strides.size() == 4) return {t.data_ptr(), strides[0], strides[1], strides[2], dtype_of(t)};
  return {t.data_ptr(), 0, strides[1], strides[0], dtype_of(t)};
}

KvView kv_view(const Tensor& t, int64_t heads_per_group) {
  const TokenView tokens = token_view(t);
  KvView view;
  view.data = tokens.data;
  view.stride_page = tokens.stride_batch;
  view.stride_group = tokens.stride_head * heads_per_group;
  view.stride_head = tokens.stride_head;
  view.stride_token = tokens.stride_token;
  view.dtype = tokens.dtype;
  return view;
}

std::optional<int64_t> row_stride(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t dim = t.dim() - 1;
  if (dim < 0 || (strides[dim] != 1 && sizes[dim] > 1)) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t next = 0;  // the stride of the next dimension, where all rows are one after the other
  const int64_t width = sizes[dim];
  while (--dim >= 0) {
    if (sizes[dim] == 1) continue;
    if (stride && strides[dim] != next) return std::nullopt;
    if (!stride) stride = strides[dim];
    next = strides[dim] * sizes[dim];
  }
  return stride.value_or(width);
}

Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

}  // namespace diffqkv
