#include "ops/cached_attention.h"

#include "ops/views.h"

namespace diffqkv {
namespace {

// Fills all but the results and the options of decode_attention.
AttentionParams params_of(const CachedTensors& tensors, const CacheOptions& options, const CacheArguments& cache) {
  AttentionParams p;
  p.heads = {tensors.q.size(1), cache.heads.n_k, cache.heads.n_v};
  p.batch = tensors.q.size(0);
  p.s_q = tensors.q.size(2);
  p.s_k = cache.capacity;
  p.d_k = cache.d_k;
  p.d_v = cache.d_v;
  p.q = token_view(tensors.q);
  p.k = cache.k;
  p.v = cache.v;
  p.kv_start = data_of<const int32_t>(options.cache_start);
  p.kv_end = data_of<const int32_t>(tensors.cache_seqlens);
  p.length = p.kv_end;
  p.paging = cache.paging;
  p.softmax_scale = softmax_scale_or_default(options.softmax_scale, cache.d_k);
  p.window_right = 0;
  return p;
}

}  // namespace

CachedAttention::CachedAttention(const Device& device, TensorChecks& checks, const CachedTensors& tensors,
                                 const CacheOptions& options)
    : device_(device), tensors_(tensors), options_(options) {
  Shapes of_q;  // apart, for it is the cache that says what d_k is
  of_q.check("q", tensors.q, "b n_q s_q d_k");
  check_unit_last_stride("q", tensors.q);
  const int64_t n_q = of_q["n_q"], d_k = of_q["d_k"];
  checks.shapes.set("b", of_q["b"]);
  checks.shapes.set("n_q", n_q);
  const CacheArguments cache =
      cache_arguments(checks, tensors.k_cache, tensors.v_cache, options.block_table, options.k_layout);
  DIFFQKV_CHECK(cache.k.layout == KLayout::rows || device.limits().panels,
                "k_layout: got panels, want rows: panels are the CPU's layout");
  DIFFQKV_CHECK(d_k == cache.d_k, "q: got head dimension ", d_k, ", want that of k_cache, ", cache.d_k);
  check_heads("k_cache", cache.heads.n_k, n_q);
  check_heads("v_cache", cache.heads.n_v, n_q);
  checks.vector("cache_seqlens", tensors.cache_seqlens, {ScalarType::Int}, "b");
  if (options.cache_start) checks.vector("cache_start", *options.cache_start, {ScalarType::Int}, "b");
  check_softmax_scale(options.softmax_scale);

  params = params_of(tensors, options, cache);
  pages_ = cache.pages;
}

void CachedAttention::check_contents() const {
  const int64_t capacity = params.s_k;
  const std::optional<Tensor> host_lengths = device_.readable(tensors_.cache_seqlens);
  if (!host_lengths) return;
  const std::optional<Tensor> host_starts = device_.readable(options_.cache_start);
  const std::optional<Tensor> host_table = device_.readable(options_.block_table);
  const auto* lengths = data_of<const int32_t>(*host_lengths);
  const auto* starts = data_of<const int32_t>(host_starts);
  Paging paging = params.paging;
  if (host_table) {
    paging.block_table = data_of<const int32_t>(*host_table);
    paging.stride = host_table->stride(0);
  }
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t length = lengths[b], start = starts ? starts[b] : 0;
    DIFFQKV_CHECK(length >= 0 && length <= capacity, "cache_seqlens: got ", length, ", want 0 to the cache's ",
                  capacity, " tokens");
    DIFFQKV_CHECK(start >= 0, "cache_start: got ", start, ", want 0 or more");
    if (host_table && start < length)
      for (int64_t block = start / paging.page_size; block <= (length - 1) / paging.page_size; ++block)
        check_block(paging, pages_, b, block);
  }
}

void CachedAttention::allocate() {
  using torch::stable::new_empty;
  out = new_empty(tensors_.q, {params.batch, params.heads.n_q, params.s_q, params.d_v});
  lse = new_empty(tensors_.q, {params.batch, params.heads.n_q, params.s_q}, ScalarType::Float);
  params.out = token_view(out);
  params.lse = lse.data_ptr();
}

}  // namespace diffqkv
