// The ops' C++ functions on CUDA tensors, beside those of ops.h.
#pragma once
#include "ops/attention_options.h"

namespace diffqkv {

class CudaCall;

std::tuple<Tensor, Tensor> flash_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                DIFFQKV_OPTION_PARAMETERS);
// max_seqlen_q and max_seqlen_k are believed. With DIFFQKV_DEBUG=1 in the environment the call reads cu_seqlens back,
// and throws before it writes.
std::tuple<Tensor, Tensor> flash_attention_varlen_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                       DIFFQKV_PACKED_PARAMETERS, DIFFQKV_OPTION_PARAMETERS);

// Never synchronises: a token whose position is out of range or unmapped is not written. With DIFFQKV_DEBUG=1 in the
// environment the call reads positions and block table back, and throws before it writes.
void kv_cache_update_cuda(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& positions,
                          const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                          const std::optional<Tensor>& block_table, std::optional<Tensor> v_stats, int64_t k_layout);

std::tuple<Tensor, Tensor> decode_attention_cuda(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                 const Tensor& cache_seqlens, const std::optional<Tensor>& cache_start,
                                                 const std::optional<Tensor>& block_table,
                                                 std::optional<double> softmax_scale, int64_t k_layout,
                                                 int64_t window_left, int64_t window_right, double softcap,
                                                 const std::optional<Tensor>& sinks);
// Never synchronises, unless DIFFQKV_DEBUG=1 asks it to check lengths and blocks.
SelectiveResults selective_v_attention_cuda(DIFFQKV_SELECTIVE_PARAMETERS);

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_backward_cuda(const Tensor& dout,
                                                                         const std::optional<Tensor>& dlse,
                                                                         const Tensor& q, const Tensor& k,
                                                                         const Tensor& v, const Tensor& out,
                                                                         const Tensor& lse, DIFFQKV_OPTION_PARAMETERS);
// With DIFFQKV_DEBUG=1 the call reads cu_seqlens back, and throws before it writes.
std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_varlen_backward_cuda(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, DIFFQKV_PACKED_PARAMETERS, DIFFQKV_OPTION_PARAMETERS);

Tensor swiglu_cuda(const Tensor& gate, const Tensor& up);
std::tuple<Tensor, Tensor> swiglu_backward_cuda(const Tensor& dout, const Tensor& gate, const Tensor& up);

// Plans and launches an attention whose params are complete.
void run_attention_cuda(const CudaCall& call, const AttentionParams& p, const Tensor& q);

}  // namespace diffqkv
