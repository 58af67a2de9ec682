#include "ops/cached_attention.h"
#include "ops/views.h"

namespace diffqkv {
namespace {

// -> out, lse
std::tuple<Tensor, Tensor> decode_attention(const CachedTensors& tensors, const CacheOptions& options,
                                            const LogitOptions& logits) {
  const Device device("decode_attention", tensors.q);
  TensorChecks checks("q", tensors.q, kFloatingDtypes);
  CachedAttention call(device, checks, tensors, options);
  logits.check_ranges();
  logits.check_sinks(checks);
  call.check_contents();

  const std::optional<Tensor> sinks = logits.wide_sinks(checks.wide_dtype());
  call.params.sinks = data_of<const void>(sinks);
  logits.fill(call.params, /*causal=*/true);
  call.allocate();
  device.run(call.params);
  return {call.out, call.lse};
}

// k_layout: 0 rows, 1 panels. -> out [b, n_q, s_q, d_v], lse [b, n_q, s_q]
STABLE_TORCH_LIBRARY_FRAGMENT(diffqkv, m) {
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, *, Tensor? cache_start=None, "
      "Tensor? block_table=None, float? softmax_scale=None, int k_layout=0, int window_left=-1, int window_right=-1, "
      "float softcap=0.0, Tensor? sinks=None) -> (Tensor, Tensor)");
}
DIFFQKV_REGISTER(decode_attention)

}  // namespace
}  // namespace diffqkv
