#include "cuda/decode_attention/decode_attention.cuh"
#include "cuda/launch.cuh"
#include "cuda/launch_api.h"

namespace diffqkv {
namespace {

template <class E, DecodeSize size, bool bulk>
cudaError_t launch(const device::DecodeAttentionParams& params, cudaStream_t stream) {
  const CudaDecodeAttentionPlan& plan = params.plan;
  const dim3 grid(static_cast<unsigned>(plan.splits), static_cast<unsigned>(params.p.heads.groups() * plan.chunks),
                  static_cast<unsigned>(params.p.batch));
  return device::launch<device::DecodeAttention<E, size, bulk>>(params, grid, plan.shared_bytes, stream);
}

template <class E>
cudaError_t dispatch(const device::DecodeAttentionParams& params, cudaStream_t stream) {
  if (params.plan.large) return launch<E, kLargeDecode, false>(params, stream);
  return params.plan.bulk ? launch<E, kSmallDecode, true>(params, stream)
                          : launch<E, kSmallDecode, false>(params, stream);
}

}  // namespace

int cuda_decode_attention(const AttentionParams& p, const CudaDecodeAttentionPlan& plan, void* workspace,
                          uint32_t* tickets, void* stream) {
  if (plan.blocks == 0) return cudaSuccess;
  const device::DecodeAttentionParams params{p, plan, static_cast<float*>(workspace), tickets};
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.q.dtype == DType::f16) return dispatch<device::F16>(params, s);
  if (p.q.dtype == DType::bf16) return dispatch<device::BF16>(params, s);
  return cudaErrorInvalidValue;
}

}  // namespace diffqkv
