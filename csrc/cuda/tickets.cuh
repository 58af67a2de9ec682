// Zeros for the tickets that the blocks of a kernel take (ticket_pool.h).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace diffqkv::cuda {

// `count` zeros for a kernel about to be launched on this stream of the current device; the kernel leaves zeros behind.
// Null where the caller has to bring some of its own.
cudaError_t take_tickets(int64_t count, cudaStream_t stream, uint32_t** first);

}  // namespace diffqkv::cuda
