#include "ops/cuda_call.h"
#include "ops/flash_attention.h"
#include "ops/ops_cuda.h"

namespace diffqkv {
namespace {

std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<PackedSequences>& packed, AttentionOptions options) {
  AttentionParams p = attention_params(q, k, v, packed, options);
  DIFFQKV_CHECK(p.s_q <= kMaxFlashAttentionTokens, packed ? "max_seqlen_q" : "q", ": got ", p.s_q,
                " tokens, want up to ", kMaxFlashAttentionTokens);
  DIFFQKV_CHECK(p.s_k <= kMaxFlashAttentionTokens, packed ? "max_seqlen_k" : "k", ": got ", p.s_k,
                " tokens, want up to ", kMaxFlashAttentionTokens);
  const CudaCall call(op, q);
  if (packed && call.debugging()) {
    const Tensor cu_seqlens_q = on_host(packed->cu_seqlens_q), cu_seqlens_k = on_host(packed->cu_seqlens_k);
    check_sequences({cu_seqlens_q, cu_seqlens_k, packed->max_seqlen_q, packed->max_seqlen_k}, q, k);
  }
  const AttentionResults results = new_results(q, p);
  run_attention_cuda(call, p, q);
  return {results.out, results.lse};
}

}  // namespace

std::tuple<Tensor, Tensor> flash_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                DIFFQKV_OPTION_PARAMETERS) {
  return forward("flash_attention", q, k, v, std::nullopt, DIFFQKV_OPTION_ARGUMENTS);
}
std::tuple<Tensor, Tensor> flash_attention_varlen_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                       DIFFQKV_PACKED_PARAMETERS, DIFFQKV_OPTION_PARAMETERS) {
  return forward("flash_attention_varlen", q, k, v, PackedSequences DIFFQKV_PACKED_ARGUMENTS, DIFFQKV_OPTION_ARGUMENTS);
}

}  // namespace diffqkv
