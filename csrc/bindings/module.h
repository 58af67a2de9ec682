// What the files of this module share: checked shapes, and the function that binds the CUDA planners.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "params/params.h"

namespace diffqkv {

// The params of an attention call, without tensors. Throws ValueError.
AttentionParams checked_shape(int64_t n_q, int64_t n_k, int64_t n_v, int64_t d_k, int64_t d_v, int64_t s_q, int64_t s_k,
                              int64_t batch, const std::string& dtype, bool causal);

void bind_cuda_plans(pybind11::module_& m);

}  // namespace diffqkv
