#include "cpu/isa.h"
#include "cpu/items.h"
#include "cpu/kernels/kernels.h"
#include "cpu/run.h"

namespace diffqkv::cpu {

void run(const RmsNormParams& p, const Caller& caller) {
  for_ranges(p.rows, p.d, caller, [&](int64_t begin, int64_t end) { cpu_kernels().rms_norm(p, begin, end); });
}

}  // namespace diffqkv::cpu
