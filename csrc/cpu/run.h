// The CPU ops without torch: fill a params struct, plan, give a workspace and a thread pool.
#pragma once
#include <cstdint>

#include "params/params.h"
#include "plan/cpu/attention.h"
#include "plan/cpu/flash_attention_backward.h"
#include "plan/cpu/selective_v_attention.h"

namespace diffqkv::cpu {

// The caller's thread pool: calls body(context, w) once for each w in [0, workers) and returns when all are done.
using Parallel = void (*)(int64_t workers, void (*body)(void* context, int64_t worker), void* context);

// Bytes of workspace that a call needs.
int64_t attention_workspace(const AttentionPlan& plan);
int64_t selective_v_attention_workspace(const SelectiveVAttentionParams& params, const SelectiveVAttentionPlan& plan);

// plan: plan_attention(...) of the same shape, with max_keys >= the longest kv_end.
void attention(const AttentionParams& params, const AttentionPlan& plan, void* workspace, Parallel parallel);
int64_t flash_attention_backward_workspace(const FlashAttentionBackwardParams& params,
                                           const FlashAttentionBackwardPlan& plan);
// plan: plan_flash_attention_backward(...) of params.forward.
void flash_attention_backward(const FlashAttentionBackwardParams& params, const FlashAttentionBackwardPlan& plan,
                              void* workspace, Parallel parallel);
// plan: plan_selective_v_attention(...) of the same params.
void selective_v_attention(const SelectiveVAttentionParams& params, const SelectiveVAttentionPlan& plan,
                           void* workspace, Parallel parallel);
// positions and block table checked by the caller.
void kv_cache_update(const KvCacheUpdateParams& params, int64_t threads, Parallel parallel);
void swiglu(const SwigluParams& params, int64_t threads, Parallel parallel);
void swiglu_backward(const SwigluParams& params, int64_t threads, Parallel parallel);

// The physical limits that benchmarks compare with, on the threads that the ops use.
enum class Probe : int32_t {
  fma = 0,   // fp32 multiply-adds on registers
  dot = 1,   // bf16 dot products on registers
  read = 2,  // memory, read from end to end in equal shares
};
// Does `rounds` of it on every thread; returns the FLOPs done, or the bytes read, and 0 where the CPU has no such
// thing.
double probe(Probe what, int64_t rounds, const void* data, int64_t bytes, int64_t threads, Parallel parallel);

}  // namespace diffqkv::cpu
