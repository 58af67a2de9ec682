// The two ops that take AttentionParams. cuda::run chooses between them.
#pragma once
#include <cuda_runtime.h>

#include "cuda/launch_api.h"

namespace diffqkv::cuda {

// Takes what cuda_decode_attention_takes.
cudaError_t decode_attention(const AttentionParams& p, const Launch& launch);
cudaError_t flash_attention(const AttentionParams& p, const Launch& launch);

}  // namespace diffqkv::cuda
