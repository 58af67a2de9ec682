#include <algorithm>

#include "params/arithmetic.h"
#include "plan/cost.h"
#include "plan/cuda/flash_attention.h"
#include "plan/cuda/flash_attention_backward_tiles.h"
#include "plan/cuda/rows_aligned.h"

namespace diffqkv {
namespace {

// CMake compiles the kernels of both ops for the same dimensions.
constexpr bool dimensions_agree() {
  for (int32_t i = 0; i < kFlashAttentionVariantCount; ++i) {
    const FlashAttentionVariant& forward = kFlashAttentionVariants[i];
    const FlashAttentionBackwardVariant& backward = kFlashAttentionBackwardVariants[i];
    if (forward.d_k != backward.d_k || forward.d_v != backward.d_v) return false;
  }
  return true;
}
static_assert(kFlashAttentionBackwardVariantCount == kFlashAttentionVariantCount && dimensions_agree());

// Of the q heads of a group, at most: each may take fp32 sums of all keys' gradients.
constexpr int64_t kMostHeadChunks = 4;

// The most chunks that the q heads of a K or V head are in.
int64_t slots(int64_t chunk_heads, int64_t group_heads, int64_t head_heads) {
  int64_t most = 1;
  for (int64_t first = 0; first < group_heads; first += head_heads)
    most = std::max(most, (first + head_heads - 1) / chunk_heads - first / chunk_heads + 1);
  return most;
}

// A short sequence has few blocks of keys: then the q heads of a group are shared out, which costs workspace for sums.
// The bits of a sum depend on how, so that a sequence counts as if it were alone, whatever the batch.
void share_heads(const HeadGroups& h, int64_t blocks, int64_t wanted, CudaFlashAttentionBackwardPlan& plan) {
  const int64_t group_heads = h.q_per_group();
  if (blocks == 0 || blocks >= wanted) return;
  plan.chunk_heads = ceil_div(group_heads, std::min({group_heads, ceil_div(wanted, blocks), kMostHeadChunks}));
  // Whole heads, if possible: their gradients are complete.
  for (const int64_t whole : {std::max(h.q_per_k(), h.q_per_v()), std::min(h.q_per_k(), h.q_per_v())})
    if (plan.chunk_heads >= whole) {
      plan.chunk_heads -= plan.chunk_heads % whole;
      break;
    }
  plan.chunks = ceil_div(group_heads, plan.chunk_heads);
  plan.k_slots = slots(plan.chunk_heads, group_heads, h.q_per_k());
  plan.v_slots = slots(plan.chunk_heads, group_heads, h.q_per_v());
}

// Blocks that hide each other's waits are worth more than a second stage.
int32_t stages(const DeviceFacts& facts, int64_t bytes_of_one, int64_t bytes_of_two) {
  const auto blocks = [&](int64_t bytes) {
    if (bytes > facts.shared_per_block) return int64_t{0};
    return std::min<int64_t>(kFlashAttentionBackwardBlocks,
                             facts.shared_per_multiprocessor / (bytes + kSystemSharedBytes));
  };
  return blocks(bytes_of_two) >= blocks(bytes_of_one) ? 2 : 1;
}

void plan_tiles(const AttentionParams& p, const DeviceFacts& facts, CudaFlashAttentionBackwardPlan& plan) {
  const FlashAttentionBackwardVariant* v = kFlashAttentionBackwardVariants;
  while (!v->holds(p.d_k, p.d_v)) ++v;
  plan.variant = static_cast<int32_t>(v - kFlashAttentionBackwardVariants);
  plan.features = p.softcap > 0 || p.dropout.threshold > 0;
  plan.threads = 32 * kFlashAttentionBackwardWarps;
  plan.key_stages = stages(facts, key_shared_bytes(*v, 1), key_shared_bytes(*v, 2));
  plan.query_stages = stages(facts, query_shared_bytes(*v, 1), query_shared_bytes(*v, 2));
  plan.key_shared_bytes = key_shared_bytes(*v, plan.key_stages);
  plan.query_shared_bytes = query_shared_bytes(*v, plan.query_stages);

  const HeadGroups& h = p.heads;
  const int64_t blocks = h.groups() * ceil_div(p.s_k, v->keys.rows) * (v->both() ? 1 : 2);
  plan.chunk_heads = h.q_per_group();
  // s_k of packed sequences is that of the longest, and together they have blocks enough.
  if (p.cu_seqlens_k == nullptr)
    share_heads(h, blocks, int64_t{kFlashAttentionBackwardBlocks} * facts.multiprocessors, plan);
  plan.key_blocks = p.batch * blocks * plan.chunks;
  plan.query_blocks = p.batch * h.n_q * ceil_div(p.s_q, v->queries.rows);
  const int64_t k_sums = plan.k_slots > 1 ? p.batch * h.n_k * p.s_k * p.d_k : 0;
  const int64_t v_sums = plan.v_slots > 1 ? p.batch * h.n_v * p.s_k * p.d_v : 0;
  plan.k_sum_blocks = ceil_div(k_sums, kSlotSumWidth * kSlotSumThreads);
  plan.v_sum_blocks = ceil_div(v_sums, kSlotSumWidth * kSlotSumThreads);
  plan.partial_k = round_up(plan.workspace_bytes, 256);
  plan.partial_v = plan.partial_k + round_up(4 * k_sums * plan.k_slots, 256);
  plan.workspace_bytes = plan.partial_v + 4 * v_sums * plan.v_slots;
}

}  // namespace

CudaFlashAttentionBackwardPlan plan_cuda_flash_attention_backward(const FlashAttentionBackwardParams& bp,
                                                                  const DeviceFacts& facts) {
  const AttentionParams& p = bp.forward;
  CudaFlashAttentionBackwardPlan plan;
  plan.flops = attention_backward_flops(p);
  const int64_t rows = p.total_queries() * p.heads.n_q, element = dtype_size(p.q.dtype);
  plan.aligned = rows_aligned(p.q, element) && rows_aligned(p.k, element) && rows_aligned(p.v, element) &&
                 rows_aligned(p.out, element) && rows_aligned(bp.dout, element);
  plan.row_blocks = ceil_div(rows, kRowSumThreads / row_sum_lanes(p.d_v, element));
  plan.workspace_bytes = rows * 2 * std::max<int64_t>(4, element);
  if (element == 2) {
    plan_tiles(p, facts, plan);
    return plan;
  }
  constexpr int64_t kWarps = kPlainFlashAttentionBackwardThreads / 32;
  plan.threads = kPlainFlashAttentionBackwardThreads;
  plan.key_blocks = ceil_div(p.batch * p.heads.n_k * p.s_k, kWarps);
  plan.value_blocks = ceil_div(p.batch * p.heads.n_v * p.s_k, kWarps);
  plan.query_blocks = ceil_div(p.batch * p.heads.n_q * p.s_q, kWarps);
  return plan;
}

}  // namespace diffqkv
