#include "ops/cuda_call.h"
#include "ops/ops_cuda.h"

namespace diffqkv {

void run_attention_cuda(const CudaCall& call, const AttentionParams& p, const Tensor& q) {
  if (p.batch == 0 || p.s_q == 0) return;
  if (!cuda_decode_attention_takes(p)) {
    call.check(cuda_flash_attention(p, plan_cuda_flash_attention(p, call.facts()), call.stream()));
    return;
  }
  const CudaDecodeAttentionPlan plan = plan_cuda_decode_attention(p, call.facts());
  Tensor workspace = torch::stable::new_empty(q, {plan.workspace_floats}, ScalarType::Float);
  const CudaTickets tickets(call, q, plan.tickets);
  call.check(cuda_decode_attention(p, plan, workspace.data_ptr(), tickets.first(), call.stream()));
}

}  // namespace diffqkv
