#pragma once
#include "cuda/flash_attention/flash_attention.cuh"
#include "cuda/flash_attention/instances.h"
#include "cuda/launch.cuh"

namespace diffqkv::device {

template <int kDk, int kDv>
cudaError_t launch_flash_attention(const FlashAttentionParams<float>& params, cudaStream_t stream) {
  const int64_t blocks = params.plan.blocks, shared = params.plan.shared_bytes;
  const bool half = params.p.q.dtype == DType::f16;
  if (params.plan.features)
    return half ? launch_blocks<FlashAttention<F16, kDk, kDv, true>>(params, blocks, shared, stream)
                : launch_blocks<FlashAttention<BF16, kDk, kDv, true>>(params, blocks, shared, stream);
  return half ? launch_blocks<FlashAttention<F16, kDk, kDv, false>>(params, blocks, shared, stream)
              : launch_blocks<FlashAttention<BF16, kDk, kDv, false>>(params, blocks, shared, stream);
}

}  // namespace diffqkv::device
