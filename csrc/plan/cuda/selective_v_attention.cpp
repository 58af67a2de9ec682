#include "plan/cuda/selective_v_attention.h"

#include <algorithm>
#include <cmath>

#include "params/selective_v_attention.h"
#include "plan/cuda/rows_aligned.h"

namespace diffqkv {
namespace {

// The largest chunk that still gives every multiprocessor its blocks: few chunks leave few candidates. They are half as
// large in fp32, where the registers are short and K is twice as large beside the candidates.
int32_t chunk_tokens(const AttentionParams& p, const DeviceFacts& facts) {
  const int64_t blocks = p.batch * p.heads.n_k * ceil_div(p.heads.q_per_k() * p.s_q, kSelectiveVAttentionColumns);
  int32_t tokens = (p.k.dtype == DType::f32 ? 2 : 4) * kSelectiveVAttentionQuantum;
  while (tokens > kSelectiveVAttentionQuantum && 2 * blocks * ceil_div(p.s_k, tokens) < 3 * facts.multiprocessors)
    tokens /= 2;
  return tokens;
}

}  // namespace

CudaSelectiveVAttentionPlan plan_cuda_selective_v_attention(const SelectiveVAttentionParams& params,
                                                            const DeviceFacts& facts, int64_t workspace_bytes) {
  const AttentionParams& p = params.attention;
  const int64_t element = dtype_size(p.k.dtype);
  const HeadGroups& heads = p.heads;
  CudaSelectiveVAttentionPlan plan;
  const double scale = std::abs(p.softmax_scale) * kLog2e<double>;
  plan.exp2_scale = std::max(static_cast<float>(scale), 1e-37f);  // 0 times a score of -inf would be NaN
  plan.k_vectors = rows_aligned(p.k, element);
  plan.v_vectors = rows_aligned(p.v, element);

  plan.chunk_tokens = chunk_tokens(p, facts);
  plan.chunks = static_cast<int32_t>(ceil_div(p.s_k, plan.chunk_tokens));
  plan.quanta = static_cast<int32_t>(ceil_div(p.s_k, kSelectiveVAttentionQuantum));
  const int64_t top_k = std::min(params.top_k, p.s_k);
  plan.wanted = static_cast<int32_t>(std::min(p.s_k, top_k * (params.max_error >= 0 ? kMaxAdded : 1)));
  plan.candidates = static_cast<int32_t>(round_up(std::min<int64_t>(plan.chunk_tokens, plan.wanted), 2));
  plan.forced = static_cast<int32_t>(std::min(params.keep_first, p.s_k) + std::min(params.keep_last, p.s_k));
  if (params.needs_v_stats() && params.v_stats == nullptr)
    plan.parts = static_cast<int32_t>(ceil_div(p.s_k, kSelectiveVAttentionPartTokens));

  plan.score_shared = kSelectiveVAttentionColumns * (selective_v_attention_q_bytes(int(p.d_k), int(element)) +
                                                     4 * kSelectiveVAttentionScoreStride) +
                      kSelectiveVAttentionWarps * kSelectiveVAttentionRingBytes;
  // Two blocks a multiprocessor hide each other's latencies.
  const int64_t room = std::min(facts.shared_per_block, facts.shared_per_multiprocessor / 2 - kSystemSharedBytes) -
                       kSelectiveVAttentionGatherBytes;
  const int64_t keys = int64_t{8} * plan.chunks * plan.candidates, list = int64_t{8} * plan.wanted;
  plan.list_in_shared = list <= room / 4;
  plan.keys_in_shared = keys <= room - (plan.list_in_shared ? list : 0);
  plan.gather_shared =
      kSelectiveVAttentionGatherBytes + (plan.list_in_shared ? list : 0) + (plan.keys_in_shared ? keys : 0);

  const int64_t mass_bytes = int64_t{8} * plan.quanta, forced_bytes = int64_t{4} * plan.forced;
  const int64_t list_bytes = plan.list_in_shared ? 0 : list;
  const int64_t query_bytes = heads.n_q * (mass_bytes + keys + forced_bytes + list_bytes);
  const int64_t fit = std::max<int64_t>(1, workspace_bytes / std::max<int64_t>(1, query_bytes));
  plan.queries = std::min(p.s_q, fit);
  plan.entries = std::min(p.batch, std::max<int64_t>(1, fit / std::max<int64_t>(1, p.s_q)));
  const int64_t rows = plan.entries * plan.queries * heads.n_q;
  plan.keys_at = round_up(rows * mass_bytes, 256);
  plan.forced_at = round_up(plan.keys_at + rows * keys, 256);
  plan.list_at = round_up(plan.forced_at + rows * forced_bytes, 256);
  plan.parts_at = round_up(plan.list_at + rows * list_bytes, 256);
  plan.workspace_bytes = plan.parts_at + int64_t{4} * p.batch * heads.n_v * plan.parts * (p.d_v + 1);
  return plan;
}

}  // namespace diffqkv
