#pragma once
#include "cuda/flash_attention/flash_attention.cuh"
#include "cuda/flash_attention/instances.h"
#include "cuda/launch.cuh"

namespace diffqkv::device {

template <int kDk, int kDv>
cudaError_t launch_flash_attention(const FlashAttentionParams<float>& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.plan.blocks));
  const int64_t shared = params.plan.shared_bytes;
  const bool half = params.p.q.dtype == DType::f16;
  if (params.plan.features)
    return half ? launch<FlashAttention<F16, kDk, kDv, true>>(params, grid, shared, stream)
                : launch<FlashAttention<BF16, kDk, kDv, true>>(params, grid, shared, stream);
  return half ? launch<FlashAttention<F16, kDk, kDv, false>>(params, grid, shared, stream)
              : launch<FlashAttention<BF16, kDk, kDv, false>>(params, grid, shared, stream);
}

}  // namespace diffqkv::device
