#include "cpu/isa.h"
#include "cpu/items.h"
#include "cpu/kernels/kernels.h"
#include "cpu/run.h"

namespace diffqkv::cpu {

void run(const SwigluParams& p, const Caller& caller) {
  for_ranges(p.numel, 1, caller, [&](int64_t begin, int64_t end) { cpu_kernels().swiglu(p, begin, end); });
}
void run(const SwigluBackwardParams& bp, const Caller& caller) {
  for_ranges(bp.forward.numel, 1, caller,
             [&](int64_t begin, int64_t end) { cpu_kernels().swiglu_backward(bp, begin, end); });
}

}  // namespace diffqkv::cpu
