// The functions that exist once per instruction set level. Each does one work item on one thread: plan/cpu cuts the
// work, the op's file in cpu/ hands out the items. attention_* are the parts of flash_attention (block) and of
// decode_attention (split, merge), which are one op to the CPU; selective_v_attention takes the latter two as well.
#pragma once
#include <stdint.h>

#include "params/params.h"
#include "plan/cpu/attention.h"
#include "plan/cpu/flash_attention_backward.h"
#include "plan/cpu/packed_linear.h"
#include "plan/cpu/selective_v_attention.h"

namespace diffqkv {

// Workspace of selective_v_attention, shared by its items. Rows are (batch, q head, query), lists (row, chunk).
struct SelectiveVAttentionWorkspace {
  float* mass;                // [rows, splits, 2]: maximum and sum of exponentials of a split
  float* scores;              // [lists, candidates] raw dot products, signed so that larger is better
  uint32_t* indices;          // [lists, candidates] their cache positions, ascending
  int32_t* counts;            // [lists] how many; -1: a score is NaN
  float* forced;              // [rows, plan.forced] scores of keep_first and keep_last rows
  uint8_t* computed_densely;  // [rows] whether selection failed to keep max_error
  float* v_stats;             // [batch, n_v, d_v + 1], computed here unless the caller keeps them; or null
};

// Workspace of flash_attention_backward, shared by its items.
struct FlashAttentionBackwardWorkspace {
  float* delta;    // as lse: rowsum(dO * O) - dlse
  double* dsinks;  // [batch, n_q]
  float* dq;       // as dq: its sum so far, of 16-bit inputs
  int32_t* ready;  // [batch, n_q, query blocks]: key blocks whose share is in dq
  // Returns when *ready has become `count`.
  void (*wait)(const int32_t* ready, int32_t count);
};

// The rows of x as packed_linear multiplies them, shared by its items: in tiles of n rows, at most kLinearTileRows, the
// words in blocks of kLinearBlock. One row may be x itself, without the last block's zeros.
struct PackedLinearRows {
  uint32_t* words = nullptr;  // [tiles, blocks, n, kLinearBlock]: fp32, or pairs of bf16 or of int16
  float* scales = nullptr;    // [tiles, groups, n] of the latter
  int32_t* sums = nullptr;    // [tiles, groups, n] of these integers
};

// Every kernel, listed once: KERNEL(result, name, (parameters)). The functions below and the members of the table are
// made of this list. `row` of attention_merge counts the rows of a group; the probes return the FLOPs that `rounds` of
// multiply-adds on registers do, in fp32 and by bf16 dot products (0 where there are none).
// clang-format off
#define DIFFQKV_CPU_KERNELS(KERNEL)                                                                                    \
  KERNEL(void, attention_block, (const AttentionParams&, const AttentionPlan&, int64_t item, void* scratch))           \
  KERNEL(void, attention_split,                                                                                        \
         (const AttentionParams&, const AttentionPlan&, int64_t item, void* scratch, float* partials))                 \
  KERNEL(void, attention_merge,                                                                                        \
         (const AttentionParams&, const AttentionPlan&, int64_t batch_group, int64_t row, const float* partials))      \
  KERNEL(void, flash_attention_backward_rows,                                                                          \
         (const FlashAttentionBackwardParams&, const FlashAttentionBackwardPlan&,                                      \
          const FlashAttentionBackwardWorkspace&, int64_t batch_q_head))                                               \
  KERNEL(void, flash_attention_backward_block,                                                                         \
         (const FlashAttentionBackwardParams&, const FlashAttentionBackwardPlan&,                                      \
          const FlashAttentionBackwardWorkspace&, int64_t item, void* scratch))                                        \
  KERNEL(void, selective_v_attention_score,                                                                            \
         (const SelectiveVAttentionParams&, const SelectiveVAttentionPlan&, const SelectiveVAttentionWorkspace&,       \
          int64_t item, void* scratch))                                                                                \
  KERNEL(void, selective_v_attention_stats,                                                                            \
         (const SelectiveVAttentionParams&, const SelectiveVAttentionWorkspace&, int64_t batch_v_head))                \
  KERNEL(void, selective_v_attention_gather,                                                                           \
         (const SelectiveVAttentionParams&, const SelectiveVAttentionPlan&, const SelectiveVAttentionWorkspace&,       \
          int64_t item, void* scratch))                                                                                \
  KERNEL(void, kv_cache_update,                                                                                        \
         (const KvCacheUpdateParams&, int64_t entry, int64_t group, int64_t begin, int64_t end))                       \
  KERNEL(void, packed_linear_rows, (const PackedLinearParams&, const PackedLinearRows&, int64_t tile))                 \
  KERNEL(void, packed_linear_block,                                                                                    \
         (const PackedLinearParams&, const PackedLinearPlan&, const PackedLinearRows&, int64_t item, void* scratch))   \
  KERNEL(void, rms_norm, (const RmsNormParams&, int64_t begin, int64_t end))                                           \
  KERNEL(void, rotary_embedding, (const RotaryEmbeddingParams&, int64_t begin, int64_t end))                           \
  KERNEL(void, swiglu, (const SwigluParams&, int64_t begin, int64_t end))                                              \
  KERNEL(void, swiglu_backward, (const SwigluBackwardParams&, int64_t begin, int64_t end))                             \
  KERNEL(double, probe_fma, (int64_t rounds, float* sink))                                                             \
  KERNEL(double, probe_dot, (int64_t rounds, float* sink))                                                             \
  KERNEL(void, probe_read, (const void* data, int64_t bytes, float* sink))
// clang-format on

struct CpuKernels {
#define DIFFQKV_MEMBER(result, name, parameters) result(*name) parameters;
  DIFFQKV_CPU_KERNELS(DIFFQKV_MEMBER)
#undef DIFFQKV_MEMBER
};

#if defined(DIFFQKV_ISA)  // in a build of the kernels for one instruction set level
namespace DIFFQKV_ISA {
#define DIFFQKV_FUNCTION(result, name, parameters) result name parameters;
DIFFQKV_CPU_KERNELS(DIFFQKV_FUNCTION)
#undef DIFFQKV_FUNCTION
}  // namespace DIFFQKV_ISA
#endif

extern const CpuKernels kernels_v2, kernels_v3, kernels_v4, kernels_v4_bf16;

}  // namespace diffqkv
