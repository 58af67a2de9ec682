#include <array>
#include <utility>

#include "cuda/flash_attention_backward/instances.h"
#include "cuda/flash_attention_backward/plain_gradients.cuh"
#include "cuda/flash_attention_backward/sums.cuh"
#include "cuda/launch.cuh"
#include "cuda/launch_api.h"

namespace diffqkv {
namespace device {

namespace {

// Kernels one after the other, up to the first error.
struct Launches {
  const FlashAttentionBackwardCall& call;
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  template <class Kernel>
  void run(int64_t blocks, int64_t shared_bytes = 0) {
    if (error == cudaSuccess) error = launch_blocks<Kernel>(call, blocks, shared_bytes, stream);
  }
};

using LaunchGradients = cudaError_t (*)(const FlashAttentionBackwardCall&, cudaStream_t);

// The launches of all variants, in the order of their table.
template <size_t... i>
constexpr auto launches_of(std::index_sequence<i...>) {
  return std::array{LaunchGradients{
      launch_gradients<kFlashAttentionBackwardVariants[i].d_k, kFlashAttentionBackwardVariants[i].d_v>}...};
}

cudaError_t launch_variant(const FlashAttentionBackwardCall& call, cudaStream_t stream) {
  static constexpr auto kLaunches = launches_of(std::make_index_sequence<kFlashAttentionBackwardVariantCount>());
  return kLaunches[static_cast<size_t>(call.plan.variant)](call, stream);
}

template <class E>
cudaError_t run(const FlashAttentionBackwardCall& call, cudaStream_t stream) {
  const CudaFlashAttentionBackwardPlan& plan = call.plan;
  Launches launches{call, stream};
  launches.run<RowSums<E>>(plan.row_blocks);
  if constexpr (sizeof(typename E::T) == 2) {
    if (launches.error == cudaSuccess) launches.error = launch_variant(call, stream);
    launches.run<SlotSums<E, false>>(plan.k_sum_blocks);
    launches.run<SlotSums<E, true>>(plan.v_sum_blocks);
  } else {
    launches.run<PlainKeyGradients<E, false>>(plan.key_blocks);
    launches.run<PlainKeyGradients<E, true>>(plan.value_blocks);
    launches.run<PlainQueryGradients<E>>(plan.query_blocks);
  }
  if (call.p.dsinks != nullptr)
    launches.run<SinkGradients<E>>(call.p.forward.heads.n_q, SinkGradients<E>::kSharedBytes);
  return launches.error;
}

}  // namespace
}  // namespace device

int cuda::run(const FlashAttentionBackwardParams& p, const Launch& launch) {
  if (p.forward.paging.block_table != nullptr) return cudaErrorInvalidValue;
  const CudaFlashAttentionBackwardPlan plan = plan_cuda_flash_attention_backward(p, launch.facts);
  const device::FlashAttentionBackwardCall call{p, plan, static_cast<char*>(launch.memory.take(plan.workspace_bytes))};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  switch (p.forward.q.dtype) {
    case DType::f32: return device::run<device::F32>(call, stream);
    case DType::f64: return device::run<device::F64>(call, stream);
    case DType::f16: return device::run<device::F16>(call, stream);
    case DType::bf16: return device::run<device::BF16>(call, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace diffqkv
