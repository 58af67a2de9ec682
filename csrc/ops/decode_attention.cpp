#include <algorithm>
#include <cmath>

#include "ops/arguments.h"
#include "ops/ops.h"

namespace diffqkv {

CachedAttention cached_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                     const Tensor& cache_seqlens, const std::optional<Tensor>& cache_start,
                                     const std::optional<Tensor>& block_table, std::optional<double> softmax_scale,
                                     int64_t k_layout) {
  check_rank("q", q, 4, "[b, n_q, s_q, d_k]");
  check_floating("q", q);
  check_unit_last_stride("q", q);
  check_same_dtype("k_cache", k_cache, "q", q);
  check_same_device("k_cache", k_cache, "q", q);
  const CacheArguments cache = cache_arguments(k_cache, v_cache, block_table, k_layout, q.size(0));

  CachedAttention call;
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

  const auto* lengths = static_cast<const int32_t*>(cache_seqlens.data_ptr());
  const auto* starts = cache_start ? static_cast<const int32_t*>(cache_start->data_ptr()) : nullptr;
  for (int64_t b = 0; b < p.batch; ++b) {
    DIFFQKV_CHECK(lengths[b] >= 0 && lengths[b] <= cache.capacity, "cache_seqlens: got ", lengths[b], " for entry ", b,
                  ", want 0 to the cache's ", cache.capacity, " tokens");
    DIFFQKV_CHECK(starts == nullptr || starts[b] >= 0, "cache_start: got ", starts[b], " for entry ", b,
                  ", want 0 or more");
    check_blocks(cache, b, starts ? starts[b] : 0, lengths[b]);
    call.max_keys = std::max<int64_t>(call.max_keys, lengths[b]);
  }

  call.out = torch::stable::new_empty(q, {p.batch, p.heads.n_q, p.s_q, p.d_v});
  call.lse = torch::stable::new_empty(q, {p.batch, p.heads.n_q, p.s_q}, ScalarType::Float);
  p.q = token_view(q);
  p.k = cache.k;
  p.v = cache.v;
  p.out = token_view(call.out);
  p.lse = call.lse.data_ptr();
  p.kv_start = starts;
  p.kv_end = lengths;
  p.length = lengths;
  p.paging = cache.paging;
  p.softmax_scale = softmax_scale.value_or(1.0 / std::sqrt(double(p.d_k)));
  p.window_right = 0;
  return call;
}

std::tuple<Tensor, Tensor> decode_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                const Tensor& cache_seqlens, const std::optional<Tensor>& cache_start,
                                                const std::optional<Tensor>& block_table,
                                                std::optional<double> softmax_scale, int64_t k_layout,
                                                int64_t window_left, int64_t window_right, double softcap,
                                                const std::optional<Tensor>& sinks) {
  CachedAttention call =
      cached_attention_cpu(q, k_cache, v_cache, cache_seqlens, cache_start, block_table, softmax_scale, k_layout);
  const std::optional<Tensor> cache_end = cache_seqlens;
  AttentionOptions options{
      true, softmax_scale, window_left, window_right, softcap, sinks, cache_start, cache_end, 0.0, 0, 0, {}};
  options.apply(q, call.params);
  run_attention(call.params, call.max_keys, q);
  return {call.out, call.lse};
}

}  // namespace diffqkv
