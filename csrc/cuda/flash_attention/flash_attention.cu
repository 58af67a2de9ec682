#include <array>
#include <utility>

#include "cuda/attention.h"
#include "cuda/flash_attention/instances.h"
#include "cuda/flash_attention/plain_attention.cuh"
#include "cuda/launch.cuh"
#include "plan/cuda/flash_attention.h"

namespace diffqkv::cuda {
namespace {

template <class T>
cudaError_t launch_plain(const AttentionParams& p, const CudaFlashAttentionPlan& plan, cudaStream_t stream) {
  return device::launch_blocks<device::PlainAttention<T>>({p, plan}, plan.blocks, plan.shared_bytes, stream);
}

// The launches of all variants, in the order of their table.
template <size_t... i>
constexpr auto launches_of(std::index_sequence<i...>) {
  constexpr const auto& kVariants = kFlashAttentionVariants;
  return std::array{&device::launch_flash_attention<kVariants[i].d_k, kVariants[i].d_v>...};
}

cudaError_t launch_variant(const AttentionParams& p, const CudaFlashAttentionPlan& plan, cudaStream_t stream) {
  static constexpr auto kLaunches = launches_of(std::make_index_sequence<kFlashAttentionVariantCount>());
  return kLaunches[static_cast<size_t>(plan.variant)]({p, plan}, stream);
}

}  // namespace

cudaError_t flash_attention(const AttentionParams& p, const Launch& launch) {
  const CudaFlashAttentionPlan plan = plan_cuda_flash_attention(p, launch.facts);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  switch (p.q.dtype) {
    case DType::f32: return launch_plain<float>(p, plan, stream);
    case DType::f64: return launch_plain<double>(p, plan, stream);
    default: return launch_variant(p, plan, stream);
  }
}

}  // namespace diffqkv::cuda
