#pragma once
#include "cuda/launch.cuh"
#include "cuda/prefill/flash_attention.cuh"
#include "cuda/prefill/launch_flash_attention.h"

namespace diffqkv::device {

template <int kDk, int kDv>
cudaError_t launch_flash_attention(const PrefillParams<float>& params, cudaStream_t stream) {
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
