// Tensors as the kernels see them: pointers and strides. All shapes are checked before.
#pragma once
#include "ops/torch_compat.h"
#include "params/params.h"

namespace diffqkv {

DType dtype_of(const Tensor& t);

// Queries or results: [batch, heads, tokens, dim], or packed [tokens, heads, dim].
TokenView token_view(const Tensor& t);
// K or V of such a shape: one page per batch entry, or one page of packed tokens.
KvView kv_view(const Tensor& t, int64_t heads_per_group);

// From one row of the last dimension to the next, whose elements lie side by side; nothing where no one number says it.
std::optional<int64_t> row_stride(const Tensor& t);

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
// Null where there is no tensor.
template <class T>
T* data_of(const std::optional<Tensor>& t) {
  return t ? data_of<T>(*t) : nullptr;
}

// The tensor in this dtype; itself where it has it.
Tensor as_dtype(const Tensor& t, ScalarType dtype);

}  // namespace diffqkv
