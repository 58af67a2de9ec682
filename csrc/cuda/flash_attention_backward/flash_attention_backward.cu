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
  const BackwardCall& call;
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  template <class Kernel>
  void run(int64_t blocks, int64_t shared_bytes = 0) {
    if (error == cudaSuccess) error = launch_blocks<Kernel>(call, blocks, shared_bytes, stream);
  }
};

cudaError_t launch_variant(const BackwardCall& call, cudaStream_t stream) {
  using Launch = cudaError_t (*)(const BackwardCall&, cudaStream_t);
  constexpr Launch kLaunches[] = {launch_gradients<32, 64>, launch_gradients<64, 64>, launch_gradients<64, 128>,
                                  launch_gradients<128, 128>, launch_gradients<256, 256>};
  static_assert(sizeof(kLaunches) / sizeof(kLaunches[0]) == kBackwardVariantCount);
  return kLaunches[call.plan.variant](call, stream);
}

template <class E>
cudaError_t run(const BackwardCall& call, cudaStream_t stream) {
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

int cuda_flash_attention_backward(const FlashAttentionBackwardParams& p, const CudaFlashAttentionBackwardPlan& plan,
                                  void* workspace, void* stream) {
  if (p.forward.paging.block_table != nullptr) return cudaErrorInvalidValue;
  const device::BackwardCall call{p, plan, static_cast<char*>(workspace)};
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.forward.q.dtype) {
    case DType::f32: return device::run<device::F32>(call, s);
    case DType::f64: return device::run<device::F64>(call, s);
    case DType::f16: return device::run<device::F16>(call, s);
    case DType::bf16: return device::run<device::BF16>(call, s);
  }
  return cudaErrorInvalidValue;
}

}  // namespace diffqkv
