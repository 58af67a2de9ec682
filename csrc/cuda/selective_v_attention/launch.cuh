#pragma once
#include "cuda/launch.cuh"
#include "cuda/selective_v_attention/instances.h"
#include "cuda/selective_v_attention/launch_order.cuh"

namespace diffqkv::device::selective_v_attention {

template <class E>
cudaError_t run(const SelectiveVAttentionParams& p, const CudaSelectiveVAttentionPlan& plan, void* workspace,
                cudaStream_t stream) {
  return static_cast<cudaError_t>(launch_all<E>(
      p, plan, workspace, [&]<class Kernel>(const Params& params, int64_t blocks, int64_t shared_bytes) -> int {
        return launch_blocks<Kernel>(params, blocks, shared_bytes, stream);
      }));
}

}  // namespace diffqkv::device::selective_v_attention
