#pragma once
#include "cuda/flash_attention_backward/instances.h"
#include "cuda/flash_attention_backward/key_gradients.cuh"
#include "cuda/flash_attention_backward/query_gradients.cuh"
#include "cuda/launch.cuh"

namespace diffqkv::device {

template <class E, int kDk, int kDv, bool kFeatures>
cudaError_t launch_gradients(const FlashAttentionBackwardCall& call, cudaStream_t stream) {
  const CudaFlashAttentionBackwardPlan& plan = call.plan;
  using OfKeys = KeyGradients<E, kDk, kDv, kFeatures>;
  using OfQueries = QueryGradients<E, kDk, kDv, kFeatures>;
  const cudaError_t error = launch_blocks<OfKeys>(call, plan.key_blocks, plan.key_shared_bytes, stream);
  if (error != cudaSuccess) return error;
  return launch_blocks<OfQueries>(call, plan.query_blocks, plan.query_shared_bytes, stream);
}

template <int kDk, int kDv>
cudaError_t launch_gradients(const FlashAttentionBackwardCall& call, cudaStream_t stream) {
  const bool half = call.p.forward.q.dtype == DType::f16;
  if (call.plan.features)
    return half ? launch_gradients<F16, kDk, kDv, true>(call, stream)
                : launch_gradients<BF16, kDk, kDv, true>(call, stream);
  return half ? launch_gradients<F16, kDk, kDv, false>(call, stream)
              : launch_gradients<BF16, kDk, kDv, false>(call, stream);
}

}  // namespace diffqkv::device
