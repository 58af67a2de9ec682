// flash_attention and decode_attention by a given plan, in given memory.
#pragma once
#include "cpu/caller.h"
#include "params/params.h"
#include "plan/cpu/attention.h"

namespace diffqkv::cpu {

// Bytes of workspace that a call of this plan needs.
int64_t attention_workspace(const AttentionPlan& plan);

// plan: plan_attention(...) of the same shape, with max_keys >= the longest kv_end.
void attention(const AttentionParams& params, const AttentionPlan& plan, void* workspace, Parallel parallel);

}  // namespace diffqkv::cpu
