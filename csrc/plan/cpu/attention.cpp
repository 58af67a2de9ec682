#include "plan/cpu/attention.h"

#include <algorithm>

#include "params/key_range.h"

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

int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// The sum of clamp(first + i, 0, most) over i in [0, count).
double clamped_ramp(double first, double count, double most) {
  const double rises = std::clamp(-first, 0.0, count), flat = std::clamp(most - first, rises, count);
  return (flat - rises) * (first + 0.5 * (rises + flat - 1.0)) + (count - flat) * most;
}
// (query, key) pairs that a window lets through, of a head.
double visible_pairs(const AttentionParams& p, double keys) {
  const double queries = double(p.s_q), position = keys - queries;
  const double ends =
      p.window_right < 0 ? queries * keys : clamped_ramp(position + double(p.window_right) + 1.0, queries, keys);
  const double begins = p.window_left < 0 ? 0.0 : clamped_ramp(position - double(p.window_left), queries, keys);
  return std::max(0.0, ends - begins);
}

}  // namespace

AttentionCost attention_cost(const AttentionParams& p, int64_t max_keys) {
  const HeadGroups& heads = p.heads;
  return {
      2.0 * p.batch * heads.n_q * visible_pairs(p, double(max_keys)) * double(p.d_k + p.d_v),
      double(dtype_size(p.q.dtype)) * p.batch *
          (double(max_keys) * (heads.n_k * p.d_k + heads.n_v * p.d_v) + double(p.s_q) * heads.n_q * (p.d_k + p.d_v))};
}

namespace {

// What both kernels share.
AttentionPlan common_plan(const AttentionParams& p, int64_t max_keys) {
  AttentionPlan plan;
  plan.groups = p.heads.groups();
  plan.rows = p.heads.q_per_group() * p.s_q;
  const AttentionCost cost = attention_cost(p, max_keys);
  plan.flops = cost.flops, plan.bytes = cost.bytes;
  return plan;
}

int64_t useful_threads(double flops, int64_t items, int64_t threads) {
  const int64_t useful = static_cast<int64_t>(flops / kFlopsPerThread);
  return std::clamp<int64_t>(std::min(useful, items), 1, std::max<int64_t>(1, threads));
}

// q and accumulator of a query row, fp32 at most.
int64_t row_bytes(int64_t d_k, int64_t d_v) { return 4 * (d_k + ceil_div(d_v, 16) * 16); }
// A packed panel and the rows it is packed from.
int64_t panel_bytes(int64_t d_k) { return 2 * aligned(4 * kPanelTokens * d_k); }
constexpr int64_t kAlignmentSlack = 4096;
constexpr int64_t kBackwardBytes = 448 * 1024;

// Panels, rows and gradients of the keys; per query its rows, its gradient and the tiles of P and dS.
int64_t backward_scratch(const FlashAttentionBackwardPlan& plan, int64_t d_k, int64_t d_v) {
  const int64_t keys = 4 * plan.block_k * (3 * d_k + 2 * d_v + 2 * kLanes) + 2 * panel_bytes(std::max(d_k, d_v));
  const int64_t queries = 4 * plan.block_q * (3 * d_k + 2 * d_v + 5 * kLanes);
  const int64_t tiles = 4 * (2 * kScoreRows + 3 * plan.block_q) * kBackwardStride;
  return aligned(keys) + aligned(queries) + aligned(tiles) + kAlignmentSlack;
}

AttentionPlan plan_split(const AttentionParams& p, int64_t max_keys, int64_t threads) {
  AttentionPlan plan = common_plan(p, max_keys);
  plan.kernel = AttentionKernel::split;
  plan.splits = std::max<int64_t>(1, ceil_div(max_keys, kSplitTokens));
  plan.items = p.batch * plan.groups * plan.splits;
  if (plan.splits > 1) plan.partial_floats = plan.items * plan.rows * (p.d_v + kPartialHeader);
  plan.scratch_bytes =
      aligned(plan.rows * (row_bytes(p.d_k, p.d_v) + kSplitTokens * 6 + 16)) + panel_bytes(p.d_k) + kAlignmentSlack;
  plan.threads = useful_threads(plan.flops, plan.items, threads);
  return plan;
}

}  // namespace

