#include <algorithm>

#include "ops/arguments.h"
#include "ops/ops.h"

namespace diffqkv {
namespace {

// Indices take so many places behind those that the cache can fill: 1 GiB.
constexpr int64_t kMostIndices = int64_t{1} << 27;

}  // namespace

SelectiveCall selective_call(DIFFQKV_SELECTIVE_PARAMETERS) {
  DIFFQKV_CHECK(top_k > 0, "top_k: got ", top_k, ", want 1 or more");
  DIFFQKV_CHECK(tail >= 0 && tail <= 2, "tail: got ", tail, ", want 0 (drop), 1 (renorm) or 2 (mean)");
  DIFFQKV_CHECK(keep_first >= 0, "keep_first: got ", keep_first, ", want 0 or more");
  DIFFQKV_CHECK(keep_last >= 0, "keep_last: got ", keep_last, ", want 0 or more");
  DIFFQKV_CHECK(!max_error || *max_error >= 0, "max_error: got ", *max_error, ", want 0 or more");
  SelectiveCall call;
  call.cached = cached_attention(q, k_cache, v_cache, cache_seqlens, cache_start, block_table, softmax_scale, k_layout);
  const AttentionParams& a = call.cached.params;
  SelectiveVAttentionParams& p = call.params;
  const int64_t rows = std::max<int64_t>(1, a.batch * a.heads.n_q * a.s_q);
  const int64_t most = std::max(a.s_k, kMostIndices / rows);
  DIFFQKV_CHECK(!return_indices || top_k <= most, "top_k: got ", top_k, ", want 1 to ", most,
                " where indices are asked for");
  // No row can use more than there are.
  p.top_k = std::min(top_k, std::max<int64_t>(1, a.s_k));
  p.keep_first = std::min(keep_first, a.s_k);
  p.keep_last = std::min(keep_last, a.s_k);
  p.indices_per_row = return_indices ? top_k : 0;
  p.tail = static_cast<Tail>(tail);
  p.want_bound = return_bound || max_error;
  if (max_error) p.max_error = static_cast<float>(*max_error);
  if (v_stats) {
    check_v_stats(*v_stats, a.batch, a.heads.n_v, a.d_v, "q", q);
    p.v_stats = static_cast<const float*>(v_stats->data_ptr());
  }
  return call;
}

void SelectiveCall::allocate(const Tensor& q) {
  cached.allocate(q);
  params.attention = cached.params;
  const AttentionParams& a = params.attention;
  const auto per_row = [&](ScalarType dtype) {
    return torch::stable::new_empty(q, {a.batch, a.heads.n_q, a.s_q}, dtype);
  };
  kept_mass = per_row(ScalarType::Float), rows_used = per_row(ScalarType::Int);
  error_bound = per_row(ScalarType::Float);
  indices = torch::stable::new_empty(q, {a.batch, a.heads.n_q, a.s_q, params.indices_per_row}, ScalarType::Long);
  params.kept_mass = static_cast<float*>(kept_mass.data_ptr());
  params.rows_used = static_cast<int32_t*>(rows_used.data_ptr());
  params.error_bound = static_cast<float*>(error_bound.data_ptr());
  params.indices = params.indices_per_row > 0 ? static_cast<int64_t*>(indices.data_ptr()) : nullptr;
}

SelectiveResults selective_v_attention_cpu(DIFFQKV_SELECTIVE_PARAMETERS) {
  SelectiveCall call = selective_call(DIFFQKV_SELECTIVE_ARGUMENTS);
  const int64_t max_keys = check_cached_contents(call.cached, cache_seqlens, cache_start, block_table);
  call.allocate(q);
  const SelectiveVAttentionPlan plan = plan_selective_v_attention(call.params, max_keys, torch_threads());
  Tensor workspace =
      torch::stable::new_empty(q, {cpu::selective_v_attention_workspace(call.params, plan)}, ScalarType::Byte);
  cpu::selective_v_attention(call.params, plan, workspace.data_ptr(), parallel_on_torch);
  return call.results();
}

}  // namespace diffqkv
