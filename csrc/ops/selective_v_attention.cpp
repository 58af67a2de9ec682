#include <algorithm>

#include "ops/cached_attention.h"
#include "ops/views.h"

namespace diffqkv {
namespace {

struct SelectiveVAttentionArguments : ArgumentGroup {
  CachedTensors tensors = next<CachedTensors>();
  int64_t top_k = next<int64_t>();
  int64_t tail = next<int64_t>();
  int64_t keep_first = next<int64_t>();
  int64_t keep_last = next<int64_t>();
  std::optional<Tensor> v_stats = next<std::optional<Tensor>>();
  CacheOptions cache = next<CacheOptions>();
  std::optional<double> max_error = next<std::optional<double>>();
  bool return_bound = next<bool>();
  bool return_indices = next<bool>();
};

// Indices take so many places behind those that the cache can fill: 1 GiB.
constexpr int64_t kMostIndices = int64_t{1} << 27;

void check_ranges(const SelectiveVAttentionArguments& a) {
  DIFFQKV_CHECK(!a.max_error || *a.max_error >= 0, "max_error: got ", text_of(*a.max_error), ", want a number >= 0");
  check_at_least("top_k", a.top_k, 1);
  check_at_least("keep_first", a.keep_first, 0);
  check_at_least("keep_last", a.keep_last, 0);
  DIFFQKV_CHECK(a.tail >= 0 && a.tail <= 2, "tail: got ", a.tail, ", want 0 (drop), 1 (renorm) or 2 (mean)");
}

void check_indices(const SelectiveVAttentionArguments& a, const AttentionParams& p) {
  const int64_t rows = std::max<int64_t>(1, p.batch * p.heads.n_q * p.s_q);
  const int64_t most = std::max(p.s_k, kMostIndices / rows);
  DIFFQKV_CHECK(!a.return_indices || a.top_k <= most, "top_k: got ", a.top_k, ", want 1 to ", most,
                " where indices are asked for");
}

// Fills all but the attention and the results.
SelectiveVAttentionParams params_of(const SelectiveVAttentionArguments& a, int64_t capacity) {
  SelectiveVAttentionParams p;
  // No row can use more than there are.
  p.top_k = std::min(a.top_k, std::max<int64_t>(1, capacity));
  p.keep_first = std::min(a.keep_first, capacity);
  p.keep_last = std::min(a.keep_last, capacity);
  p.indices_per_row = a.return_indices ? a.top_k : 0;
  p.tail = static_cast<Tail>(a.tail);
  p.want_bound = a.return_bound || a.max_error;
  if (a.max_error) p.max_error = static_cast<float>(*a.max_error);
  p.v_stats = data_of<const float>(a.v_stats);
  return p;
}

// -> out, lse, kept_mass, indices, rows_used, error_bound
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_v_attention(
    const SelectiveVAttentionArguments& a) {
  const Tensor& q = a.tensors.q;
  const Device device("selective_v_attention", q);
  TensorChecks checks("q", q, kFloatingDtypes);
  check_ranges(a);
  CachedAttention attention(device, checks, a.tensors, a.cache);
  check_indices(a, attention.params);
  if (a.v_stats) check_v_stats(checks, *a.v_stats);
  attention.check_contents();

  attention.allocate();
  SelectiveVAttentionParams p = params_of(a, attention.params.s_k);
  p.attention = attention.params;
  const int64_t batch = p.attention.batch, n_q = p.attention.heads.n_q, s_q = p.attention.s_q;
  using torch::stable::new_empty;
  const Tensor kept_mass = new_empty(q, {batch, n_q, s_q}, ScalarType::Float);
  const Tensor indices = new_empty(q, {batch, n_q, s_q, p.indices_per_row}, ScalarType::Long);
  const Tensor rows_used = new_empty(q, {batch, n_q, s_q}, ScalarType::Int);
  const Tensor error_bound = new_empty(q, {batch, n_q, s_q}, ScalarType::Float);
  p.kept_mass = data_of<float>(kept_mass);
  p.indices = p.indices_per_row > 0 ? data_of<int64_t>(indices) : nullptr;
  p.rows_used = data_of<int32_t>(rows_used);
  p.error_bound = data_of<float>(error_bound);
  device.run(p);
  return {attention.out, attention.lse, kept_mass, indices, rows_used, error_bound};
}

// k_layout: 0 rows, 1 panels. tail: 0 drop, 1 renorm, 2 mean. error_bound is +inf without return_bound, and indices are
// [b, n_q, s_q, 0] without return_indices.
STABLE_TORCH_LIBRARY_FRAGMENT(diffqkv, m) {
  m.def(
      "selective_v_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, int top_k, *, int tail=0, "
      "int keep_first=0, int keep_last=0, Tensor? v_stats=None, Tensor? cache_start=None, Tensor? block_table=None, "
      "float? softmax_scale=None, int k_layout=0, float? max_error=None, bool return_bound=False, "
      "bool return_indices=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
DIFFQKV_REGISTER(selective_v_attention)

}  // namespace
}  // namespace diffqkv
