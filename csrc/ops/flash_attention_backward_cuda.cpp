#include "ops/cuda_call.h"
#include "ops/flash_attention.h"
#include "ops/ops_cuda.h"

namespace diffqkv {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const char* op, const Tensor& dout,
                                                    const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& out, const Tensor& lse,
                                                    const std::optional<PackedSequences>& packed,
                                                    AttentionOptions options) {
  const AttentionGradients gradients = new_gradients(dout, dlse, q, k, v, out, lse, packed, options);
  const FlashAttentionBackwardParams& p = gradients.params;
  const CudaCall call(op, q);
  if (packed && call.debugging()) {
    const Tensor cu_seqlens_q = on_host(packed->cu_seqlens_q), cu_seqlens_k = on_host(packed->cu_seqlens_k);
    check_sequences({cu_seqlens_q, cu_seqlens_k, packed->max_seqlen_q, packed->max_seqlen_k}, q, k);
  }
  const CudaFlashAttentionBackwardPlan plan = plan_cuda_flash_attention_backward(p, call.facts());
  Tensor workspace = torch::stable::new_empty(q, {plan.workspace_bytes}, ScalarType::Byte);
  call.check(cuda_flash_attention_backward(p, plan, workspace.data_ptr(), call.stream()));
  return {gradients.dq, gradients.dk, gradients.dv, options.as_sinks(gradients.dsinks)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_backward_cuda(const Tensor& dout,
                                                                         const std::optional<Tensor>& dlse,
                                                                         const Tensor& q, const Tensor& k,
                                                                         const Tensor& v, const Tensor& out,
                                                                         const Tensor& lse, DIFFQKV_OPTION_PARAMETERS) {
  return backward("flash_attention_backward", dout, dlse, q, k, v, out, lse, std::nullopt, DIFFQKV_OPTION_ARGUMENTS);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_varlen_backward_cuda(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, DIFFQKV_PACKED_PARAMETERS, DIFFQKV_OPTION_PARAMETERS) {
  return backward("flash_attention_varlen_backward", dout, dlse, q, k, v, out, lse,
                  PackedSequences DIFFQKV_PACKED_ARGUMENTS, DIFFQKV_OPTION_ARGUMENTS);
}

}  // namespace diffqkv
