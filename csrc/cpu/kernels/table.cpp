// The function table of one instruction set level.
#include "cpu/kernels/kernels.h"

#define DIFFQKV_JOIN_(a, b) a##b
#define DIFFQKV_JOIN(a, b) DIFFQKV_JOIN_(a, b)

namespace diffqkv {

#define DIFFQKV_ENTRY(result, name, parameters) .name = DIFFQKV_ISA::name,
const CpuKernels DIFFQKV_JOIN(kernels_, DIFFQKV_ISA) = {DIFFQKV_CPU_KERNELS(DIFFQKV_ENTRY)};

}  // namespace diffqkv
