// Which build of the CPU kernels runs on this machine.
#pragma once
#include <vector>

namespace diffqkv {

struct CpuKernels;  // cpu/kernels/kernels.h

enum class CpuIsa { v2 = 0, v3 = 1, v4 = 2, v4_bf16 = 3 };

const char* name_of(CpuIsa isa);
// The levels that this CPU runs, lowest first.
std::vector<CpuIsa> supported_cpu_isas();
// The level that `wanted` names, null or empty for the best one. Throws std::runtime_error if the name is unknown or
// the CPU lacks the level.
CpuIsa choose_cpu_isa(const char* wanted);
// choose_cpu_isa of the environment variable DIFFQKV_CPU_ISA, once.
CpuIsa cpu_isa();
// The kernels of that level.
const CpuKernels& cpu_kernels();

}  // namespace diffqkv
