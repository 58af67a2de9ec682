// The kernels of a pair of head dimensions; each pair is a file of its own, so that they compile side by side.
#pragma once
#include "cuda/backward/key_gradients.cuh"
#include "cuda/backward/query_gradients.cuh"
#include "cuda/launch.cuh"

namespace diffqkv::device {

template <class Kernel>
cudaError_t launch_blocks(const BackwardCall& call, int64_t blocks, int64_t shared_bytes, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch<Kernel>(call, dim3(static_cast<unsigned>(blocks)), shared_bytes, stream);
}

template <class E, int kDk, int kDv, bool kFeatures>
cudaError_t launch_gradients(const BackwardCall& call, cudaStream_t stream) {
  const CudaBackwardPlan& plan = call.plan;
  using OfKeys = KeyGradients<E, kDk, kDv, kFeatures>;
  using OfQueries = QueryGradients<E, kDk, kDv, kFeatures>;
  const cudaError_t error = launch_blocks<OfKeys>(call, plan.key_blocks, plan.key_shared_bytes, stream);
  if (error != cudaSuccess) return error;
  return launch_blocks<OfQueries>(call, plan.query_blocks, plan.query_shared_bytes, stream);
}

template <int kDk, int kDv>
cudaError_t launch_gradients(const BackwardCall& call, cudaStream_t stream) {
  const bool half = call.p.forward.q.dtype == DType::f16;
  if (call.plan.features)
    return half ? launch_gradients<F16, kDk, kDv, true>(call, stream)
                : launch_gradients<BF16, kDk, kDv, true>(call, stream);
  return half ? launch_gradients<F16, kDk, kDv, false>(call, stream)
              : launch_gradients<BF16, kDk, kDv, false>(call, stream);
}

}  // namespace diffqkv::device
