#include "plan/cpu/flash_attention_backward.h"

#include <algorithm>

#include "plan/cost.h"
#include "plan/cpu/scratch.h"

namespace diffqkv {
namespace {

// Panels of K and V, rows of K, and the gradients of both stay in the L2 cache.
constexpr int64_t kBlockBytes = 448 * 1024;

// Bytes for panels, rows and gradients of the keys, and per query for its rows, its gradient and the tiles of P and dS.
int64_t scratch_of(const FlashAttentionBackwardPlan& plan, int64_t d_k, int64_t d_v) {
  const int64_t keys = 4 * plan.block_k * (3 * d_k + 2 * d_v + 2 * kLanes) + 2 * panel_bytes(std::max(d_k, d_v));
  const int64_t queries = 4 * plan.block_q * (3 * d_k + 2 * d_v + 5 * kLanes);
  const int64_t tiles = 4 * (2 * kScoreRows + 3 * plan.block_q) * kFlashAttentionBackwardStride;
  return aligned(keys) + aligned(queries) + aligned(tiles) + kAlignmentSlack;
}

}  // namespace

FlashAttentionBackwardPlan plan_flash_attention_backward(const AttentionParams& p, int64_t threads) {
  FlashAttentionBackwardPlan plan;
  plan.groups = p.heads.groups();
  // Smaller blocks pay more to walk the queries.
  plan.block_k = kMaxFlashAttentionBackwardKeys;
  while (plan.block_k > 2 * kPanelTokens && 4 * plan.block_k * (3 * p.d_k + 2 * p.d_v) > kBlockBytes) plan.block_k /= 2;
  plan.key_blocks = ceil_div(p.s_k, plan.block_k);
  plan.block_q = kFlashAttentionBackwardQueries;
  plan.query_blocks = ceil_div(p.s_q, plan.block_q);
  plan.flops = attention_backward_flops(p);
  if (p.q.dtype == DType::f64) {
    plan.items = p.batch * plan.groups;
  } else {
    plan.items = p.batch * plan.groups * plan.key_blocks;
    plan.scratch_bytes = scratch_of(plan, p.d_k, p.d_v);
    if (p.q.dtype != DType::f32) plan.dq_floats = p.total_queries() * p.heads.n_q * p.d_k;
  }
  plan.threads = useful_threads(plan.flops, plan.items, threads);
  return plan;
}

}  // namespace diffqkv
