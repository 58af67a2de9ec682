#include "cuda/flash_attention/instances.h"
#include "cuda/flash_attention/plain_attention.cuh"
#include "cuda/launch.cuh"
#include "cuda/launch_api.h"

namespace diffqkv {
namespace {

template <class T>
cudaError_t launch_plain(const AttentionParams& p, const CudaFlashAttentionPlan& plan, cudaStream_t stream) {
  return device::launch_blocks<device::PlainAttention<T>>({p, plan}, plan.blocks, plan.shared_bytes, stream);
}

cudaError_t launch_variant(const AttentionParams& p, const CudaFlashAttentionPlan& plan, cudaStream_t stream) {
  using device::launch_flash_attention;
  static constexpr decltype(&launch_flash_attention<64, 64>) kLaunches[] = {
      launch_flash_attention<32, 64>, launch_flash_attention<64, 64>, launch_flash_attention<64, 128>,
      launch_flash_attention<128, 128>, launch_flash_attention<256, 256>};
  static_assert(sizeof(kLaunches) / sizeof(kLaunches[0]) == kFlashAttentionVariantCount);
  return kLaunches[plan.variant]({p, plan}, stream);
}

}  // namespace

int cuda_flash_attention(const AttentionParams& p, const CudaFlashAttentionPlan& plan, void* stream) {
  if (p.d_k > kMaxHeadDim || p.d_v > kMaxHeadDim || p.k.layout != KLayout::rows || p.s_q > kMaxFlashAttentionTokens ||
      p.s_k > kMaxFlashAttentionTokens)
    return cudaErrorInvalidValue;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.q.dtype) {
    case DType::f32: return launch_plain<float>(p, plan, s);
    case DType::f64: return launch_plain<double>(p, plan, s);
    default: return launch_variant(p, plan, s);
  }
}

}  // namespace diffqkv
