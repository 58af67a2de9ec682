#pragma once
#include <cuda_runtime.h>

#include "cuda/flash_attention_backward/call.cuh"

namespace diffqkv::device {

// Launches the kernels of a pair of head dimensions. launch.cuh defines it; CMake writes a file for each instance.
template <int kDk, int kDv>
cudaError_t launch_gradients(const FlashAttentionBackwardCall& call, cudaStream_t stream);

}  // namespace diffqkv::device
