#include <algorithm>

#include "cpu/isa.h"
#include "cpu/items.h"
#include "cpu/kernels/kernels.h"
#include "cpu/run.h"
#include "params/arithmetic.h"

namespace diffqkv::cpu {
namespace {

constexpr int64_t kElementsPerItem = 16384;

// Hands out ranges of elements of equal length.
template <class Params>
void elementwise(const Params& p, int64_t numel, const Caller& caller,
                 void (*kernel)(const Params&, int64_t begin, int64_t end)) {
  for_items(ceil_div(numel, kElementsPerItem), caller.threads, caller.parallel,
            [&](int64_t i, int64_t) { kernel(p, i * kElementsPerItem, std::min(numel, (i + 1) * kElementsPerItem)); });
}

}  // namespace

void run(const SwigluParams& p, const Caller& caller) { elementwise(p, p.numel, caller, cpu_kernels().swiglu); }
void run(const SwigluBackwardParams& bp, const Caller& caller) {
  elementwise(bp, bp.forward.numel, caller, cpu_kernels().swiglu_backward);
}

}  // namespace diffqkv::cpu
