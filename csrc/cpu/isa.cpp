#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels/kernels.h"

namespace diffqkv {
namespace {

bool supported(CpuIsa isa) {
  __builtin_cpu_init();
  switch (isa) {
    case CpuIsa::v2: return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    case CpuIsa::v3:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    case CpuIsa::v4:
      return supported(CpuIsa::v3) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case CpuIsa::v4_bf16:
      return supported(CpuIsa::v4) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
  return false;
}

constexpr CpuIsa kAll[] = {CpuIsa::v2, CpuIsa::v3, CpuIsa::v4, CpuIsa::v4_bf16};

}  // namespace

const char* name_of(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::v2: return "v2";
    case CpuIsa::v3: return "v3";
    case CpuIsa::v4: return "v4";
    case CpuIsa::v4_bf16: return "v4_bf16";
  }
  return "?";
}

std::vector<CpuIsa> supported_cpu_isas() {
  std::vector<CpuIsa> levels;
  for (const CpuIsa isa : kAll)
    if (supported(isa)) levels.push_back(isa);
  return levels;
}

CpuIsa choose_cpu_isa(const char* wanted) {
  const std::vector<CpuIsa> levels = supported_cpu_isas();
  std::string names;
  for (const CpuIsa isa : levels) names += std::string(names.empty() ? "" : ", ") + name_of(isa);
  if (levels.empty()) throw std::runtime_error("diffqkv: this CPU lacks SSE4.2, the least that diffqkv is built for");
  if (wanted == nullptr || *wanted == '\0') return levels.back();
  for (const CpuIsa isa : levels)
    if (std::string(wanted) == name_of(isa)) return isa;
  throw std::runtime_error("diffqkv: DIFFQKV_CPU_ISA: got '" + std::string(wanted) + "', want one of " + names +
                           " on this CPU");
}

CpuIsa cpu_isa() {
  static const CpuIsa chosen = choose_cpu_isa(std::getenv("DIFFQKV_CPU_ISA"));
  return chosen;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels* const tables[] = {&kernels_v2, &kernels_v3, &kernels_v4, &kernels_v4_bf16};
  static const CpuKernels& chosen = *tables[static_cast<int>(cpu_isa())];
  return chosen;
}

}  // namespace diffqkv
