#include "cuda/device.cuh"
#include "cuda/launch_api.h"
#include "cuda/selective_v_attention/instances.h"

namespace diffqkv {

int cuda_selective_v_attention(const SelectiveVAttentionParams& p, const CudaSelectiveVAttentionPlan& plan,
                               void* workspace, void* stream) {
  using namespace device;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.attention.q.dtype) {
    case DType::f32: return selective_v_attention::run<F32>(p, plan, workspace, s);
    case DType::f16: return selective_v_attention::run<F16>(p, plan, workspace, s);
    case DType::bf16: return selective_v_attention::run<BF16>(p, plan, workspace, s);
    case DType::f64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace diffqkv
