#include "cuda/attention.h"
#include "cuda/decode_attention/decode_attention.cuh"
#include "cuda/launch.cuh"
#include "cuda/tickets.cuh"
#include "plan/cuda/decode_attention.h"

namespace diffqkv::cuda {
namespace {

template <class E, DecodeAttentionSize size, bool bulk>
cudaError_t launch(const device::DecodeAttentionParams& params, cudaStream_t stream) {
  const CudaDecodeAttentionPlan& plan = params.plan;
  const dim3 grid(static_cast<unsigned>(plan.splits), static_cast<unsigned>(params.p.heads.groups() * plan.chunks),
                  static_cast<unsigned>(params.p.batch));
  return device::launch<device::DecodeAttention<E, size, bulk>>(params, grid, plan.shared_bytes, stream);
}

template <class E>
cudaError_t dispatch(const device::DecodeAttentionParams& params, cudaStream_t stream) {
  if (params.plan.large) return launch<E, kLargeDecodeAttention, false>(params, stream);
  return params.plan.bulk ? launch<E, kSmallDecodeAttention, true>(params, stream)
                          : launch<E, kSmallDecodeAttention, false>(params, stream);
}

}  // namespace

cudaError_t decode_attention(const AttentionParams& p, const Launch& launch) {
  const CudaDecodeAttentionPlan plan = plan_cuda_decode_attention(p, launch.facts);
  if (plan.blocks == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  uint32_t* tickets = nullptr;
  if (const cudaError_t error = take_tickets(plan.tickets, stream, &tickets); error != cudaSuccess) return error;
  // Zeros of its own cost a call a kernel more.
  const int64_t partial_bytes = 4 * plan.workspace_floats, ticket_bytes = tickets == nullptr ? 4 * plan.tickets : 0;
  char* const workspace = static_cast<char*>(launch.memory.take(partial_bytes + ticket_bytes));
  if (tickets == nullptr) {
    tickets = reinterpret_cast<uint32_t*>(workspace + partial_bytes);
    const cudaError_t error = cudaMemsetAsync(tickets, 0, static_cast<size_t>(ticket_bytes), stream);
    if (error != cudaSuccess) return error;
  }
  const device::DecodeAttentionParams params{p, plan, reinterpret_cast<float*>(workspace), tickets};
  return p.q.dtype == DType::f16 ? dispatch<device::F16>(params, stream) : dispatch<device::BF16>(params, stream);
}

}  // namespace diffqkv::cuda
