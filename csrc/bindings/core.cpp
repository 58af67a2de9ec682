// diffqkv._core: the planners and what is installed, for diffqkv.explain, diffqkv.show_config and tests.
#include <fmt/format.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "bindings/module.h"
#include "cpu/isa.h"
#include "plan/cpu/attention.h"

namespace py = pybind11;
using namespace diffqkv;

namespace {

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  throw py::value_error(fmt::format("dtype: got '{}', want 'float32', 'float16' or 'bfloat16'", name));
}

void check_positive(const char* name, int64_t value, int64_t least) {
  if (value < least) throw py::value_error(fmt::format("{}: got {}, want {} or more", name, value, least));
}

py::dict plan(int64_t n_q, int64_t n_k, int64_t n_v, int64_t d_k, int64_t d_v, int64_t s_q, int64_t s_k, int64_t batch,
              const std::string& dtype, int64_t threads, bool causal) {
  check_positive("threads", threads, 1);
  const AttentionParams params = checked_shape(n_q, n_k, n_v, d_k, d_v, s_q, s_k, batch, dtype, causal);
  const HeadGroups& heads = params.heads;
  const AttentionPlan p = plan_attention(params, s_k, threads);
  const bool split = p.kernel == AttentionKernel::split;
  py::dict result;
  result["kernel"] = split ? "split" : "block";
  result["isa"] = name_of(cpu_isa());
  result["groups"] = p.groups;
  result["rows"] = p.rows;
  result["block_q"] = split ? s_q : p.block_q;
  result["block_k"] = split ? kSplitTokens : kKeyTile;
  result["heads_per_item"] = split ? heads.q_per_group() : p.heads_per_item;
  result["split"] = split ? kSplitTokens : 0;
  result["splits"] = split ? p.splits : 1;
  result["items"] = p.items;
  result["threads"] = p.threads;
  result["workspace_bytes"] = p.threads * p.scratch_bytes + 4 * p.partial_floats;
  result["bytes"] = p.bytes;
  result["flops"] = p.flops;
  // Ridge of the 2-core machines that the kernels were measured on: 205 fp32 GFLOP/s beside some 50 GB/s.
  result["bound"] = p.flops > 4.0 * p.bytes ? "compute" : "memory";
  return result;
}

}  // namespace

AttentionParams diffqkv::checked_shape(int64_t n_q, int64_t n_k, int64_t n_v, int64_t d_k, int64_t d_v, int64_t s_q,
                                       int64_t s_k, int64_t batch, const std::string& dtype, bool causal) {
  const HeadGroups heads{n_q, n_k, n_v};
  if (!heads.valid())
    throw py::value_error(
        fmt::format("n_q: got n_q = {}, n_k = {}, n_v = {}, want n_q a multiple of both", n_q, n_k, n_v));
  for (const auto& [name, d] : {std::pair{"d_k", d_k}, {"d_v", d_v}})
    if (d < 8 || d > kMaxHeadDim || d % 8 != 0)
      throw py::value_error(fmt::format("{}: got {}, want a multiple of 8 from 8 to {}", name, d, kMaxHeadDim));
  check_positive("s_q", s_q, 0);
  check_positive("s_k", s_k, 0);
  check_positive("batch", batch, 0);
  AttentionParams params;
  params.heads = heads;
  params.batch = batch, params.s_q = s_q, params.s_k = s_k, params.d_k = d_k, params.d_v = d_v;
  params.q.dtype = params.k.dtype = params.v.dtype = params.out.dtype = dtype_named(dtype);
  params.window_right = causal ? 0 : -1;
  return params;
}

PYBIND11_MODULE(_core, m) {
  bind_cuda_plans(m);
  m.def("plan_attention", &plan, py::arg("n_q"), py::arg("n_k"), py::arg("n_v"), py::arg("d_k"), py::arg("d_v"),
        py::arg("s_q"), py::arg("s_k"), py::arg("batch"), py::arg("dtype"), py::arg("threads"),
        py::arg("causal") = true, "The CPU plan of an attention call, from the function that the op uses.");
  m.def("cpu_isa", [] { return std::string(name_of(cpu_isa())); }, "The level of the CPU kernels in use.");
  m.def(
      "cpu_isa_levels",
      [] {
        std::vector<std::string> names;
        for (const CpuIsa isa : supported_cpu_isas()) names.emplace_back(name_of(isa));
        return names;
      },
      "The levels that this CPU runs, lowest first; DIFFQKV_CPU_ISA chooses one.");
  m.def(
      "cuda_archs",
      [] {
        std::vector<std::string> names;
#ifdef DIFFQKV_CUDA_ARCHITECTURES
        std::istringstream list(DIFFQKV_CUDA_ARCHITECTURES);
        for (std::string name; std::getline(list, name, ',');) names.push_back(name);
#endif
        return names;
      },
      "What the CUDA kernels were compiled for; empty without them.");
}
