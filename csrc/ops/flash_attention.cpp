#include "ops/flash_attention.h"

#include <algorithm>

#include "ops/arguments.h"
#include "ops/ops.h"

namespace diffqkv {
namespace {

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// The longest sequence of one side, whose offsets lie in host memory.
int64_t longest_sequence(const char* name, const Tensor& cu_seqlens, const char* max_name, int64_t most,
                         const char* packed_name, const Tensor& packed) {
  const auto* at = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t batch = cu_seqlens.size(0) - 1;
  DIFFQKV_CHECK(at[0] == 0, name, ": got ", at[0], " first, want 0");
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    DIFFQKV_CHECK(at[b + 1] >= at[b], name, ": got ", at[b + 1], " after ", at[b],
                  ", want numbers that never decrease");
    longest = std::max<int64_t>(longest, at[b + 1] - at[b]);
  }
  DIFFQKV_CHECK(at[batch] == packed.size(0), name, ": got ", at[batch], " last, want ", packed.size(0),
                ", the tokens of ", packed_name);
  DIFFQKV_CHECK(longest <= most, max_name, ": got ", most, ", want at least ", longest, ", the longest sequence of ",
                name);
  return longest;
}
// Checks one side; returns its s_q or s_k.
int64_t checked_length(const char* name, const Tensor& cu_seqlens, int64_t batch, const char* max_name, int64_t most,
                       const char* packed_name, const Tensor& packed) {
  DIFFQKV_CHECK(cu_seqlens.scalar_type() == ScalarType::Int, name, ": got dtype ", name_of(cu_seqlens.scalar_type()),
                ", want int32");
  DIFFQKV_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) == batch + 1, name, ": got shape ", shape_of(cu_seqlens),
                ", want [b + 1] = [", batch + 1, "]");
  DIFFQKV_CHECK(cu_seqlens.is_contiguous(), name, ": got stride ", cu_seqlens.stride(0), ", want 1");
  check_same_device(name, cu_seqlens, "q", packed);
  DIFFQKV_CHECK(most >= 0, max_name, ": got ", most, ", want 0 or more");
  return cu_seqlens.is_cpu() ? longest_sequence(name, cu_seqlens, max_name, most, packed_name, packed) : most;
}

// [batch, heads, tokens, dim], or packed [total, heads, dim].
TokenView queries_view(const Tensor& t) {
  if (t.dim() == 4) return token_view(t);
  return {t.data_ptr(), 0, t.stride(1), t.stride(0), dtype_of(t)};
}
KvView keys_view(const Tensor& t, int64_t heads_per_group) {
  if (t.dim() == 4) return kv_view_of_heads(t, heads_per_group);
  KvView view;
  view.data = t.data_ptr();
  view.stride_group = t.stride(1) * heads_per_group;
  view.stride_head = t.stride(1);
  view.stride_token = t.stride(0);
  view.dtype = dtype_of(t);
  return view;
}

void check_like(const char* name, const Tensor& t, const Tensor& like, const char* like_name, ScalarType dtype) {
  DIFFQKV_CHECK(t.scalar_type() == dtype, name, ": got dtype ", name_of(t.scalar_type()), ", want ", name_of(dtype));
  check_same_device(name, t, like_name, like);
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  DIFFQKV_CHECK(same, name, ": got shape ", shape_of(t), ", want ", shape_of(like), ", that of ", like_name);
}

}  // namespace

void check_sequences(const PackedSequences& host, const Tensor& q, const Tensor& k) {
  longest_sequence("cu_seqlens_q", host.cu_seqlens_q, "max_seqlen_q", host.max_seqlen_q, "q", q);
  longest_sequence("cu_seqlens_k", host.cu_seqlens_k, "max_seqlen_k", host.max_seqlen_k, "k", k);
}

AttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const std::optional<PackedSequences>& packed, AttentionOptions& options) {
  const NamedTensor inputs[] = {{"q", q}, {"k", k}, {"v", v}};
  const char* wants[] = {"[b, n_q, s_q, d_k]",  "[b, n_k, s_k, d_k]",  "[b, n_v, s_k, d_v]",
                         "[total_q, n_q, d_k]", "[total_k, n_k, d_k]", "[total_k, n_v, d_v]"};
  for (int i = 0; i < 3; ++i) check_rank(inputs[i].name, inputs[i].tensor, packed ? 3 : 4, wants[packed ? 3 + i : i]);
  check_differentiable("q", q);
  const int heads_dim = 1, token_dim = packed ? 0 : 2, last = packed ? 2 : 3;
  for (int i = 1; i < 3; ++i) {
    check_same_dtype(inputs[i].name, inputs[i].tensor, "q", q);
    check_same_device(inputs[i].name, inputs[i].tensor, "q", q);
    if (!packed) check_size(inputs[i].name, inputs[i].tensor, 0, q.size(0), "batch entries of q");
  }
  check_size("k", k, last, q.size(last), "d_k of q");
  check_size("v", v, token_dim, k.size(token_dim), "tokens of k");
  for (const auto& [name, t] : inputs) check_unit_last_stride(name, t);

  AttentionParams p;
  p.heads = {q.size(heads_dim), k.size(heads_dim), v.size(heads_dim)};
  check_heads(p.heads);
  p.d_k = q.size(last);
  p.d_v = v.size(last);
  check_head_dim("q", p.d_k);
  check_head_dim("v", p.d_v);
  if (packed) {
    DIFFQKV_CHECK(packed->cu_seqlens_q.dim() == 1 && packed->cu_seqlens_q.size(0) >= 1, "cu_seqlens_q: got shape ",
                  shape_of(packed->cu_seqlens_q), ", want [b + 1]");
    p.batch = packed->cu_seqlens_q.size(0) - 1;
    p.s_q = checked_length("cu_seqlens_q", packed->cu_seqlens_q, p.batch, "max_seqlen_q", packed->max_seqlen_q, "q", q);
    p.s_k = checked_length("cu_seqlens_k", packed->cu_seqlens_k, p.batch, "max_seqlen_k", packed->max_seqlen_k, "k", k);
    p.cu_seqlens_q = static_cast<const int32_t*>(packed->cu_seqlens_q.data_ptr());
    p.cu_seqlens_k = static_cast<const int32_t*>(packed->cu_seqlens_k.data_ptr());
    p.packed_queries = q.size(0);
    p.paging.first_token = p.cu_seqlens_k;
  } else {
    p.batch = q.size(0);
    p.s_q = q.size(2);
    p.s_k = k.size(2);
  }
  p.paging.page_size = p.s_k;
  options.apply(q, p);
  p.q = queries_view(q);
  p.k = keys_view(k, p.heads.k_per_group());
  p.v = keys_view(v, p.heads.v_per_group());
  return p;
}

AttentionResults new_results(const Tensor& q, AttentionParams& p) {
  const bool packed = p.cu_seqlens_q != nullptr;
  using torch::stable::new_empty;
  AttentionResults results = packed ? AttentionResults{new_empty(q, {q.size(0), p.heads.n_q, p.d_v}),
                                                       new_empty(q, {p.heads.n_q, q.size(0)}, wide_dtype(q))}
                                    : AttentionResults{new_empty(q, {p.batch, p.heads.n_q, p.s_q, p.d_v}),
                                                       new_empty(q, {p.batch, p.heads.n_q, p.s_q}, wide_dtype(q))};
  p.out = queries_view(results.out);
  p.lse = results.lse.data_ptr();
  return results;
}

