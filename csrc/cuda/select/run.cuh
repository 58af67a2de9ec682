// selective_v_attention for one element type; select_<type>.cu instantiate it.
#pragma once
#include <climits>

#include "cuda/launch.cuh"
#include "cuda/select/launches.cuh"

namespace diffqkv::device::selective {

template <class E>
int run(const SelectiveVParams& p, const CudaSelectPlan& plan, void* workspace, void* stream) {
  return launch_all<E>(p, plan, workspace,
                       [&]<class Kernel>(const Params& params, int64_t blocks, int64_t shared_bytes) -> int {
                         if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
                         return launch<Kernel>(params, dim3(static_cast<unsigned>(blocks)), shared_bytes,
                                               static_cast<cudaStream_t>(stream));
                       });
}

extern template int run<F32>(const SelectiveVParams&, const CudaSelectPlan&, void*, void*);
extern template int run<F16>(const SelectiveVParams&, const CudaSelectPlan&, void*, void*);
extern template int run<BF16>(const SelectiveVParams&, const CudaSelectPlan&, void*, void*);

}  // namespace diffqkv::device::selective
