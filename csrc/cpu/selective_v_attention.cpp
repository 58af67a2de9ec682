#include "cpu/selective_v_attention.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/items.h"
#include "cpu/kernels/kernels.h"
#include "cpu/run.h"
#include "cpu/workspace.h"
#include "params/key_range.h"

namespace diffqkv::cpu {
namespace {

struct Pieces {
  Workspace workspace;
  ThreadScratch scratch;
  float* partials;
  SelectiveVAttentionWorkspace shared;

  Pieces(const SelectiveVAttentionParams& sp, const SelectiveVAttentionPlan& plan, void* base)
      : workspace(base), scratch(workspace, plan.dense.threads, plan.scratch_bytes) {
    const AttentionParams& p = sp.attention;
    const int64_t rows = p.batch * p.heads.n_q * p.s_q, lists = rows * plan.chunks;
    partials = workspace.take<float>(plan.dense.items * plan.dense.rows * (kPartialHeader + p.d_v));
    shared.mass = workspace.take<float>(rows * plan.dense.splits * 2);
    shared.scores = workspace.take<float>(lists * plan.candidates);
    shared.indices = workspace.take<uint32_t>(lists * plan.candidates);
    shared.counts = workspace.take<int32_t>(lists);
    shared.forced = workspace.take<float>(rows * plan.forced);
    shared.computed_densely = workspace.take<uint8_t>(rows);
    const bool makes_stats = sp.needs_v_stats() && sp.v_stats == nullptr;
    shared.v_stats = makes_stats ? workspace.take<float>(p.batch * p.heads.n_v * (p.d_v + 1)) : nullptr;
  }
};

// Whether the result of an entry is dense attention: all its keys are among the best.
bool dense(const SelectiveVAttentionParams& sp, int64_t b) {
  const KeyRange keys = entry_of(sp.attention, b).keys;
  return sp.top_k >= keys.hi - keys.lo;
}

}  // namespace

int64_t selective_v_attention_workspace(const SelectiveVAttentionParams& sp, const SelectiveVAttentionPlan& plan) {
  return Pieces(sp, plan, nullptr).workspace.bytes();
}

void selective_v_attention(const SelectiveVAttentionParams& sp, const SelectiveVAttentionPlan& plan, void* workspace,
                           Parallel parallel) {
  const AttentionPlan& dense_plan = plan.dense;
  if (dense_plan.items == 0 || dense_plan.rows == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  const AttentionParams& p = sp.attention;
  const Pieces pieces(sp, plan, workspace);
  const ThreadScratch& scratch = pieces.scratch;
  float* const partials = pieces.partials;
  const SelectiveVAttentionWorkspace& shared = pieces.shared;
  const int64_t threads = dense_plan.threads, splits = dense_plan.splits, groups = dense_plan.groups;

  // Entries with no more than top_k keys are dense attention, to the last bit.
  for_items(plan.items, threads, parallel, [&](int64_t i, int64_t w) {
    const int64_t batch_group = i / plan.chunks, chunk = i % plan.chunks;
    if (!dense(sp, batch_group / groups))
      return kernels.selective_v_attention_score(sp, plan, shared, i, scratch.of(w));
    const int64_t first = chunk * plan.chunk_splits, last = std::min(splits, first + plan.chunk_splits);
    for (int64_t split = first; split < last; ++split)
      kernels.attention_split(p, dense_plan, batch_group * splits + split, scratch.of(w), partials);
  });
  for (int64_t i = 0; i < p.batch * groups; ++i)
    if (dense(sp, i / groups))
      for (int64_t row = 0; row < dense_plan.rows; ++row) kernels.attention_merge(p, dense_plan, i, row, partials);
  if (shared.v_stats != nullptr)
    for_items(p.batch * p.heads.n_v, threads, parallel, [&](int64_t i, int64_t) {
      if (!dense(sp, i / p.heads.n_v)) kernels.selective_v_attention_stats(sp, shared, i);
    });
  for_items(plan.fetch_items, threads, parallel,
            [&](int64_t i, int64_t w) { kernels.selective_v_attention_gather(sp, plan, shared, i, scratch.of(w)); });
  if (sp.max_error < 0) return;

  // Rows whose candidates could not keep max_error: their groups once more, with all of V.
  const auto densely = [&, flags = shared.computed_densely](int64_t batch_group) {
    return flags + batch_group * dense_plan.rows;
  };
  for_items(dense_plan.items, threads, parallel, [&](int64_t i, int64_t w) {
    const uint8_t* rows = densely(i / splits);
    if (std::any_of(rows, rows + dense_plan.rows, [](uint8_t flag) { return flag != 0; }))
      kernels.attention_split(p, dense_plan, i, scratch.of(w), partials);
  });
  for (int64_t i = 0; i < p.batch * groups; ++i)
    for (int64_t row = 0; row < dense_plan.rows; ++row)
      if (densely(i)[row]) kernels.attention_merge(p, dense_plan, i, row, partials);
}

void run(const SelectiveVAttentionParams& sp, const Caller& caller) {
  const SelectiveVAttentionPlan plan = plan_selective_v_attention(sp, most_keys(sp.attention), caller.threads);
  void* const workspace = caller.memory.take(selective_v_attention_workspace(sp, plan));
  selective_v_attention(sp, plan, workspace, caller.parallel);
}

}  // namespace diffqkv::cpu
