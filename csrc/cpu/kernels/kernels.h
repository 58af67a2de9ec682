// The functions that exist once per instruction set. Each does one work item on one thread; csrc/core cuts the work and
// hands out items.
#pragma once
#include <stdint.h>

#include "params/params.h"
#include "plan/cpu/attention.h"

namespace diffqkv {

// Workspace of selective_v_attention, shared by its items. Rows are (batch, q head, query), lists (row, chunk).
struct SelectiveVWorkspace {
  float* mass;                // [rows, splits, 2]: maximum and sum of exponentials of a split
  float* scores;              // [lists, candidates] raw dot products, signed so that larger is better
  uint32_t* indices;          // [lists, candidates] their cache positions, ascending
  int32_t* counts;            // [lists] how many; -1: a score is NaN
  float* forced;              // [rows, plan.forced] scores of keep_first and keep_last rows
  uint8_t* computed_densely;  // [rows] whether selection failed to keep max_error
  float* v_stats;             // [batch, n_v, d_v + 1], computed here unless the caller keeps them; or null
};

// Workspace of flash_attention_backward, shared by its items.
struct BackwardWorkspace {
  float* delta;    // as lse: rowsum(dO * O) - dlse
  double* dsinks;  // [batch, n_q]
  float* dq;       // as dq: its sum so far, of 16-bit inputs
  int32_t* ready;  // [batch, n_q, query blocks]: key blocks whose share is in dq
  // Returns when *ready has become `count`.
  void (*wait)(const int32_t* ready, int32_t count);
};

struct CpuKernels {
  const char* isa;
  void (*attention_block)(const AttentionParams&, const AttentionPlan&, int64_t item, void* scratch);
  void (*attention_split)(const AttentionParams&, const AttentionPlan&, int64_t item, void* scratch, float* partials);
  // row: of the group
  void (*attention_merge)(const AttentionParams&, const AttentionPlan&, int64_t batch_group, int64_t row,
                          const float* partials);
  void (*attention_backward_rows)(const FlashAttentionBackwardParams&, const FlashAttentionBackwardPlan&,
                                  const BackwardWorkspace&, int64_t batch_q_head);
  void (*attention_backward_block)(const FlashAttentionBackwardParams&, const FlashAttentionBackwardPlan&,
                                   const BackwardWorkspace&, int64_t item, void* scratch);
  void (*selective_v_score)(const SelectiveVAttentionParams&, const SelectiveVAttentionPlan&,
                            const SelectiveVWorkspace&, int64_t item, void* scratch);
  void (*selective_v_stats)(const SelectiveVAttentionParams&, const SelectiveVWorkspace&, int64_t batch_v_head);
  void (*selective_v_gather)(const SelectiveVAttentionParams&, const SelectiveVAttentionPlan&,
                             const SelectiveVWorkspace&, int64_t item, void* scratch);
  void (*kv_cache_update)(const KvCacheUpdateParams&, int64_t entry, int64_t group, int64_t begin, int64_t end);
  void (*swiglu)(const SwigluParams&, int64_t begin, int64_t end);
  void (*swiglu_backward)(const SwigluParams&, int64_t begin, int64_t end);
  // FLOPs done by `rounds` of multiply-adds on registers, in fp32 and by bf16 dot products (0 where there are none).
  double (*probe_fma)(int64_t rounds, float* sink);
  double (*probe_dot)(int64_t rounds, float* sink);
  void (*probe_read)(const void* data, int64_t bytes, float* sink);
};

extern const CpuKernels kernels_v2, kernels_v3, kernels_v4, kernels_v4_bf16;

// The level in use: the best one this CPU runs, or the one that DIFFQKV_CPU_ISA names. Chosen once.
const CpuKernels& cpu_kernels();

}  // namespace diffqkv
