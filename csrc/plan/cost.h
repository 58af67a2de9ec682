// What an attention call costs on any device: a pure function of shapes.
#pragma once
#include <cstdint>

#include "params/params.h"

namespace diffqkv {

// Arithmetic of the (query, key) pairs that the window lets through, and every operand read or written once.
struct AttentionCost {
  double flops = 0, bytes = 0;
};
// max_keys: the longest sequence of the call.
AttentionCost attention_cost(const AttentionParams& params, int64_t max_keys);

// FLOPs of the gradients: five products for the forward pass's two.
double attention_backward_flops(const AttentionParams& params);

}  // namespace diffqkv
