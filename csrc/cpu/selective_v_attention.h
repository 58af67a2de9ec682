// selective_v_attention by a given plan, in given memory.
#pragma once
#include "cpu/caller.h"
#include "params/params.h"
#include "plan/cpu/selective_v_attention.h"

namespace diffqkv::cpu {

// Bytes of workspace that a call of this plan needs.
int64_t selective_v_attention_workspace(const SelectiveVAttentionParams& params, const SelectiveVAttentionPlan& plan);

// plan: plan_selective_v_attention(...) of the same params, with max_keys >= the longest kv_end.
void selective_v_attention(const SelectiveVAttentionParams& params, const SelectiveVAttentionPlan& plan,
                           void* workspace, Parallel parallel);

}  // namespace diffqkv::cpu
