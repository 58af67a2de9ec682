#include <algorithm>
#include <cmath>

#include "ops/arguments.h"
#include "ops/ops.h"

namespace diffqkv {

std::tuple<Tensor, Tensor> flash_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                               std::optional<double> softmax_scale,
                                               const std::optional<Tensor>& kv_start,
                                               const std::optional<Tensor>& kv_end) {
  check_rank("q", q, 4, "[b, n_q, s_q, d_k]");
  check_rank("k", k, 4, "[b, n_k, s_k, d_k]");
  check_rank("v", v, 4, "[b, n_v, s_k, d_v]");
  check_floating("q", q);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_same_dtype(name, t, "q", q);
    check_same_device(name, t, "q", q);
    check_size(name, t, 0, q.size(0), "batch entries of q");
  }
  check_size("k", k, 3, q.size(3), "d_k of q");
  check_size("v", v, 2, k.size(2), "tokens of k");
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"q", q}, {"k", k}, {"v", v}})
    check_unit_last_stride(name, t);

  AttentionParams p;
  p.heads = {q.size(1), k.size(1), v.size(1)};
  check_heads(p.heads);
  p.batch = q.size(0);
  p.s_q = q.size(2);
  p.s_k = k.size(2);
  p.d_k = q.size(3);
  p.d_v = v.size(3);
  check_head_dim("q", p.d_k);
  check_head_dim("v", p.d_v);
  if (kv_start) check_per_entry("kv_start", *kv_start, p.batch, q);
  if (kv_end) check_per_entry("kv_end", *kv_end, p.batch, q);

  Tensor out = torch::stable::new_empty(q, {p.batch, p.heads.n_q, p.s_q, p.d_v});
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads.n_q, p.s_q}, ScalarType::Float);
  p.q = token_view(q);
  p.k = kv_view_of_heads(k, p.heads.k_per_group());
  p.v = kv_view_of_heads(v, p.heads.v_per_group());
  p.out = token_view(out);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.kv_start = kv_start ? static_cast<const int32_t*>(kv_start->data_ptr()) : nullptr;
  p.kv_end = kv_end ? static_cast<const int32_t*>(kv_end->data_ptr()) : nullptr;
  p.paging.page_size = p.s_k;
  p.softmax_scale = static_cast<float>(softmax_scale.value_or(1.0 / std::sqrt(double(p.d_k))));
  p.causal = causal;
  run_attention(p, p.s_k, q);
  return {out, lse};
}

void run_attention(const AttentionParams& p, int64_t max_keys, const Tensor& like) {
  const AttentionPlan plan =
      plan_attention(p.heads, p.batch, p.s_q, max_keys, p.d_k, p.d_v, p.q.dtype, p.causal, torch_threads());
  Tensor workspace = torch::stable::new_empty(like, {cpu::attention_workspace(plan)}, ScalarType::Byte);
  cpu::attention(p, plan, workspace.data_ptr(), parallel_on_torch);
}

}  // namespace diffqkv