SelectiveVAttentionPlan plan_selective_v_attention(const SelectiveVAttentionParams& params, int64_t max_keys,
                                                   int64_t threads) {
  const AttentionParams& p = params.attention;
  SelectiveVAttentionPlan plan;
  plan.dense = plan_split(p, max_keys, threads);
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

AttentionPlan plan_attention(const AttentionParams& p, int64_t max_keys, int64_t threads) {
  const int64_t group_heads = p.heads.q_per_group();
  // A packed sequence takes the same kernel whatever lies beside it.
  const bool few_rows = p.cu_seqlens_q == nullptr && p.s_q <= kMaxSplitQueries && group_heads * p.s_q <= kMaxSplitRows;
  if (p.q.dtype != DType::f64 && few_rows && p.dropout.threshold == 0) return plan_split(p, max_keys, threads);

  AttentionPlan plan = common_plan(p, max_keys);
  if (p.q.dtype == DType::f64) {
    plan.kernel = AttentionKernel::plain;
    plan.items = p.batch * p.heads.n_q;
    plan.scratch_bytes = 8 * max_keys;
    plan.threads = useful_threads(plan.flops, plan.items, threads);
    return plan;
  }
  plan.kernel = AttentionKernel::block;
  plan.block_q = std::clamp<int64_t>(ceil_div(p.s_q, 12) * 12, 12, kMaxBlockQ);
  plan.heads_per_item = std::min<int64_t>(group_heads, 8);
  while (plan.heads_per_item > 1 && plan.heads_per_item * plan.block_q * row_bytes(p.d_k, p.d_v) > kBlockBytes)
    --plan.heads_per_item;
  const auto items = [&] {
    return p.batch * plan.groups * ceil_div(group_heads, plan.heads_per_item) * ceil_div(p.s_q, plan.block_q);
  };
  // Enough items to keep every thread busy to the end: first fewer heads, then fewer queries.
  while (plan.heads_per_item > 1 && items() < 4 * threads) plan.heads_per_item = ceil_div(plan.heads_per_item, 2);
  while (plan.block_q > 24 && items() < 4 * threads) plan.block_q -= 12;
  plan.head_chunks = ceil_div(group_heads, plan.heads_per_item);
  plan.items = items();
  plan.scratch_bytes = aligned(plan.heads_per_item * plan.block_q * (row_bytes(p.d_k, p.d_v) + 16)) +
                       panel_bytes(p.d_k) + aligned(kKeyTile * row_bytes(p.d_k, p.d_v)) +
                       aligned(kScoreRows * kKeyTile * 6) + kAlignmentSlack;
  plan.threads = useful_threads(plan.flops, plan.items, threads);
  return plan;
}

FlashAttentionBackwardPlan plan_flash_attention_backward(const AttentionParams& p, int64_t threads) {
  FlashAttentionBackwardPlan plan;
  plan.groups = p.heads.groups();
  // Panels of K and V, rows of K, and the gradients of both stay in the L2 cache; smaller blocks pay more to walk the
  // queries.
  plan.block_k = kMaxBackwardKeys;
  while (plan.block_k > 2 * kPanelTokens && 4 * plan.block_k * (3 * p.d_k + 2 * p.d_v) > kBackwardBytes)
    plan.block_k /= 2;
  plan.key_blocks = ceil_div(p.s_k, plan.block_k);
  plan.block_q = kBackwardQueries;
  plan.query_blocks = ceil_div(p.s_q, plan.block_q);
  const double pairs = visible_pairs(p, double(p.s_k));
  plan.flops = 2.0 * p.batch * p.heads.n_q * pairs * double(3 * p.d_k + 2 * p.d_v);
  if (p.q.dtype == DType::f64) {
    plan.items = p.batch * plan.groups;
  } else {
    plan.items = p.batch * plan.groups * plan.key_blocks;
    plan.scratch_bytes = backward_scratch(plan, p.d_k, p.d_v);
    if (p.q.dtype != DType::f32) plan.dq_floats = p.total_queries() * p.heads.n_q * p.d_k;
  }
  plan.threads = useful_threads(plan.flops, plan.items, threads);
  return plan;
}

}  // namespace diffqkv
