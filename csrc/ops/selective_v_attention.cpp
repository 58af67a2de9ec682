#include "ops/arguments.h"
#include "ops/ops.h"

namespace diffqkv {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_v_attention_cpu(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cache_seqlens, int64_t top_k,
    int64_t tail, int64_t keep_first, int64_t keep_last, const std::optional<Tensor>& v_stats,
    const std::optional<Tensor>& cache_start, const std::optional<Tensor>& block_table,
    std::optional<double> softmax_scale, int64_t k_layout, std::optional<double> max_error, bool return_bound) {
  DIFFQKV_CHECK(top_k > 0, "top_k: got ", top_k, ", want 1 or more");
  DIFFQKV_CHECK(tail >= 0 && tail <= 2, "tail: got ", tail, ", want 0 (drop), 1 (renorm) or 2 (mean)");
  DIFFQKV_CHECK(keep_first >= 0, "keep_first: got ", keep_first, ", want 0 or more");
  DIFFQKV_CHECK(keep_last >= 0, "keep_last: got ", keep_last, ", want 0 or more");
  DIFFQKV_CHECK(!max_error || *max_error >= 0, "max_error: got ", *max_error, ", want 0 or more");
  CachedAttention call =
      cached_attention_cpu(q, k_cache, v_cache, cache_seqlens, cache_start, block_table, softmax_scale, k_layout);
  const AttentionParams& a = call.params;
  SelectiveVParams p;
  p.attention = a;
  p.top_k = top_k;
  p.keep_first = keep_first;
  p.keep_last = keep_last;
  p.tail = static_cast<Tail>(tail);
  p.want_bound = return_bound || max_error;
  if (max_error) p.max_error = static_cast<float>(*max_error);
  if (v_stats) {
    check_v_stats(*v_stats, a.batch, a.heads.n_v, a.d_v, "q", q);
    p.v_stats = static_cast<const float*>(v_stats->data_ptr());
  }
  const auto per_row = [&](ScalarType dtype) {
    return torch::stable::new_empty(q, {a.batch, a.heads.n_q, a.s_q}, dtype);
  };
  Tensor kept_mass = per_row(ScalarType::Float), rows_used = per_row(ScalarType::Int);
  Tensor error_bound = per_row(ScalarType::Float);
  Tensor indices = torch::stable::new_empty(q, {a.batch, a.heads.n_q, a.s_q, top_k}, ScalarType::Long);
  p.kept_mass = static_cast<float*>(kept_mass.data_ptr());
  p.rows_used = static_cast<int32_t*>(rows_used.data_ptr());
  p.error_bound = static_cast<float*>(error_bound.data_ptr());
  p.indices = static_cast<int64_t*>(indices.data_ptr());

  const SelectivePlan plan = plan_selective(p, call.max_keys, torch_threads());
  Tensor workspace = torch::stable::new_empty(q, {cpu::selective_v_workspace(p, plan)}, ScalarType::Byte);
  cpu::selective_v_attention(p, plan, workspace.data_ptr(), parallel_on_torch);
  return {call.out, call.lse, kept_mass, indices, rows_used, error_bound};
}

}  // namespace diffqkv
