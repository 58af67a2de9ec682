// The CPU ops without torch: fill a params struct, plan, give a workspace and a thread pool.
#pragma once
#include <cstdint>

#include "diffqkv/attention_plan.h"
#include "diffqkv/params.h"

namespace diffqkv::cpu {

// The caller's thread pool: calls body(context, w) once for each w in [0, workers) and returns when all are done.
using Parallel = void (*)(int64_t workers, void (*body)(void* context, int64_t worker), void* context);

// Bytes of workspace that a call needs.
DIFFQKV_API int64_t attention_workspace(const AttentionPlan& plan);
DIFFQKV_API int64_t selective_v_workspace(const SelectiveVParams& params, const SelectivePlan& plan);

// plan: plan_attention(...) of the same shape, with max_keys >= the longest kv_end.
DIFFQKV_API void attention(const AttentionParams& params, const AttentionPlan& plan, void* workspace,
                           Parallel parallel);
DIFFQKV_API int64_t attention_backward_workspace(const AttentionBackwardParams& params,
                                                 const AttentionBackwardPlan& plan);
// plan: plan_attention_backward(...) of params.forward.
DIFFQKV_API void attention_backward(const AttentionBackwardParams& params, const AttentionBackwardPlan& plan,
                                    void* workspace, Parallel parallel);
// plan: plan_selective(...) of the same params.
DIFFQKV_API void selective_v_attention(const SelectiveVParams& params, const SelectivePlan& plan, void* workspace,
                                       Parallel parallel);
// positions and block table checked by the caller.
DIFFQKV_API void kv_cache_update(const CacheUpdateParams& params, int64_t threads, Parallel parallel);
DIFFQKV_API void swiglu(const SwigluParams& params, int64_t threads, Parallel parallel);
DIFFQKV_API void swiglu_backward(const SwigluParams& params, int64_t threads, Parallel parallel);

// The physical limits that benchmarks compare with, on the threads that the ops use.
enum class Probe : int32_t {
  fma = 0,   // fp32 multiply-adds on registers
  dot = 1,   // bf16 dot products on registers
  read = 2,  // memory, read from end to end in equal shares
};
// Does `rounds` of it on every thread; returns the FLOPs done, or the bytes read, and 0 where the CPU has no such
// thing.
DIFFQKV_API double probe(Probe what, int64_t rounds, const void* data, int64_t bytes, int64_t threads,
                         Parallel parallel);

}  // namespace diffqkv::cpu
