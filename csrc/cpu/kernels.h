// The functions that exist once per instruction set. Each does one work item on one thread; csrc/core cuts the work and
// hands out items.
#pragma once
#include <stdint.h>

#include "diffqkv/attention_plan.h"
#include "diffqkv/params.h"

namespace diffqkv {

// Workspace of selective_v_attention, shared by its items. Rows are (batch, q head, query).
struct SelectiveWorkspace {
  float* scores;   // [rows, stride] raw dot products, signed so that larger is better
  int64_t stride;  // keys, rounded up to a whole tile
  float* mass;     // [rows, splits, 2]: maximum and sum of exponentials of a split
  int64_t splits;
  float* v_stats;  // [batch, n_v, d_v + 1], computed here unless the caller keeps them; or null
};

struct CpuKernels {
  const char* isa;
  void (*attention_block)(const AttentionParams&, const AttentionPlan&, int64_t item, void* scratch);
  void (*attention_split)(const AttentionParams&, const AttentionPlan&, int64_t item, void* scratch, float* partials);
  void (*attention_merge)(const AttentionParams&, const AttentionPlan&, int64_t batch_group, const float* partials);
  void (*selective_v_score)(const SelectiveVParams&, const AttentionPlan&, const SelectiveWorkspace&, int64_t item,
                            void* scratch);
  void (*selective_v_stats)(const SelectiveVParams&, const SelectiveWorkspace&, int64_t batch_v_head);
  void (*selective_v_gather)(const SelectiveVParams&, const SelectiveWorkspace&, int64_t row, void* scratch);
  void (*kv_cache_update)(const CacheUpdateParams&, int64_t entry, int64_t group, int64_t begin, int64_t end);
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
