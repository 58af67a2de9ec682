#include "plan/cpu/attention.h"

#include <algorithm>

#include "plan/cost.h"
#include "plan/cpu/scratch.h"

namespace diffqkv {
namespace {

// Queries and accumulators of an item stay in the L2 cache beside a tile of K and V.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kMaxBlockQ = 96;  // a multiple of the 12 and 6 rows of the register tiles
// Above this many rows per group the split kernel's tile of scores outgrows the L2 cache.
constexpr int64_t kMaxSplitRows = 128;
constexpr int64_t kMaxSplitQueries = 16;

// What the plans of all kernels share.
AttentionPlan common_plan(const AttentionParams& p, int64_t max_keys) {
  AttentionPlan plan;
  plan.groups = p.heads.groups();
  plan.rows = p.heads.q_per_group() * p.s_q;
  const AttentionCost cost = attention_cost(p, max_keys);
  plan.flops = cost.flops, plan.bytes = cost.bytes;
  return plan;
}

// Bytes of q and the accumulator of a query row, fp32 at most.
int64_t row_bytes(int64_t d_k, int64_t d_v) { return 4 * (d_k + ceil_div(d_v, 16) * 16); }

}  // namespace

AttentionPlan plan_split_attention(const AttentionParams& p, int64_t max_keys, int64_t threads) {
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

AttentionPlan plan_attention(const AttentionParams& p, int64_t max_keys, int64_t threads) {
  const int64_t group_heads = p.heads.q_per_group();
  // A packed sequence takes the same kernel whatever lies beside it.
  const bool few_rows = p.cu_seqlens_q == nullptr && p.s_q <= kMaxSplitQueries && group_heads * p.s_q <= kMaxSplitRows;
  if (p.q.dtype != DType::f64 && few_rows && p.dropout.threshold == 0)
    return plan_split_attention(p, max_keys, threads);

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

}  // namespace diffqkv
