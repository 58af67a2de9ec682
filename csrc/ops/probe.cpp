#include "cpu/probe.h"

#include "ops/registration.h"
#include "ops/torch_caller.h"

namespace diffqkv {
namespace {

double probe(const Tensor& data, int64_t what, int64_t rounds) {
  DIFFQKV_CHECK(what >= 0 && what <= 2, "what: got ", what, ", want 0 (multiply-adds), 1 (dot products) or 2 (reads)");
  DIFFQKV_CHECK(rounds >= 0, "rounds: got ", rounds, ", want an integer >= 0");
  DIFFQKV_CHECK(data.is_contiguous(), "data: got strides with gaps, want a contiguous tensor");
  return cpu::probe(static_cast<cpu::Probe>(what), rounds, data.data_ptr(), data.numel() * int64_t(data.element_size()),
                    torch_threads(), parallel_on_torch);
}

// What the machine can do, for benchmarks. what: 0 fp32 multiply-adds, 1 bf16 dot products, 2 reads of data
// -> FLOPs done or bytes read, 0 where the CPU has no such instruction
STABLE_TORCH_LIBRARY_FRAGMENT(diffqkv, m) { m.def("probe(Tensor data, int what, int rounds) -> float"); }
DIFFQKV_REGISTER_CPU(probe)

}  // namespace
}  // namespace diffqkv
