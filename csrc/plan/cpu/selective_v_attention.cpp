#include "plan/cpu/selective_v_attention.h"

#include <algorithm>

#include "params/selective_v_attention.h"
#include "plan/cpu/scratch.h"

namespace diffqkv {
namespace {

constexpr int64_t kLeastChunkSplits = 2;

}  // namespace

SelectiveVAttentionPlan plan_selective_v_attention(const SelectiveVAttentionParams& params, int64_t max_keys,
                                                   int64_t threads) {
  const AttentionParams& p = params.attention;
  SelectiveVAttentionPlan plan;
  plan.dense = plan_split_attention(p, max_keys, threads);
  const int64_t groups = p.batch * plan.dense.groups, rows = plan.dense.rows;
  // As few chunks as keep the threads busy, since each leaves a list of candidates, and none so short that it is mostly
  // overhead.
  plan.chunk_splits =
      std::max(ceil_div(plan.dense.splits * groups, 4 * std::max<int64_t>(1, threads)), kLeastChunkSplits);
  plan.chunk_splits = std::clamp<int64_t>(plan.chunk_splits, 1, plan.dense.splits);
  plan.chunks = ceil_div(plan.dense.splits, plan.chunk_splits);
  plan.items = groups * plan.chunks;

  const int64_t chunk_keys = std::min(max_keys, plan.chunk_splits * kSplitTokens);
  const int64_t wanted = std::min(params.top_k, max_keys) * (params.max_error >= 0 ? kMaxAdded : 1);
  plan.candidates = std::min(chunk_keys, wanted);
  plan.candidate_room = std::min(chunk_keys, 2 * plan.candidates + kSplitTokens) + kSplitTokens + kLanes;
  plan.forced = std::min(params.keep_first, max_keys) + std::min(params.keep_last, max_keys);
  plan.listed_room = plan.chunks * plan.candidates + plan.forced + kLanes;
  plan.used_room = std::min(max_keys, wanted + plan.forced) + kLanes;
  plan.fetch_items = p.batch * p.heads.n_v * ceil_div(p.heads.q_per_v() * p.s_q, kRowsPerFetch);
  const int64_t scoring =
      plan.dense.scratch_bytes + rows * (aligned(plan.candidate_room * 4) * 2 + 64) + kAlignmentSlack;
  const int64_t fetching =
      2 * (aligned(plan.listed_room * 4) * 2 + aligned(plan.used_room * 4) + aligned(plan.used_room * 8)) +
      kAlignmentSlack;
  plan.scratch_bytes = std::max(scoring, fetching);
  return plan;
}

}  // namespace diffqkv
