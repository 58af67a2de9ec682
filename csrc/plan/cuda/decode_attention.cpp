#include "plan/cuda/decode_attention.h"

#include <algorithm>

#include "params/arithmetic.h"
#include "plan/cost.h"
#include "plan/cuda/rows_aligned.h"
#include "plan/cuda/tile_stride.h"

namespace diffqkv {
namespace {

constexpr int64_t kElementBytes = 2;
constexpr int64_t kLeastSplitTokens = 128, kMostSplitTokens = 1024;
constexpr int64_t kBlocksPerSequence = 128;  // about as many as a large GPU has multiprocessors
constexpr int32_t kTileTokens[] = {64, 32, 16};
constexpr int32_t kMostStages = 4;
constexpr int64_t kBarrierBytes = 8;

// What a block computes, of the chunk that has most of it. per_warp counts the accumulators of the busiest warp,
// tiles_per_v_head the tiles of columns that meet the busiest V head: they decide which kernel size fits.
struct Jobs {
  int64_t columns = 0, tiles = 0, tiles_per_v_head = 0, per_warp = 0, k_heads = 0, v_heads = 0;
};
Jobs jobs_of(const AttentionParams& p, int64_t heads_per_chunk, int64_t chunks) {
  Jobs most;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    // Groups are alike.
    const DecodeAttentionChunk c = DecodeAttentionChunk::of(p.heads, 0, heads_per_chunk, chunk);
    most.columns = std::max(most.columns, c.q_heads * p.s_q);
    most.k_heads = std::max<int64_t>(most.k_heads, c.k_heads);
    most.v_heads = std::max<int64_t>(most.v_heads, c.v_heads);
    for (int64_t v = c.first_v; v < c.first_v + c.v_heads; ++v) {
      const int64_t first = std::max<int64_t>(v * p.heads.q_per_v(), c.first_q) - c.first_q;
      const int64_t end = std::min<int64_t>((v + 1) * p.heads.q_per_v(), c.first_q + c.q_heads) - c.first_q;
      const int64_t tiles = (end * p.s_q - 1) / kDecodeAttentionColumns - first * p.s_q / kDecodeAttentionColumns + 1;
      most.tiles_per_v_head = std::max(most.tiles_per_v_head, tiles);
    }
  }
  most.tiles = ceil_div(most.columns, kDecodeAttentionColumns);
  most.per_warp = ceil_div(most.v_heads * ceil_div(p.d_v, 16), kDecodeAttentionWarps) * most.tiles_per_v_head;
  return most;
}

// One sequence alone has enough blocks to give every multiprocessor one, whatever the batch.
void cut(CudaDecodeAttentionPlan& plan, const AttentionParams& p) {
  const int64_t capacity = std::max<int64_t>(p.s_k, 1), chunks = p.heads.groups() * plan.chunks;
  const int64_t wanted = ceil_div(capacity * chunks, kBlocksPerSequence);
  plan.split_tokens =
      static_cast<int32_t>(std::clamp(round_up(wanted, kTileTokens[0]), kLeastSplitTokens, kMostSplitTokens));
  plan.splits = static_cast<int32_t>(ceil_div(capacity, plan.split_tokens));
  plan.blocks = plan.splits * chunks * p.batch;
}

// Chooses the shared memory of a block, and how many tokens it takes at a time.
void lay_out(CudaDecodeAttentionPlan& plan, const AttentionParams& p, const Jobs& jobs, const DeviceFacts& facts) {
  const int64_t d_k = round_up(p.d_k, 16), d_v = round_up(p.d_v, 16), columns = jobs.tiles * kDecodeAttentionColumns;
  plan.q_stride = tile_stride(static_cast<int32_t>(d_k));
  plan.k_stride = tile_stride(static_cast<int32_t>(jobs.k_heads * d_k));
  plan.v_stride = tile_stride(static_cast<int32_t>(jobs.v_heads * d_v));
  plan.p_stride = tile_stride(static_cast<int32_t>(columns));
  const auto bytes = [&](int64_t tile_tokens, int64_t stages) {
    const int64_t elements =
        columns * plan.q_stride + tile_tokens * plan.p_stride + stages * tile_tokens * (plan.k_stride + plan.v_stride);
    return elements * kElementBytes + columns * (kDecodeAttentionWarps + 3) * 4 + stages * kBarrierBytes;
  };
  // Two blocks to a multiprocessor hide each other's waits; long tiles have fewer of them.
  const int64_t half = facts.shared_per_multiprocessor / 2 - kSystemSharedBytes;
  plan.stages = 0;
  for (const int64_t room : {std::min(half, facts.shared_per_block), facts.shared_per_block})
    for (const int32_t tokens : kTileTokens)
      for (int32_t stages = kMostStages; stages >= 2 && plan.stages == 0; --stages)
        if (bytes(tokens, stages) <= room) plan.tile_tokens = tokens, plan.stages = stages;
  // No GPU lacks room for one head; on a device that does, the launch fails.
  if (plan.stages == 0 && plan.heads_per_chunk == 1) plan.tile_tokens = kTileTokens[2], plan.stages = 2;
  // Where there is no second block, one has to keep more copies under way.
  if (plan.blocks <= facts.multiprocessors && plan.stages > 0)
    while (plan.stages < kMostStages && bytes(plan.tile_tokens, plan.stages + 1) <= facts.shared_per_block)
      ++plan.stages;
  plan.shared_bytes = bytes(plan.tile_tokens, plan.stages);
}

}  // namespace

