#include "diffqkv/attention_plan.h"

#include <algorithm>

namespace diffqkv {
namespace {

// A parallel region costs about 1 us; below this much arithmetic a second thread does not pay for it.
constexpr double kFlopsPerThread = 2e5;
// Queries and accumulators of an item stay in the L2 cache beside a tile of K and V.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kMaxBlockQ = 96;  // a multiple of the 12 and 6 rows of the register tiles
constexpr int64_t kScoreRows = 12;  // rows whose scores an item holds at once
// Above this many rows per group the split kernel's tile of scores outgrows the L2 cache.
constexpr int64_t kMaxSplitRows = 128;
constexpr int64_t kMaxSplitQueries = 16;
constexpr int64_t kChunkSplits = 2;  // at least, of selective V
constexpr int64_t kLanes = 16;       // of the widest vector: reads and writes overshoot by as much

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// What both kernels share.
AttentionPlan common_plan(const HeadGroups& heads, int64_t batch, int64_t s_q, int64_t max_keys, int64_t d_k,
                          int64_t d_v, DType dtype, bool causal) {
  AttentionPlan plan;
  plan.groups = heads.groups();
  plan.rows = heads.q_per_group() * s_q;
  const double pairs = double(s_q) * double(max_keys) - (causal && s_q <= max_keys ? 0.5 * s_q * (s_q - 1.0) : 0.0);
  plan.flops = 2.0 * batch * heads.n_q * pairs * double(d_k + d_v);
  plan.bytes = double(dtype_size(dtype)) * batch *
               (double(max_keys) * (heads.n_k * d_k + heads.n_v * d_v) + double(s_q) * heads.n_q * (d_k + d_v));
  return plan;
}

void set_threads(AttentionPlan& plan, int64_t threads) {
  const int64_t useful = static_cast<int64_t>(plan.flops / kFlopsPerThread);
  plan.threads = std::clamp<int64_t>(std::min(useful, plan.items), 1, std::max<int64_t>(1, threads));
}

// q and accumulator of a query row, fp32 at most.
int64_t row_bytes(int64_t d_k, int64_t d_v) { return 4 * (d_k + ceil_div(d_v, 16) * 16); }
// A packed panel and the rows it is packed from.
int64_t panel_bytes(int64_t d_k) { return 2 * aligned(4 * kPanelTokens * d_k); }
constexpr int64_t kAlignmentSlack = 4096;

AttentionPlan plan_split(const HeadGroups& heads, int64_t batch, int64_t s_q, int64_t max_keys, int64_t d_k,
                         int64_t d_v, DType dtype, bool causal, int64_t threads) {
  AttentionPlan plan = common_plan(heads, batch, s_q, max_keys, d_k, d_v, dtype, causal);
  plan.kernel = AttentionKernel::split;
  plan.splits = std::max<int64_t>(1, ceil_div(max_keys, kSplitTokens));
  plan.items = batch * plan.groups * plan.splits;
  if (plan.splits > 1) plan.partial_floats = plan.items * plan.rows * (d_v + kPartialHeader);
  plan.scratch_bytes =
      aligned(plan.rows * (row_bytes(d_k, d_v) + kSplitTokens * 6 + 16)) + panel_bytes(d_k) + kAlignmentSlack;
  set_threads(plan, threads);
  return plan;
}

}  // namespace

SelectivePlan plan_selective(const SelectiveVParams& params, int64_t max_keys, int64_t threads) {
  const AttentionParams& p = params.attention;
  SelectivePlan plan;
  plan.dense = plan_split(p.heads, p.batch, p.s_q, max_keys, p.d_k, p.d_v, p.q.dtype, p.causal, threads);
  const int64_t groups = p.batch * plan.dense.groups, rows = plan.dense.rows;
  // As few chunks as keep the threads busy: each leaves candidates behind, and none shorter than the others' overhead.
  plan.chunk_splits = std::max(ceil_div(plan.dense.splits * groups, 4 * std::max<int64_t>(1, threads)), kChunkSplits);
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

AttentionPlan plan_attention(const HeadGroups& heads, int64_t batch, int64_t s_q, int64_t max_keys, int64_t d_k,
                             int64_t d_v, DType dtype, bool causal, int64_t threads) {
  if (s_q <= kMaxSplitQueries && heads.q_per_group() * s_q <= kMaxSplitRows)
    return plan_split(heads, batch, s_q, max_keys, d_k, d_v, dtype, causal, threads);

  AttentionPlan plan = common_plan(heads, batch, s_q, max_keys, d_k, d_v, dtype, causal);
  plan.kernel = AttentionKernel::block;
  const int64_t group_heads = heads.q_per_group();
  plan.block_q = std::min(kMaxBlockQ, ceil_div(s_q, 12) * 12);
  plan.heads_per_item = std::min<int64_t>(group_heads, 8);
  while (plan.heads_per_item > 1 && plan.heads_per_item * plan.block_q * row_bytes(d_k, d_v) > kBlockBytes)
    --plan.heads_per_item;
  const auto items = [&] {
    return batch * plan.groups * ceil_div(group_heads, plan.heads_per_item) * ceil_div(s_q, plan.block_q);
  };
  // Enough items to keep every thread busy to the end: first fewer heads, then fewer queries.
  while (plan.heads_per_item > 1 && items() < 4 * threads) plan.heads_per_item = ceil_div(plan.heads_per_item, 2);
  while (plan.block_q > 24 && items() < 4 * threads) plan.block_q -= 12;
  plan.head_chunks = ceil_div(group_heads, plan.heads_per_item);
  plan.items = items();
  plan.scratch_bytes = aligned(plan.heads_per_item * plan.block_q * (row_bytes(d_k, d_v) + 16)) + panel_bytes(d_k) +
                       aligned(kKeyTile * row_bytes(d_k, d_v)) + aligned(kScoreRows * kKeyTile * 6) + kAlignmentSlack;
  set_threads(plan, threads);
  return plan;
}

}  // namespace diffqkv
