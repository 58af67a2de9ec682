#include "cuda/device.cuh"
#include "cuda/launch_api.h"
#include "cuda/selective_v_attention/instances.h"

namespace diffqkv::cuda {

int run(const SelectiveVAttentionParams& p, const Launch& launch) {
  using namespace device;
  const CudaSelectiveVAttentionPlan plan = plan_cuda_selective_v_attention(p, launch.facts);
  void* const workspace = launch.memory.take(plan.workspace_bytes);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  switch (p.attention.q.dtype) {
    case DType::f32: return selective_v_attention::run<F32>(p, plan, workspace, stream);
    case DType::f16: return selective_v_attention::run<F16>(p, plan, workspace, stream);
    case DType::bf16: return selective_v_attention::run<BF16>(p, plan, workspace, stream);
    case DType::f64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace diffqkv::cuda
