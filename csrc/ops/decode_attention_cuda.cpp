#include "ops/cuda_call.h"
#include "ops/ops.h"
#include "ops/ops_cuda.h"

namespace diffqkv {

std::tuple<Tensor, Tensor> decode_attention_cuda(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                 const Tensor& cache_seqlens, const std::optional<Tensor>& cache_start,
                                                 const std::optional<Tensor>& block_table,
                                                 std::optional<double> softmax_scale, int64_t k_layout,
                                                 int64_t window_left, int64_t window_right, double softcap,
                                                 const std::optional<Tensor>& sinks) {
  CachedAttention cached =
      cached_attention(q, k_cache, v_cache, cache_seqlens, cache_start, block_table, softmax_scale, k_layout);
  const std::optional<Tensor> cache_end = cache_seqlens;
  AttentionOptions options{
      true, softmax_scale, window_left, window_right, softcap, sinks, cache_start, cache_end, 0.0, 0, 0, {}};
  options.apply(q, cached.params);
  const CudaCall call("decode_attention", q);
  if (call.debugging())
    check_cached_contents(cached, on_host(cache_seqlens), on_host(cache_start), on_host(block_table));
  cached.allocate(q);
  run_attention_cuda(call, cached.params, q);
  return {cached.out, cached.lse};
}

}  // namespace diffqkv
