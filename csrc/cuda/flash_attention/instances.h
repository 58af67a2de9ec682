#pragma once
#include <cuda_runtime.h>

#include "cuda/flash_attention/block.cuh"

namespace diffqkv::device {

// Launches the kernel of a pair of head dimensions. launch.cuh defines it; CMake writes a file for each instance.
template <int kDk, int kDv>
cudaError_t launch_flash_attention(const FlashAttentionParams<float>& params, cudaStream_t stream);

}  // namespace diffqkv::device
