#include "ops/arguments.h"
#include "ops/ops.h"

namespace diffqkv {

double probe_cpu(const Tensor& data, int64_t what, int64_t rounds) {
  DIFFQKV_CHECK(what >= 0 && what <= 2, "what: got ", what, ", want 0 (multiply-adds), 1 (dot products) or 2 (reads)");
  DIFFQKV_CHECK(rounds >= 0, "rounds: got ", rounds, ", want 0 or more");
  DIFFQKV_CHECK(data.is_contiguous(), "data: got strides with gaps, want a contiguous tensor");
  return cpu::probe(static_cast<cpu::Probe>(what), rounds, data.data_ptr(), data.numel() * int64_t(data.element_size()),
                    torch_threads(), parallel_on_torch);
}

}  // namespace diffqkv
