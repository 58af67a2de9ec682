#include "ops/cuda_call.h"
#include "ops/ops.h"
#include "ops/ops_cuda.h"

namespace diffqkv {

SelectiveResults selective_v_attention_cuda(DIFFQKV_SELECTIVE_PARAMETERS) {
  SelectiveCall call = selective_call(DIFFQKV_SELECTIVE_ARGUMENTS);
  const CudaCall cuda("selective_v_attention", q);
  if (cuda.debugging())
    check_cached_contents(call.cached, on_host(cache_seqlens), on_host(cache_start), on_host(block_table));
  call.allocate(q);
  const CudaSelectiveVAttentionPlan plan = plan_cuda_selective_v_attention(call.params, cuda.facts());
  const Tensor workspace = torch::stable::new_empty(q, {plan.workspace_bytes}, ScalarType::Byte);
  cuda.check(cuda_selective_v_attention(call.params, plan, workspace.data_ptr(), cuda.stream()));
  return call.results();
}

}  // namespace diffqkv
