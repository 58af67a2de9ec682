// The GPU plans of an attention call, from the functions that the ops use.
#include <fmt/format.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "bindings/module.h"
#include "plan/cuda/decode_attention.h"
#include "plan/cuda/flash_attention.h"

namespace py = pybind11;

namespace diffqkv {
namespace {

py::dict common(const DeviceFacts& facts, int64_t threads, int64_t shared_bytes, int64_t blocks) {
  const int64_t by_shared = facts.shared_per_multiprocessor / (shared_bytes + kSystemSharedBytes);
  py::dict result;
  result["threads"] = threads;
  result["shared_bytes"] = shared_bytes;
  result["blocks"] = blocks;
  result["blocks_per_multiprocessor"] = std::min(by_shared, 2048 / std::max<int64_t>(threads, 1));
  return result;
}

const char* element_name(const AttentionParams& p) { return p.q.dtype == DType::f16 ? "F16" : "BF16"; }

py::dict decode_attention(const AttentionParams& p, const DeviceFacts& facts) {
  const CudaDecodeAttentionPlan plan = plan_cuda_decode_attention(p, facts);
  py::dict result = common(facts, kDecodeAttentionThreads, plan.shared_bytes, plan.blocks);
  result["kernel"] = plan.bulk ? "decode_attention, bulk copies" : "decode_attention";
  const DecodeAttentionSize size = plan.large ? kLargeDecodeAttention : kSmallDecodeAttention;
  result["instance"] = fmt::format("DecodeAttention<{}, DecodeAttentionSize{{{}, {}}}, {}>", element_name(p),
                                   size.tiles, size.jobs, plan.bulk);
  const DecodeAttentionChunk chunk = DecodeAttentionChunk::of(p.heads, 0, plan.heads_per_chunk, 0);
  result["bytes_under_way"] =
      int64_t{2} * (plan.stages - 1) * plan.tile_tokens * (chunk.k_heads * p.d_k + chunk.v_heads * p.d_v);
  result["block_q"] = plan.columns;
  result["block_k"] = plan.tile_tokens;
  result["stages"] = plan.stages;
  result["splits"] = plan.splits;
  result["split"] = plan.split_tokens;
  result["k_reads"] = plan.chunks;
  result["workspace_bytes"] = plan.workspace_floats * 4;
  result["flops"] = plan.flops;
  result["bytes"] = plan.bytes;
  return result;
}

py::dict flash_attention(const AttentionParams& p, const DeviceFacts& facts) {
  const CudaFlashAttentionPlan plan = plan_cuda_flash_attention(p, facts);
  py::dict result = common(facts, plan.threads, plan.shared_bytes, plan.blocks);
  result["kernel"] = plan.variant < 0 ? "flash_attention, plain" : "flash_attention";
  if (plan.variant >= 0) {
    const FlashAttentionVariant& v = kFlashAttentionVariants[plan.variant];
    result["instance"] = fmt::format("FlashAttention<{}, {}, {}, {}>", element_name(p), v.d_k, v.d_v, plan.features);
    result["bytes_under_way"] = int64_t{2} * plan.block_n * p.d_k;  // the shorter of K's and V's tiles
  }
  result["block_q"] = plan.block_m;
  result["block_k"] = plan.block_n;
  result["stages"] = plan.stages;
  result["splits"] = 1;
  result["split"] = 0;
  result["k_reads"] = p.heads.q_per_k() * plan.query_blocks;
  result["workspace_bytes"] = 0;
  result["flops"] = plan.flops;
  result["bytes"] = plan.bytes;
  return result;
}

}  // namespace

void bind_cuda_plans(py::module_& m) {
  py::class_<DeviceFacts>(m, "DeviceFacts", "What the CUDA planners know of a GPU.")
      .def(py::init<>())
      .def_readwrite("multiprocessors", &DeviceFacts::multiprocessors)
      .def_readwrite("capability", &DeviceFacts::capability)
      .def_readwrite("shared_per_block", &DeviceFacts::shared_per_block)
      .def_readwrite("shared_per_multiprocessor", &DeviceFacts::shared_per_multiprocessor)
      .def_readwrite("registers_per_multiprocessor", &DeviceFacts::registers_per_multiprocessor)
      .def_readwrite("bandwidth_gb_s", &DeviceFacts::bandwidth_gb_s);
  py::dict gpus;
  gpus["h100"] = DeviceFacts::h100();
  gpus["h200"] = DeviceFacts::h200();
  gpus["a100"] = DeviceFacts::a100();
  gpus["rtx4090"] = DeviceFacts::rtx4090();
  m.attr("GPUS") = gpus;  // that explain can name
  m.def(
      "plan_cuda_attention",
      [](const DeviceFacts& facts, int64_t n_q, int64_t n_k, int64_t n_v, int64_t d_k, int64_t d_v, int64_t s_q,
         int64_t s_k, int64_t batch, const std::string& dtype, bool causal) {
        const AttentionParams p = checked_shape(n_q, n_k, n_v, d_k, d_v, s_q, s_k, batch, dtype, causal);
        return cuda_decode_attention_takes(p) ? decode_attention(p, facts) : flash_attention(p, facts);
      },
      py::arg("facts"), py::arg("n_q"), py::arg("n_k"), py::arg("n_v"), py::arg("d_k"), py::arg("d_v"), py::arg("s_q"),
      py::arg("s_k"), py::arg("batch"), py::arg("dtype"), py::arg("causal") = true,
      "The GPU plan of an attention call, of contiguous tensors.");
}

}  // namespace diffqkv
