// All that the ops take from torch: its stable ABI, seen through the torch 2.11 target.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

// The Python wrappers turn "diffqkv: argument: got ..., want ..." into ValueError, or TypeError if it is about a dtype.
#define DIFFQKV_CHECK(condition, ...) STD_TORCH_CHECK(condition, "diffqkv: ", __VA_ARGS__)

namespace diffqkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Torch's own number of a dtype. Tensor::scalar_type asks torch for the numbers of up to twenty dtypes to compare it.
inline int32_t dtype_number(const Tensor& t) {
  int32_t number = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  return number;
}

}  // namespace diffqkv
