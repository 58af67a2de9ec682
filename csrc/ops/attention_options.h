// The options that the attention ops share, as their schemas list them.
#pragma once
#include "ops/torch_compat.h"

namespace diffqkv {

#define DIFFQKV_OPTION_PARAMETERS                                                                                  \
  bool causal, std::optional<double> softmax_scale, int64_t window_left, int64_t window_right, double softcap,     \
      const std::optional<Tensor>&sinks, const std::optional<Tensor>&kv_start, const std::optional<Tensor>&kv_end, \
      double dropout_p, int64_t seed, int64_t offset
#define DIFFQKV_OPTION_ARGUMENTS                                                                                    \
  AttentionOptions {                                                                                                \
    causal, softmax_scale, window_left, window_right, softcap, sinks, kv_start, kv_end, dropout_p, seed, offset, {} \
  }
#define DIFFQKV_PACKED_PARAMETERS \
  const Tensor &cu_seqlens_q, const Tensor &cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k
#define DIFFQKV_PACKED_ARGUMENTS {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}

// Of selective_v_attention.
#define DIFFQKV_SELECTIVE_PARAMETERS                                                                             \
  const Tensor &q, const Tensor &k_cache, const Tensor &v_cache, const Tensor &cache_seqlens, int64_t top_k,     \
      int64_t tail, int64_t keep_first, int64_t keep_last, const std::optional<Tensor>&v_stats,                  \
      const std::optional<Tensor>&cache_start, const std::optional<Tensor>&block_table,                          \
      std::optional<double> softmax_scale, int64_t k_layout, std::optional<double> max_error, bool return_bound, \
      bool return_indices
#define DIFFQKV_SELECTIVE_ARGUMENTS                                                                          \
  q, k_cache, v_cache, cache_seqlens, top_k, tail, keep_first, keep_last, v_stats, cache_start, block_table, \
      softmax_scale, k_layout, max_error, return_bound, return_indices
// out, lse, kept_mass, indices, rows_used, error_bound
using SelectiveResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The scale of a call, d_k^-0.5 by default; checked.
double softmax_scale_of(std::optional<double> softmax_scale, int64_t d_k);

struct AttentionOptions {
  bool causal;
  std::optional<double> softmax_scale;
  int64_t window_left, window_right;
  double softcap;
  const std::optional<Tensor>&sinks, &kv_start, &kv_end;
  double dropout_p;
  int64_t seed, offset;
  // Sinks as the kernels take them: float32, beside float64 data float64.
  std::optional<Tensor> wide_sinks;

  // Checks all of them, and fills params whose shapes are known. q: of the call.
  void apply(const Tensor& q, AttentionParams& params);
  // Memory for the gradient of wide_sinks; of no elements without sinks.
  Tensor new_dsinks(const Tensor& q) const;
  // That gradient in the dtype of the sinks.
  Tensor as_sinks(const Tensor& dsinks) const;
};

}  // namespace diffqkv
