// flash_attention_backward by a given plan, in given memory.
#pragma once
#include "cpu/caller.h"
#include "params/params.h"
#include "plan/cpu/flash_attention_backward.h"

namespace diffqkv::cpu {

// Bytes of workspace that a call of this plan needs.
int64_t flash_attention_backward_workspace(const FlashAttentionBackwardParams& params,
                                           const FlashAttentionBackwardPlan& plan);

// plan: plan_flash_attention_backward(...) of params.forward.
void flash_attention_backward(const FlashAttentionBackwardParams& params, const FlashAttentionBackwardPlan& plan,
                              void* workspace, Parallel parallel);

}  // namespace diffqkv::cpu
