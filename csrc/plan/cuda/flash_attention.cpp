#include "plan/cuda/flash_attention.h"

#include <algorithm>

#include "params/arithmetic.h"
#include "plan/cost.h"
#include "plan/cuda/rows_aligned.h"
#include "plan/cuda/tile_stride.h"

namespace diffqkv {
namespace {

constexpr int64_t shared_bytes(const FlashAttentionVariant& v, int64_t stages) {
  const int64_t elements =
      v.block_m() * tile_stride(v.d_k) + stages * v.block_n * (tile_stride(v.d_k) + tile_stride(v.d_v));
  return elements * 2 + 2 * v.block_n * kFlashAttentionRowBytes + kFlashAttentionBlockBytes;
}

void plan_tiles(const AttentionParams& p, const DeviceFacts& facts, CudaFlashAttentionPlan& plan) {
  while (!kFlashAttentionVariants[++plan.variant].holds(p.d_k, p.d_v)) {
  }
  const FlashAttentionVariant& v = kFlashAttentionVariants[plan.variant];
  const auto blocks_with = [&](int64_t stages) {
    const int64_t bytes = shared_bytes(v, stages);
    if (bytes > facts.shared_per_block) return int64_t{0};
    return std::min<int64_t>(v.blocks, facts.shared_per_multiprocessor / (bytes + kSystemSharedBytes));
  };
  // Blocks that hide each other's waits are worth more than a second stage.
  plan.stages = blocks_with(2) >= blocks_with(1) ? 2 : 1;
  plan.features = p.softcap > 0 || p.dropout.threshold > 0;
  plan.block_m = v.block_m();
  plan.block_n = v.block_n;
  plan.threads = 32 * v.warps;
  plan.shared_bytes = shared_bytes(v, plan.stages);
  plan.aligned = rows_aligned(p.q, 2) && rows_aligned(p.k, 2) && rows_aligned(p.v, 2);
  plan.out_aligned = rows_aligned(p.out, 2);
}

void plan_plain(const AttentionParams& p, CudaFlashAttentionPlan& plan) {
  plan.block_m = kPlainWarps;
  plan.block_n = kPlainKeys;
  plan.threads = 32 * kPlainWarps;
  const int64_t elements = kPlainWarps * p.d_k + kPlainKeys * (std::max(p.d_k, p.d_v) | 1);
  plan.shared_bytes = kFlashAttentionBlockBytes + elements * dtype_size(p.q.dtype);
}

}  // namespace

CudaFlashAttentionPlan plan_cuda_flash_attention(const AttentionParams& p, const DeviceFacts& facts) {
  CudaFlashAttentionPlan plan;
  if (dtype_size(p.q.dtype) == 2)
    plan_tiles(p, facts, plan);
  else
    plan_plain(p, plan);
  plan.query_blocks = ceil_div(p.s_q, plan.block_m);
  plan.blocks = p.batch * plan.query_blocks * p.heads.n_q;
  const AttentionCost cost = attention_cost(p, p.s_k);
  plan.flops = cost.flops, plan.bytes = cost.bytes;
  return plan;
}

}  // namespace diffqkv
