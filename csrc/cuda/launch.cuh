// Launches of kernel structs (device.cuh).
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "cuda/device.cuh"

namespace diffqkv::device {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    run_kernel(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(128) char shared[];
  Kernel::run(params, shared);
}

// Bytes of shared memory that a block gets without asking.
inline constexpr int64_t kSharedWithoutAsking = 48 * 1024;

template <class Kernel>
cudaError_t launch(const typename Kernel::Params& params, dim3 grid, int64_t shared_bytes, cudaStream_t stream) {
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  run_kernel<Kernel><<<grid, Kernel::kThreads, static_cast<size_t>(shared_bytes), stream>>>(params);
  return cudaGetLastError();
}

// Launches a grid of one dimension: none without blocks, and an error for more than a grid can have.
template <class Kernel>
cudaError_t launch_blocks(const typename Kernel::Params& params, int64_t blocks, int64_t shared_bytes,
                          cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch<Kernel>(params, dim3(static_cast<unsigned>(blocks)), shared_bytes, stream);
}

}  // namespace diffqkv::device
