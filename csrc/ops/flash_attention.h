// What the flash_attention ops share on every device: checks of their arguments, params, and memory for the results.
#pragma once
#include "ops/attention_options.h"

namespace diffqkv {

struct PackedSequences {
  const Tensor &cu_seqlens_q, &cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
};

// Everything but out and lse. `options` keeps the sinks that the params point to. On the CPU the contents of cu_seqlens
// are checked too, and s_q and s_k are the longest sequences; elsewhere they are what the caller says.
AttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const std::optional<PackedSequences>& packed, AttentionOptions& options);
// That check by itself, of cu_seqlens in host memory.
void check_sequences(const PackedSequences& host, const Tensor& q, const Tensor& k);

// Memory for the results of params, which then point there.
struct AttentionResults {
  Tensor out, lse;
};
AttentionResults new_results(const Tensor& q, AttentionParams& params);

// The params of the backward pass, complete; memory for the gradients, dsinks as the kernels take sinks; and what else
// the params point to.
struct AttentionGradients {
  FlashAttentionBackwardParams params;
  Tensor dq, dk, dv, dsinks, dout;
  std::optional<Tensor> dlse;
};
AttentionGradients new_gradients(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                 const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                 const std::optional<PackedSequences>& packed, AttentionOptions& options);

}  // namespace diffqkv
