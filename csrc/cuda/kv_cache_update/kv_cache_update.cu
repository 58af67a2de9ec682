#include "cuda/kv_cache_update/kv_cache_update.cuh"
#include "cuda/launch.cuh"
#include "cuda/launch_api.h"
#include "plan/cuda/kv_cache_update.h"

namespace diffqkv::cuda {
namespace {

template <class E, int N>
cudaError_t launch_blocks(const KvCacheUpdateParams& p, const CudaKvCacheUpdatePlan& plan, void* stream) {
  using Kernel = device::KvCacheUpdate<E, N>;
  return device::launch_blocks<Kernel>({p, plan}, plan.blocks, Kernel::kSharedBytes, static_cast<cudaStream_t>(stream));
}

template <class E>
cudaError_t launch_for(const KvCacheUpdateParams& p, const CudaKvCacheUpdatePlan& plan, void* stream) {
  constexpr int kWidth = 16 / sizeof(typename E::T);
  return plan.width == kWidth ? launch_blocks<E, kWidth>(p, plan, stream) : launch_blocks<E, 1>(p, plan, stream);
}

}  // namespace

int run(const KvCacheUpdateParams& p, const Launch& launch) {
  if (p.k_new.dtype != p.v_new.dtype || p.k_cache.dtype != p.k_new.dtype || p.v_cache.dtype != p.v_new.dtype ||
      p.d_v > kMaxHeadDim) {
    return cudaErrorInvalidValue;
  }
  const CudaKvCacheUpdatePlan plan = plan_cuda_kv_cache_update(p);
  switch (p.k_new.dtype) {
    case DType::f32: return launch_for<device::F32>(p, plan, launch.stream);
    case DType::f16: return launch_for<device::F16>(p, plan, launch.stream);
    case DType::bf16: return launch_for<device::BF16>(p, plan, launch.stream);
    case DType::f64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace diffqkv::cuda
