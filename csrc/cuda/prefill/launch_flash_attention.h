#pragma once
#include <cuda_runtime.h>

#include "cuda/prefill/block.cuh"

namespace diffqkv::device {

// Of a variant. Each has a file of its own, so that they compile side by side.
template <int kDk, int kDv>
cudaError_t launch_flash_attention(const PrefillParams<float>& params, cudaStream_t stream);

}  // namespace diffqkv::device
