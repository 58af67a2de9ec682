#include <algorithm>
#include <utility>

#include "ops/arguments.h"
#include "ops/cache_slots.h"
#include "ops/ops.h"
#include "plan/cpu/attention.h"

namespace diffqkv {
namespace {

// The bytes from the first element of a tensor to its last.
struct Extent {
  const char* name;
  uintptr_t begin, end;
  bool apart;   // no two elements share memory, as far as sizes and strides tell
  bool filled;  // by elements, without gaps
  bool holds(uintptr_t at) const { return begin <= at && at < end; }
};
Extent extent_of(const char* name, const Tensor& t) {
  constexpr int kMostDims = 6;
  std::pair<int64_t, int64_t> steps[kMostDims];  // (stride, size), by stride
  int n = 0;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) > 1) steps[n++] = {t.stride(i), t.size(i)};
  std::sort(steps, steps + n);
  // Each dimension has to step over all that the smaller ones reach.
  int64_t reach = 0;
  bool apart = true;
  for (int i = 0; i < n; ++i) {
    apart &= steps[i].first > reach;
    reach += (steps[i].second - 1) * steps[i].first;
  }
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  return {name, begin, begin + uintptr_t((reach + 1) * dtype_size(dtype_of(t))), apart, reach + 1 == t.numel()};
}

// That what is written has one place for each element, which nothing else of these tensors takes. Tensors that are
// interleaved, in memory of which neither fills its part, are believed.
void check_memory(const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& v_stats, const Tensor& k,
                  const Tensor& v) {
  Extent all[5];
  int n = 0, written = 0;
  const auto add = [&](const char* name, const Tensor& t) {
    if (t.numel() > 0) all[n++] = extent_of(name, t);
  };
  add("k_cache", k_cache), add("v_cache", v_cache);
  if (v_stats) add("v_stats", *v_stats);
  written = n;
  add("k", k), add("v", v);
  for (int i = 0; i < written; ++i) {
    const Extent& x = all[i];
    DIFFQKV_CHECK(x.apart, x.name, ": got elements that share memory, want one place for each: it is written");
    for (int j = i + 1; j < n; ++j) {
      const Extent& y = all[j];
      const bool meet = x.begin == y.begin || (x.filled && (x.holds(y.begin) || x.holds(y.end - 1))) ||
                        (y.filled && (y.holds(x.begin) || y.holds(x.end - 1)));
      DIFFQKV_CHECK(!meet, y.name, ": got memory of ", x.name, ", want its own: ", x.name, " is written");
    }
  }
}

}  // namespace

KvCacheUpdateParams kv_cache_update_params(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                                           const Tensor& v, const Tensor& positions, const std::optional<Tensor>& cos,
                                           const std::optional<Tensor>& sin, const std::optional<Tensor>& block_table,
                                           const std::optional<Tensor>& v_stats, int64_t k_layout) {
  check_rank("k", k, 4, "[b, n_k, s_new, d_k]");
  check_rank("v", v, 4, "[b, n_v, s_new, d_v]");
  const CacheArguments cache = cache_arguments(k_cache, v_cache, block_table, k_layout, k.size(0));

  KvCacheUpdateParams p;
  p.heads = cache.heads;
  p.batch = k.size(0);
  p.s_new = k.size(2);
  p.d_k = cache.d_k;
  p.d_v = cache.d_v;
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_same_dtype(name, t, "k_cache", k_cache);
    check_same_device(name, t, "k_cache", k_cache);
    check_unit_last_stride(name, t);
  }
  check_size("k", k, 1, p.heads.n_k, "K heads of k_cache");
  check_size("k", k, 3, p.d_k, "d_k of k_cache");
  check_size("v", v, 0, p.batch, "batch entries of k");
  check_size("v", v, 1, p.heads.n_v, "V heads of v_cache");
  check_size("v", v, 2, p.s_new, "tokens of k");
  check_size("v", v, 3, p.d_v, "d_v of v_cache");

  const ScalarType index = positions.scalar_type();
  DIFFQKV_CHECK(index == ScalarType::Int || index == ScalarType::Long, "positions: got dtype ", name_of(index),
                ", want int32 or int64");
  check_rank("positions", positions, 2, "[b, s_new]");
  check_size("positions", positions, 0, p.batch, "batch entries of k");
  check_size("positions", positions, 1, p.s_new, "tokens of k");
  check_same_device("positions", positions, "k_cache", k_cache);

  DIFFQKV_CHECK(cos.has_value() == sin.has_value(), cos ? "sin" : "cos", ": got None, want a tensor beside ",
                cos ? "cos" : "sin");
  if (cos) {
    for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"cos", *cos}, {"sin", *sin}}) {
      check_rank(name, t, 3, "[b or 1, s_new, d_rot]");
      DIFFQKV_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == k.scalar_type(), name, ": got dtype ",
                    name_of(t.scalar_type()), ", want float32 or that of k");
      check_same_device(name, t, "k_cache", k_cache);
      DIFFQKV_CHECK(t.size(0) == p.batch || t.size(0) == 1, name, ": got ", t.size(0), " batch entries, want 1 or ",
                    p.batch);
      check_size(name, t, 1, p.s_new, "tokens of k");
      check_unit_last_stride(name, t);
    }
    p.d_rot = cos->size(2);
    DIFFQKV_CHECK(p.d_rot % 2 == 0 && p.d_rot <= p.d_k, "cos: got d_rot = ", p.d_rot,
                  ", want an even number up to d_k = ", p.d_k);
    check_size("sin", *sin, 2, p.d_rot, "d_rot of cos");
    check_same_dtype("sin", *sin, "cos", *cos);
    const int64_t stride_batch = cos->size(0) == 1 ? 0 : cos->stride(0);
    DIFFQKV_CHECK((sin->size(0) == 1 ? 0 : sin->stride(0)) == stride_batch && sin->stride(1) == cos->stride(1),
                  "sin: got other strides, want those of cos");
    p.cos = cos->data_ptr();
    p.sin = sin->data_ptr();
    p.rope_stride_batch = stride_batch;
    p.rope_stride_token = cos->stride(1);
    p.rope_dtype = dtype_of(*cos);
  }
  if (v_stats) {
    check_v_stats(*v_stats, p.batch, p.heads.n_v, p.d_v, "k_cache", k_cache);
    p.v_stats = static_cast<float*>(v_stats->data_ptr());
  }

  check_memory(k_cache, v_cache, v_stats, k, v);

  p.k_new = token_view(k);
  p.v_new = token_view(v);
  p.k_cache = cache.k;
  p.v_cache = cache.v;
  p.positions = positions.data_ptr();
  p.positions_int64 = index == ScalarType::Long;
  p.positions_stride_batch = positions.stride(0);
  p.positions_stride_token = positions.stride(1);
  p.paging = cache.paging;
  p.pages = cache.pages;
  p.capacity = cache.capacity;
  return p;
}

void kv_cache_update_cpu(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& positions,
                         const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                         const std::optional<Tensor>& block_table, std::optional<Tensor> v_stats, int64_t k_layout) {
  const KvCacheUpdateParams p =
      kv_cache_update_params(k_cache, v_cache, k, v, positions, cos, sin, block_table, v_stats, k_layout);
  check_new_token_slots(p);
  cpu::kv_cache_update(p, torch_threads(), parallel_on_torch);
}

}  // namespace diffqkv
