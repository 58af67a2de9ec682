#include <utility>

#include "ops/cache_arguments.h"
#include "ops/device.h"
#include "ops/registration.h"
#include "ops/rope_arguments.h"
#include "ops/views.h"
#include "params/layout.h"

namespace diffqkv {
namespace {

struct KvCacheUpdateArguments : ArgumentGroup {
  Tensor k_cache = next<Tensor>();
  Tensor v_cache = next<Tensor>();
  Tensor k = next<Tensor>();
  Tensor v = next<Tensor>();
  Tensor positions = next<Tensor>();
  std::optional<Tensor> cos = next<std::optional<Tensor>>();
  std::optional<Tensor> sin = next<std::optional<Tensor>>();
  std::optional<Tensor> block_table = next<std::optional<Tensor>>();
  std::optional<Tensor> v_stats = next<std::optional<Tensor>>();
  int64_t k_layout = next<int64_t>();
};

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
  const auto sizes = t.sizes(), strides = t.strides();
  int n = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] <= 1) continue;
    int at = n++;
    for (; at > 0 && steps[at - 1].first > strides[i]; --at) steps[at] = steps[at - 1];
    steps[at] = {strides[i], sizes[i]};
  }
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

// Everything written has one place for each element, which nothing else of these tensors takes. Tensors that are
// interleaved, in memory of which neither fills its part, are believed.
void check_memory(const KvCacheUpdateArguments& a) {
  Extent all[5];
  int n = 0;
  const auto add = [&](const char* name, const Tensor& t) {
    if (t.numel() > 0) all[n++] = extent_of(name, t);
  };
  add("k_cache", a.k_cache), add("v_cache", a.v_cache);
  if (a.v_stats) add("v_stats", *a.v_stats);
  const int written = n;
  add("k", a.k), add("v", a.v);
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

void check_rope(const TensorChecks& checks, const KvCacheUpdateArguments& a) {
  DIFFQKV_CHECK(a.cos.has_value() == a.sin.has_value(), a.cos ? "sin" : "cos", ": got None, want a tensor, as ",
                a.cos ? "cos" : "sin", " is given");
  if (a.cos) check_rope(checks, *a.cos, *a.sin, checks.shapes["b"], checks.shapes["s_new"], checks.shapes["d_k"]);
}

void fill_positions(KvCacheUpdateParams& p, const Tensor& positions) {
  p.positions = positions.data_ptr();
  p.positions_int64 = positions.scalar_type() == ScalarType::Long;
  p.positions_stride_batch = positions.stride(0);
  p.positions_stride_token = positions.stride(1);
}

KvCacheUpdateParams params_of(const KvCacheUpdateArguments& a, const CacheArguments& cache) {
  KvCacheUpdateParams p;
  p.heads = cache.heads;
  p.batch = a.k.size(0);
  p.s_new = a.k.size(2);
  p.d_k = cache.d_k;
  p.d_v = cache.d_v;
  p.k_new = token_view(a.k);
  p.v_new = token_view(a.v);
  p.k_cache = cache.k;
  p.v_cache = cache.v;
  fill_positions(p, a.positions);
  if (a.cos) {
    p.d_rot = a.cos->size(2);
    p.cos = a.cos->data_ptr();
    p.sin = a.sin->data_ptr();
    p.rope_stride_batch = rope_stride_batch(*a.cos);
    p.rope_stride_token = a.cos->stride(1);
    p.rope_dtype = dtype_of(*a.cos);
  }
  p.paging = cache.paging;
  p.pages = cache.pages;
  p.capacity = cache.capacity;
  p.v_stats = data_of<float>(a.v_stats);
  return p;
}

// Each new token has -1 or a position in a page of the pool, as far as that is readable.
void check_slots(const Device& device, const KvCacheUpdateArguments& a, KvCacheUpdateParams p) {
  const std::optional<Tensor> host_positions = device.readable(a.positions);
  if (!host_positions) return;
  fill_positions(p, *host_positions);
  const std::optional<Tensor> host_table = device.readable(a.block_table);
  if (host_table) {
    p.paging.block_table = data_of<const int32_t>(*host_table);
    p.paging.stride = host_table->stride(0);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t t = 0; t < p.s_new; ++t) {
      const int64_t position = new_token_position(p, b, t);
      DIFFQKV_CHECK(position >= -1 && position < p.capacity, "positions: got ", position, ", want -1 (skip) or 0 to ",
                    p.capacity - 1);
      if (host_table && position >= 0) check_block(p.paging, p.pages, b, position / p.paging.page_size);
    }
  }
}

// On CUDA a token whose position is out of range or unmapped is not written.
void kv_cache_update(const KvCacheUpdateArguments& a) {
  const Device device("kv_cache_update", a.k_cache);
  TensorChecks checks("k_cache", a.k_cache, kFloatingDtypes);
  checks.dtype_and_device("k", a.k, {checks.dtype()});
  checks.dtype_and_device("v", a.v, {checks.dtype()});
  Shapes of_k;  // apart, for it is the cache that says what n_k and d_k are
  of_k.check("k", a.k, "b n_k s_new d_k");
  checks.shapes.set("b", of_k["b"]);
  const CacheArguments cache = cache_arguments(checks, a.k_cache, a.v_cache, a.block_table, a.k_layout);
  checks.shapes.check("k", a.k, "b n_k s_new d_k");
  checks.shapes.check("v", a.v, "b n_v s_new d_v");
  check_unit_last_stride("k", a.k);
  check_unit_last_stride("v", a.v);
  checks.tensor("positions", a.positions, {ScalarType::Int, ScalarType::Long}, "b s_new");
  check_rope(checks, a);
  if (a.v_stats) check_v_stats(checks, *a.v_stats);
  check_memory(a);
  const KvCacheUpdateParams p = params_of(a, cache);
  check_slots(device, a, p);
  device.run(p);
}

// k_layout: 0 rows, 1 panels.
STABLE_TORCH_LIBRARY_FRAGMENT(diffqkv, m) {
  m.def(
      "kv_cache_update(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor positions, *, "
      "Tensor? cos=None, Tensor? sin=None, Tensor? block_table=None, Tensor(c!)? v_stats=None, int k_layout=0) -> ()");
}
DIFFQKV_REGISTER(kv_cache_update)

}  // namespace
}  // namespace diffqkv
