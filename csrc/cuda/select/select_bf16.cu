#include "cuda/select/run.cuh"

template int diffqkv::device::selective::run<diffqkv::device::BF16>(const SelectiveVParams&, const CudaSelectPlan&,
                                                                    void*, void*);