AttentionGradients new_gradients(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                 const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                 const std::optional<PackedSequences>& packed, AttentionOptions& options) {
  FlashAttentionBackwardParams bp;
  AttentionParams& p = bp.forward;
  p = attention_params(q, k, v, packed, options);
  const int64_t last = q.dim() - 1;
  check_rank("out", out, q.dim(), packed ? "[total_q, n_q, d_v]" : "[b, n_q, s_q, d_v]");
  for (int64_t i = 0; i < last; ++i) check_size("out", out, i, q.size(i), "as q");
  check_size("out", out, last, p.d_v, "d_v of v");
  check_same_dtype("out", out, "q", q);
  check_same_device("out", out, "q", q);
  check_unit_last_stride("out", out);
  check_like("dout", dout, out, "out", q.scalar_type());
  check_rank("lse", lse, packed ? 2 : 3, packed ? "[n_q, total_q]" : "[b, n_q, s_q]");
  for (int64_t i = 0; i < lse.dim(); ++i) check_size("lse", lse, i, q.size(packed ? 1 - i : i), "as q");
  DIFFQKV_CHECK(lse.scalar_type() == wide_dtype(q), "lse: got dtype ", name_of(lse.scalar_type()), ", want ",
                name_of(wide_dtype(q)));
  check_same_device("lse", lse, "q", q);
  DIFFQKV_CHECK(lse.is_contiguous(), "lse: got strides with gaps, want a contiguous tensor");
  if (dlse) check_like("dlse", *dlse, lse, "lse", wide_dtype(q));

  using torch::stable::new_empty;
  AttentionGradients call{bp,
                          new_empty(q, q.sizes()),
                          new_empty(k, k.sizes()),
                          new_empty(v, v.sizes()),
                          options.new_dsinks(q),
                          last_stride_is_one(dout) ? dout : torch::stable::contiguous(dout),  // expanded, transposed
                          std::nullopt};
  if (dlse) call.dlse = torch::stable::contiguous(*dlse);
  call.params.forward.out = queries_view(out);
  call.params.forward.lse = lse.data_ptr();
  call.params.dout = queries_view(call.dout);
  call.params.dlse = call.dlse ? call.dlse->data_ptr() : nullptr;
  call.params.dq = queries_view(call.dq);
  call.params.dk = queries_view(call.dk);
  call.params.dv = queries_view(call.dv);
  call.params.dsinks = p.sinks ? call.dsinks.data_ptr() : nullptr;
  return call;
}

namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<PackedSequences>& packed, AttentionOptions options) {
  AttentionParams p = attention_params(q, k, v, packed, options);
  const AttentionResults results = new_results(q, p);
  run_attention(p, p.s_k, q);
  return {results.out, results.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout, const std::optional<Tensor>& dlse,
                                                    const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& out, const Tensor& lse,
                                                    const std::optional<PackedSequences>& packed,
                                                    AttentionOptions options) {
  const AttentionGradients call = new_gradients(dout, dlse, q, k, v, out, lse, packed, options);
  const FlashAttentionBackwardPlan plan = plan_flash_attention_backward(call.params.forward, torch_threads());
  Tensor workspace =
      torch::stable::new_empty(q, {cpu::flash_attention_backward_workspace(call.params, plan)}, ScalarType::Byte);
  cpu::flash_attention_backward(call.params, plan, workspace.data_ptr(), parallel_on_torch);
  return {call.dq, call.dk, call.dv, options.as_sinks(call.dsinks)};
}

}  // namespace

std::tuple<Tensor, Tensor> flash_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                               DIFFQKV_OPTION_PARAMETERS) {
  return forward(q, k, v, std::nullopt, DIFFQKV_OPTION_ARGUMENTS);
}
std::tuple<Tensor, Tensor> flash_attention_varlen_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                      DIFFQKV_PACKED_PARAMETERS, DIFFQKV_OPTION_PARAMETERS) {
  return forward(q, k, v, PackedSequences DIFFQKV_PACKED_ARGUMENTS, DIFFQKV_OPTION_ARGUMENTS);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_backward_cpu(const Tensor& dout,
                                                                        const std::optional<Tensor>& dlse,
                                                                        const Tensor& q, const Tensor& k,
                                                                        const Tensor& v, const Tensor& out,
                                                                        const Tensor& lse, DIFFQKV_OPTION_PARAMETERS) {
  return backward(dout, dlse, q, k, v, out, lse, std::nullopt, DIFFQKV_OPTION_ARGUMENTS);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_varlen_backward_cpu(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, DIFFQKV_PACKED_PARAMETERS, DIFFQKV_OPTION_PARAMETERS) {
  return backward(dout, dlse, q, k, v, out, lse, PackedSequences DIFFQKV_PACKED_ARGUMENTS, DIFFQKV_OPTION_ARGUMENTS);
}

void run_attention(const AttentionParams& p, int64_t max_keys, const Tensor& like) {
  const AttentionPlan plan = plan_attention(p, max_keys, torch_threads());
  Tensor workspace = torch::stable::new_empty(like, {cpu::attention_workspace(plan)}, ScalarType::Byte);
  cpu::attention(p, plan, workspace.data_ptr(), parallel_on_torch);
}

}  // namespace diffqkv
