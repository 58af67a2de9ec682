// Attention in float64, forward and backward, for gradcheck: loops that follow the definition, one row of scores at a
// time. Compiled once, for any CPU.
#pragma once
#include "params/params.h"

namespace diffqkv {

// An item is a q head of a batch entry. scores: room for s_k.
void plain_attention(const AttentionParams& params, int64_t item, double* scores);
// An item is a KV group of a batch entry. dsinks: [batch, n_q].
void plain_attention_backward(const FlashAttentionBackwardParams& params, int64_t item, double* dsinks);

}  // namespace diffqkv
