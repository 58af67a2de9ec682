// The angles of rotary_embedding and kv_cache_update.
#pragma once
#include "ops/checks.h"

namespace diffqkv {

// Checks cos and sin, [batch or 1, tokens, d_rot], of rows that have d elements.
void check_rope(const TensorChecks& checks, const Tensor& cos, const Tensor& sin, int64_t batch, int64_t tokens,
                int64_t d);

// From the angles of a batch entry to those of the next; 0 where all have the same.
int64_t rope_stride_batch(const Tensor& angles);

}  // namespace diffqkv
