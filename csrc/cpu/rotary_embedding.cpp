#include "cpu/isa.h"
#include "cpu/items.h"
#include "cpu/kernels/kernels.h"
#include "cpu/run.h"

namespace diffqkv::cpu {

void run(const RotaryEmbeddingParams& p, const Caller& caller) {
  for_ranges(p.batch * p.tokens, p.heads * p.d, caller,
             [&](int64_t begin, int64_t end) { cpu_kernels().rotary_embedding(p, begin, end); });
}

}  // namespace diffqkv::cpu
