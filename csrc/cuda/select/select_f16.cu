#include "cuda/select/run.cuh"

template int diffqkv::device::selective::run<diffqkv::device::F16>(const SelectiveVParams&, const CudaSelectPlan&,
                                                                   void*, void*);
