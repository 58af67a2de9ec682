#pragma once
#include <cuda_runtime.h>

#include "plan/cuda/selective_v_attention.h"

namespace diffqkv::device::selective_v_attention {

// Launches all kernels of a call for one element type. launch.cuh defines it; CMake writes a file for each instance.
template <class E>
cudaError_t run(const SelectiveVAttentionParams& p, const CudaSelectiveVAttentionPlan& plan, void* workspace,
                cudaStream_t stream);

}  // namespace diffqkv::device::selective_v_attention
