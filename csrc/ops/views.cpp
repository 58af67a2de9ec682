#include "ops/views.h"

namespace diffqkv {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double: return DType::f64;
    default: return DType::f32;
  }
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

Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

}  // namespace diffqkv
