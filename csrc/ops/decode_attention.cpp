#include <algorithm>

#include "ops/arguments.h"
#include "ops/ops.h"

namespace diffqkv {

CachedAttention cached_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                 const Tensor& cache_seqlens, const std::optional<Tensor>& cache_start,
                                 const std::optional<Tensor>& block_table, std::optional<double> softmax_scale,
                                 int64_t k_layout) {
  check_rank("q", q, 4, "[b, n_q, s_q, d_k]");
  check_floating("q", q);
  check_unit_last_stride("q", q);
  check_same_dtype("k_cache", k_cache, "q", q);
  check_same_device("k_cache", k_cache, "q", q);
  DIFFQKV_CHECK(k_layout != 1 || q.is_cpu(), "k_layout: got panels on cuda, want rows: panels are the CPU's layout");
  CachedAttention call;
  call.cache = cache_arguments(k_cache, v_cache, block_table, k_layout, q.size(0));
  const CacheArguments& cache = call.cache;

  AttentionParams& p = call.params;
  p.heads = {q.size(1), cache.heads.n_k, cache.heads.n_v};
  check_heads(p.heads);
  p.batch = q.size(0);
  p.s_q = q.size(2);
  p.s_k = cache.capacity;
  p.d_k = cache.d_k;
  p.d_v = cache.d_v;
  check_size("q", q, 3, p.d_k, "d_k of k_cache");
  check_per_entry("cache_seqlens", cache_seqlens, p.batch, q);
  if (cache_start) check_per_entry("cache_start", *cache_start, p.batch, q);

  p.q = token_view(q);
  p.k = cache.k;
  p.v = cache.v;
  p.kv_start = cache_start ? static_cast<const int32_t*>(cache_start->data_ptr()) : nullptr;
  p.kv_end = static_cast<const int32_t*>(cache_seqlens.data_ptr());
  p.length = p.kv_end;
  p.paging = cache.paging;
  p.softmax_scale = softmax_scale_of(softmax_scale, p.d_k);
  p.window_right = 0;
  return call;
}

int64_t check_cached_contents(const CachedAttention& call, const Tensor& cache_seqlens,
                              const std::optional<Tensor>& cache_start, const std::optional<Tensor>& block_table) {
  CacheArguments cache = call.cache;
  if (block_table) {
    cache.paging.block_table = static_cast<const int32_t*>(block_table->data_ptr());
    cache.paging.stride = block_table->stride(0);
  }
  const auto* lengths = static_cast<const int32_t*>(cache_seqlens.data_ptr());
  const auto* starts = cache_start ? static_cast<const int32_t*>(cache_start->data_ptr()) : nullptr;
  int64_t longest = 0;
  for (int64_t b = 0; b < call.params.batch; ++b) {
    DIFFQKV_CHECK(lengths[b] >= 0 && lengths[b] <= cache.capacity, "cache_seqlens: got ", lengths[b], " for entry ", b,
                  ", want 0 to the cache's ", cache.capacity, " tokens");
    DIFFQKV_CHECK(starts == nullptr || starts[b] >= 0, "cache_start: got ", starts[b], " for entry ", b,
                  ", want 0 or more");
    check_blocks(cache, b, starts ? starts[b] : 0, lengths[b]);
    longest = std::max<int64_t>(longest, lengths[b]);
  }
  return longest;
}

void CachedAttention::allocate(const Tensor& q) {
  out = torch::stable::new_empty(q, {params.batch, params.heads.n_q, params.s_q, params.d_v});
  lse = torch::stable::new_empty(q, {params.batch, params.heads.n_q, params.s_q}, ScalarType::Float);
  params.out = token_view(out);
  params.lse = lse.data_ptr();
}

std::tuple<Tensor, Tensor> decode_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                const Tensor& cache_seqlens, const std::optional<Tensor>& cache_start,
                                                const std::optional<Tensor>& block_table,
                                                std::optional<double> softmax_scale, int64_t k_layout,
                                                int64_t window_left, int64_t window_right, double softcap,
                                                const std::optional<Tensor>& sinks) {
  CachedAttention call =
      cached_attention(q, k_cache, v_cache, cache_seqlens, cache_start, block_table, softmax_scale, k_layout);
  const int64_t max_keys = check_cached_contents(call, cache_seqlens, cache_start, block_table);
  call.allocate(q);
  const std::optional<Tensor> cache_end = cache_seqlens;
  AttentionOptions options{
      true, softmax_scale, window_left, window_right, softcap, sinks, cache_start, cache_end, 0.0, 0, 0, {}};
  options.apply(q, call.params);
  run_attention(call.params, max_keys, q);
  return {call.out, call.lse};
}

}  // namespace diffqkv
