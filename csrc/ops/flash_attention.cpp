// Attention over whole sequences, side by side or packed one behind the other, and its gradients.
#include <algorithm>

#include "ops/device.h"
#include "ops/options.h"
#include "ops/views.h"

namespace diffqkv {
namespace {

struct Inputs : ArgumentGroup {
  Tensor q = next<Tensor>();
  Tensor k = next<Tensor>();
  Tensor v = next<Tensor>();
};

struct PackedSequences : ArgumentGroup {
  Tensor cu_seqlens_q = next<Tensor>();
  Tensor cu_seqlens_k = next<Tensor>();
  int64_t max_seqlen_q = next<int64_t>();
  int64_t max_seqlen_k = next<int64_t>();
};

// What a backward op gets: the gradients of the results, the inputs, the results.
struct BackwardTensors : ArgumentGroup {
  Tensor dout = next<Tensor>();
  std::optional<Tensor> dlse = next<std::optional<Tensor>>();
  Inputs inputs = next<Inputs>();
  Tensor out = next<Tensor>();
  Tensor lse = next<Tensor>();
};

using Results = std::tuple<Tensor, Tensor>;                    // out, lse
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dq, dk, dv, dsinks (without sinks: of no elements)

// The queries or the keys of packed sequences, and the names of their arguments.
struct PackedSide {
  const char *cu_seqlens_name, *max_seqlen_name, *tensor_name;
  const Tensor& cu_seqlens;
  int64_t max_seqlen, tokens;
};

int64_t longest_sequence(const PackedSide& side, const Tensor& cu_seqlens_on_host) {
  const char* name = side.cu_seqlens_name;
  const auto* first = data_of<const int32_t>(cu_seqlens_on_host);
  const int64_t batch = cu_seqlens_on_host.size(0) - 1;
  DIFFQKV_CHECK(first[0] == 0, name, ": got ", first[0], " first, want 0");
  int64_t shortest = 0, longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = int64_t{first[b + 1]} - first[b];
    shortest = std::min(shortest, length);
    longest = std::max(longest, length);
  }
  DIFFQKV_CHECK(shortest >= 0, name, ": got an entry of length ", shortest, ", want values that never decrease");
  DIFFQKV_CHECK(first[batch] == side.tokens, name, ": got ", first[batch], " last, want ", side.tokens,
                ", the tokens of ", side.tensor_name);
  DIFFQKV_CHECK(longest <= side.max_seqlen, side.max_seqlen_name, ": got ", side.max_seqlen, ", want at least ",
                longest, ", the longest sequence of ", name);
  return longest;
}

// s_q or s_k: the longest sequence where that is readable, elsewhere what the caller says.
int64_t planned_length(const Device& device, const PackedSide& side) {
  const std::optional<Tensor> on_host = device.readable(side.cu_seqlens);
  return on_host ? device.planned_length(longest_sequence(side, *on_host), side.max_seqlen) : side.max_seqlen;
}

void fill_packed(const Device& device, TensorChecks& checks, const PackedSequences& packed, AttentionParams& p) {
  checks.vector("cu_seqlens_q", packed.cu_seqlens_q, {ScalarType::Int}, "b+1");
  DIFFQKV_CHECK(checks.shapes["b+1"] >= 1, "cu_seqlens_q: got shape [0], want [b+1]");
  checks.vector("cu_seqlens_k", packed.cu_seqlens_k, {ScalarType::Int}, "b+1");
  checks.shapes.set("b", checks.shapes["b+1"] - 1);
  check_at_least("max_seqlen_q", packed.max_seqlen_q, 0);
  check_at_least("max_seqlen_k", packed.max_seqlen_k, 0);
  p.packed_queries = checks.shapes["total_q"];
  p.s_q = planned_length(
      device, {"cu_seqlens_q", "max_seqlen_q", "q", packed.cu_seqlens_q, packed.max_seqlen_q, p.packed_queries});
  p.s_k = planned_length(device, {"cu_seqlens_k", "max_seqlen_k", "k", packed.cu_seqlens_k, packed.max_seqlen_k,
                                  checks.shapes["total_k"]});
  p.cu_seqlens_q = data_of<const int32_t>(packed.cu_seqlens_q);
  p.cu_seqlens_k = data_of<const int32_t>(packed.cu_seqlens_k);
  p.paging.first_token = p.cu_seqlens_k;
}

void check_length(const Device& device, const char* name, int64_t tokens) {
  const int64_t most = device.limits().sequence_tokens;
  DIFFQKV_CHECK(tokens <= most, name, ": got ", tokens, " tokens, want up to ", most);
}

// Checks the arguments of a forward call, and fills all but the results and the sinks. packed: null where the sequences
// lie side by side.
AttentionParams checked_params(const Device& device, TensorChecks& checks, const Inputs& inputs,
                               const PackedSequences* packed, const AttentionOptions& options) {
  const Dtypes dtype = {checks.dtype()};
  checks.rows("q", inputs.q, dtype, packed ? "total_q n_q d_k" : "b n_q s_q d_k");
  checks.rows("k", inputs.k, dtype, packed ? "total_k n_k d_k" : "b n_k s_k d_k");
  checks.rows("v", inputs.v, dtype, packed ? "total_k n_v d_v" : "b n_v s_k d_v");
  const Shapes& shapes = checks.shapes;
  AttentionParams p;
  p.heads = {shapes["n_q"], shapes["n_k"], shapes["n_v"]};
  p.d_k = shapes["d_k"];
  p.d_v = shapes["d_v"];
  check_head_dim("q", p.d_k);
  check_head_dim("v", p.d_v);
  check_heads("k", p.heads.n_k, p.heads.n_q);
  check_heads("v", p.heads.n_v, p.heads.n_q);
  if (packed) {
    fill_packed(device, checks, *packed, p);
  } else {
    p.s_q = shapes["s_q"];
    p.s_k = shapes["s_k"];
  }
  p.batch = shapes["b"];
  p.paging.page_size = p.s_k;
  check_length(device, packed ? "max_seqlen_q" : "q", p.s_q);
  check_length(device, packed ? "max_seqlen_k" : "k", p.s_k);
  options.check(checks);
  options.fill(p);
  p.q = token_view(inputs.q);
  p.k = kv_view(inputs.k, p.heads.k_per_group());
  p.v = kv_view(inputs.v, p.heads.v_per_group());
  return p;
}

Results forward(const char* op, const Inputs& inputs, const PackedSequences* packed, const AttentionOptions& options) {
  const Tensor& q = inputs.q;
  const Device device(op, q);
  TensorChecks checks("q", q, kTrainingDtypes);
  AttentionParams p = checked_params(device, checks, inputs, packed, options);

  using torch::stable::new_empty;
  const int64_t n_q = p.heads.n_q, total_q = p.packed_queries;
  const Tensor out = packed ? new_empty(q, {total_q, n_q, p.d_v}) : new_empty(q, {p.batch, n_q, p.s_q, p.d_v});
  const Tensor lse = packed ? new_empty(q, {n_q, total_q}, checks.wide_dtype())
                            : new_empty(q, {p.batch, n_q, p.s_q}, checks.wide_dtype());
  const std::optional<Tensor> sinks = options.logits.wide_sinks(checks.wide_dtype());
  p.out = token_view(out);
  p.lse = lse.data_ptr();
  p.sinks = data_of<const void>(sinks);
  device.run(p);
  return {out, lse};
}

void check_results(TensorChecks& checks, const BackwardTensors& t, bool packed) {
  const Dtypes dtype = {checks.dtype()}, wide_dtype = {checks.wide_dtype()};
  const char* out = packed ? "total_q n_q d_v" : "b n_q s_q d_v";
  const char* lse = packed ? "n_q total_q" : "b n_q s_q";
  checks.tensor("dout", t.dout, dtype, out);
  checks.rows("out", t.out, dtype, out);
  if (t.dlse) checks.tensor("dlse", *t.dlse, wide_dtype, lse);
  checks.contiguous("lse", t.lse, wide_dtype, lse);
}

Gradients backward(const char* op, const BackwardTensors& t, const PackedSequences* packed,
                   const AttentionOptions& options) {
  const Tensor &q = t.inputs.q, &k = t.inputs.k, &v = t.inputs.v;
  const Device device(op, q);
  TensorChecks checks("q", q, kTrainingDtypes);
  FlashAttentionBackwardParams p;
  p.forward = checked_params(device, checks, t.inputs, packed, options);
  check_results(checks, t, packed != nullptr);

  using torch::stable::contiguous;
  using torch::stable::new_empty;
  const std::optional<Tensor> sinks = options.logits.wide_sinks(checks.wide_dtype());
  const Tensor dq = new_empty(q, q.sizes()), dk = new_empty(k, k.sizes()), dv = new_empty(v, v.sizes());
  const Tensor dsinks = new_empty(q, {sinks ? sinks->numel() : 0}, sinks ? checks.wide_dtype() : ScalarType::Float);
  const Tensor dout = has_unit_last_stride(t.dout) ? t.dout : contiguous(t.dout);  // it may be expanded or transposed
  std::optional<Tensor> dlse;
  if (t.dlse) dlse = contiguous(*t.dlse);
  p.forward.sinks = data_of<const void>(sinks);
  p.forward.out = token_view(t.out);
  p.forward.lse = t.lse.data_ptr();
  p.dout = token_view(dout);
  p.dlse = data_of<const void>(dlse);
  p.dq = token_view(dq);
  p.dk = token_view(dk);
  p.dv = token_view(dv);
  p.dsinks = sinks ? dsinks.data_ptr() : nullptr;
  device.run(p);
  return {dq, dk, dv, sinks ? as_dtype(dsinks, options.logits.sinks->scalar_type()) : dsinks};
}

Results flash_attention(const Inputs& inputs, const AttentionOptions& options) {
  return forward("flash_attention", inputs, nullptr, options);
}
Results flash_attention_varlen(const Inputs& inputs, const PackedSequences& packed, const AttentionOptions& options) {
  return forward("flash_attention_varlen", inputs, &packed, options);
}
Gradients flash_attention_backward(const BackwardTensors& tensors, const AttentionOptions& options) {
  return backward("flash_attention_backward", tensors, nullptr, options);
}
Gradients flash_attention_varlen_backward(const BackwardTensors& tensors, const PackedSequences& packed,
                                          const AttentionOptions& options) {
  return backward("flash_attention_varlen_backward", tensors, &packed, options);
}

// A query sees the keys from window_left before its own to window_right behind it (-1: all). Dropout is a function of
// seed and offset. out is [b, n_q, s_q, d_v] or [total_q, n_q, d_v], lse [b, n_q, s_q] or [n_q, total_q], in float32,
// of float64 inputs in float64.
STABLE_TORCH_LIBRARY_FRAGMENT(diffqkv, m) {
  const std::string inputs = "Tensor q, Tensor k, Tensor v, ";
  const std::string backward_tensors = "Tensor dout, Tensor? dlse, " + inputs + "Tensor out, Tensor lse, ";
  const std::string packed = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, ";
  const std::string options =
      "bool causal=False, float? softmax_scale=None, int window_left=-1, int window_right=-1, float softcap=0.0, "
      "Tensor? sinks=None, Tensor? kv_start=None, Tensor? kv_end=None, float dropout_p=0.0, SymInt seed=0, "
      "SymInt offset=0";
  const std::string results = ") -> (Tensor, Tensor)", gradients = ") -> (Tensor, Tensor, Tensor, Tensor)";
  const auto def = [&](const std::string& schema) { m.def(schema.c_str()); };
  def("flash_attention(" + inputs + options + results);
  def("flash_attention_varlen(" + inputs + packed + options + results);
  def("flash_attention_backward(" + backward_tensors + options + gradients);
  def("flash_attention_varlen_backward(" + backward_tensors + packed + options + gradients);
}
DIFFQKV_REGISTER(flash_attention)
DIFFQKV_REGISTER(flash_attention_varlen)
DIFFQKV_REGISTER(flash_attention_backward)
DIFFQKV_REGISTER(flash_attention_varlen_backward)

}  // namespace
}  // namespace diffqkv
