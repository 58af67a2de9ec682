#include "cuda/select/run.cuh"
#include "diffqkv/cuda.h"

namespace diffqkv {

int cuda_selective_v_attention(const SelectiveVParams& p, const CudaSelectPlan& plan, void* workspace, void* stream) {
  using namespace device;
  switch (p.attention.q.dtype) {
    case DType::f32: return selective::run<F32>(p, plan, workspace, stream);
    case DType::f16: return selective::run<F16>(p, plan, workspace, stream);
    case DType::bf16: return selective::run<BF16>(p, plan, workspace, stream);
    case DType::f64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace diffqkv