CudaDecodeAttentionPlan plan_cuda_decode_attention(const AttentionParams& p, const DeviceFacts& facts) {
  CudaDecodeAttentionPlan plan;
  const int64_t group_heads = p.heads.q_per_group();
  // A block takes as many q heads as it can hold, since each chunk reads its K and V heads by itself.
  for (int64_t chunks = 1; plan.stages == 0; ++chunks) {
    const int64_t heads_per_chunk = ceil_div(group_heads, chunks);
    plan.heads_per_chunk = static_cast<int32_t>(heads_per_chunk);
    plan.chunks = static_cast<int32_t>(ceil_div(group_heads, heads_per_chunk));
    const Jobs jobs = jobs_of(p, heads_per_chunk, plan.chunks);
    const auto fits = [&](const DecodeAttentionSize& size) {
      return jobs.tiles <= size.tiles && jobs.per_warp <= size.jobs;
    };
    plan.large = !fits(kSmallDecodeAttention);
    if (plan.large && !fits(kLargeDecodeAttention)) continue;
    plan.columns = static_cast<int32_t>(jobs.columns);
    plan.column_tiles = static_cast<int32_t>(jobs.tiles);
    plan.tiles_per_v_head = static_cast<int32_t>(jobs.tiles_per_v_head);
    cut(plan, p);
    lay_out(plan, p, jobs, facts);
  }
  plan.aligned = rows_aligned(p.k, kElementBytes) && rows_aligned(p.v, kElementBytes);
  // The code for sm_90 alone has the instructions. The large kernel has few rows to copy for its arithmetic.
  plan.bulk = facts.capability == 90 && plan.aligned && !plan.large;

  const int64_t chunks = p.heads.groups() * plan.chunks;
  const int64_t columns = int64_t{plan.column_tiles} * kDecodeAttentionColumns;
  plan.partial_floats = round_up(columns * 2, 4) + columns * p.d_v;
  plan.tickets = chunks * p.batch;
  if (plan.splits > 1) plan.workspace_floats = plan.blocks * plan.partial_floats;

  const AttentionCost cost = attention_cost(p, p.s_k);
  plan.flops = cost.flops, plan.bytes = cost.bytes;
  return plan;
}

}  // namespace diffqkv
