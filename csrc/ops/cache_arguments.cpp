#include "ops/cache_arguments.h"

#include <algorithm>

#include "ops/views.h"
#include "params/arithmetic.h"

namespace diffqkv {
namespace {

KvView rows_view(const Tensor& cache) {
  const auto strides = cache.strides();
  KvView view;
  view.data = cache.data_ptr();
  view.dtype = dtype_of(cache);
  view.stride_page = strides[0];
  view.stride_group = strides[1];
  view.stride_token = strides[2];
  view.stride_head = strides[3];
  return view;
}

// Panels have no dimension of groups: stride_group depends on the number of heads in one.
KvView panels_view(const Tensor& cache) {
  const auto strides = cache.strides();
  KvView view;
  view.data = cache.data_ptr();
  view.dtype = dtype_of(cache);
  view.layout = KLayout::panels;
  view.stride_page = strides[0];
  view.stride_head = strides[1];
  view.stride_panel = strides[2];
  return view;
}

void check_rows(TensorChecks& checks, const Tensor& k_cache, bool paged) {
  checks.rows("k_cache", k_cache, {checks.dtype()}, paged ? "blocks G s n_k/G d_k" : "b G s n_k/G d_k");
  checks.shapes.set("n_k", checks.shapes["G"] * checks.shapes["n_k/G"]);
}

// Panels of bf16 keep pairs of dimensions together.
void check_panels(TensorChecks& checks, const Tensor& k_cache, bool paged) {
  const Dtypes dtypes = {checks.dtype()};
  const bool pairs = checks.dtype() == ScalarType::BFloat16;
  checks.shapes.set("ceil(s/32)", ceil_div(checks.shapes["s"], kPanelTokens));
  if (pairs) {
    checks.rows("k_cache", k_cache, dtypes, paged ? "blocks n_k ceil(s/32) d_k/2 32 2" : "b n_k ceil(s/32) d_k/2 32 2");
    checks.shapes.set("d_k", 2 * checks.shapes["d_k/2"]);
  } else {
    checks.rows("k_cache", k_cache, dtypes, paged ? "blocks n_k ceil(s/32) d_k 32" : "b n_k ceil(s/32) d_k 32");
  }
  const std::initializer_list<int64_t> of_pairs = {2 * kPanelTokens, 2, 1}, of_dims = {kPanelTokens, 1};
  const auto& inside = pairs ? of_pairs : of_dims;
  DIFFQKV_CHECK(k_cache.numel() == 0 || std::equal(inside.begin(), inside.end(), k_cache.strides().begin() + 3),
                "k_cache: got strides ", list_of(k_cache.strides()), ", want ", list_of(inside), " inside a panel");
}

void check_block_table(TensorChecks& checks, const Tensor& table, bool panels) {
  checks.rows("block_table", table, {ScalarType::Int}, "b max_blocks");
  const int64_t size = checks.shapes["s"], multiple = panels ? kPanelTokens : 1;
  DIFFQKV_CHECK(size >= 1 && size % multiple == 0, "v_cache: got block size ", size, ", want a multiple of ", multiple);
}

HeadGroups checked_heads(const Shapes& shapes) {
  const int64_t groups = shapes["G"], n_k = shapes["n_k"], n_v = shapes["n_v"];
  check_head_dim("k_cache", shapes["d_k"]);
  check_head_dim("v_cache", shapes["d_v"]);
  DIFFQKV_CHECK(n_k >= 1, "k_cache: got ", n_k, " heads, want at least 1");
  DIFFQKV_CHECK(n_v >= 1, "v_cache: got ", n_v, " heads, want at least 1");
  DIFFQKV_CHECK(groups == HeadGroups::gcd(n_k, n_v), "v_cache: got ", groups, " groups for ", n_k, " K and ", n_v,
                " V heads, want gcd(n_k, n_v) = ", HeadGroups::gcd(n_k, n_v), " groups");
  return {n_k * n_v, n_k, n_v};
}

}  // namespace

CacheArguments cache_arguments(TensorChecks& checks, const Tensor& k_cache, const Tensor& v_cache,
                               const std::optional<Tensor>& block_table, int64_t k_layout) {
  Shapes& shapes = checks.shapes;
  const bool panels = k_layout == 1, paged = block_table.has_value();
  checks.rows("v_cache", v_cache, {checks.dtype()}, paged ? "blocks G s n_v/G d_v" : "b G s n_v/G d_v");
  shapes.set("n_v", shapes["G"] * shapes["n_v/G"]);
  DIFFQKV_CHECK(k_layout == 0 || panels, "k_layout: got ", k_layout, ", want 0 (rows) or 1 (panels)");
  if (panels)
    check_panels(checks, k_cache, paged);
  else
    check_rows(checks, k_cache, paged);

  CacheArguments cache;
  cache.heads = checked_heads(shapes);
  if (paged) check_block_table(checks, *block_table, panels);
  cache.d_k = shapes["d_k"];
  cache.d_v = shapes["d_v"];
  cache.pages = shapes[paged ? "blocks" : "b"];
  cache.paging.page_size = shapes["s"];
  cache.capacity = cache.paging.page_size * (paged ? shapes["max_blocks"] : 1);
  if (paged) {
    cache.paging.block_table = data_of<const int32_t>(*block_table);
    cache.paging.stride = block_table->stride(0);
  }
  cache.v = rows_view(v_cache);
  cache.k = panels ? panels_view(k_cache) : rows_view(k_cache);
  if (panels) cache.k.stride_group = cache.k.stride_head * cache.heads.k_per_group();
  return cache;
}

void check_block(const Paging& paging, int64_t pages, int64_t entry, int64_t block) {
  const int64_t page = paging.block_table[entry * paging.stride + block];
  DIFFQKV_CHECK(page >= 0 && page < pages, "block_table: got ", page, ", want 0 to ", pages - 1,
                ", a block of the pool");
}

void check_v_stats(TensorChecks& checks, const Tensor& v_stats) {
  checks.shapes.set("d_v+1", checks.shapes["d_v"] + 1);
  checks.contiguous("v_stats", v_stats, {ScalarType::Float}, "b n_v d_v+1");
}

}  // namespace diffqkv
