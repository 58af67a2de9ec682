#include "cuda/select/run.cuh"

template int diffqkv::device::selective::run<diffqkv::device::F32>(const SelectiveVParams&, const CudaSelectPlan&,
                                                                   void*, void*);
