// The CPU ops without torch. Each plans the call, takes the memory that it needs from the caller, and hands out the
// work items of the plan to the caller's threads.
#pragma once
#include "cpu/caller.h"
#include "params/params.h"

namespace diffqkv::cpu {

// flash_attention and decode_attention.
void run(const AttentionParams& params, const Caller& caller);
void run(const FlashAttentionBackwardParams& params, const Caller& caller);
void run(const SelectiveVAttentionParams& params, const Caller& caller);
// Positions and block table have been checked.
void run(const KvCacheUpdateParams& params, const Caller& caller);
void run(const PackedLinearParams& params, const Caller& caller);
void run(const RmsNormParams& params, const Caller& caller);
void run(const RotaryEmbeddingParams& params, const Caller& caller);
void run(const SwigluParams& params, const Caller& caller);
void run(const SwigluBackwardParams& params, const Caller& caller);

}  // namespace diffqkv::cpu
