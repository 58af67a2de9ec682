// The CUDA ops without torch: parameters and a launch in, a cudaError_t (as int, 0 is success) out. Compiled when
// DIFFQKV_CUDA is on. They plan the call, get memory from the launch alone, and never synchronise, so that they can be
// captured in a CUDA graph. No torch and no CUDA header here.
#pragma once
#include "params/memory.h"
#include "params/params.h"
#include "plan/cuda/device_facts.h"

namespace diffqkv::cuda {

// Where a call runs. The current device is the stream's.
struct Launch {
  const DeviceFacts& facts;  // of the current device
  void* stream;              // a cudaStream_t
  Memory& memory;            // of the current device, until the stream has run the call
};

// flash_attention and decode_attention. Takes K in rows, head dimensions up to kMaxHeadDim and sequences up to
// kMaxFlashAttentionTokens; cudaErrorInvalidValue beyond them, cudaErrorInvalidConfiguration for 2^31 blocks or more.
int run(const AttentionParams& params, const Launch& launch);

// The params have no block table. cudaErrorInvalidConfiguration for 2^31 blocks or more.
int run(const FlashAttentionBackwardParams& params, const Launch& launch);

// Takes a cache in rows, of fp32, fp16 or bf16. cudaErrorInvalidConfiguration for 2^31 blocks or more.
int run(const SelectiveVAttentionParams& params, const Launch& launch);

// Writes the new tokens, K rotated if cos and sin are given, and updates v_stats: sum and largest L2 norm of the V rows
// written, added in token order. A token whose position is -1, beyond the capacity or in an unmapped block is not
// written. Two tokens of a call must not have the same slot. cudaErrorInvalidValue where K and V dtypes differ or d_v
// exceeds kMaxHeadDim.
int run(const KvCacheUpdateParams& params, const Launch& launch);

// Both take contiguous operands of fp32, fp16 or bf16.
int run(const SwigluParams& params, const Launch& launch);
int run(const SwigluBackwardParams& params, const Launch& launch);

// The facts that planners ask for, of the device with this number.
int device_facts(int device, DeviceFacts* facts);

// The text of an error that a function of this header returned.
const char* error_string(int error);

// Whether the stream is being captured, when host-side checks of device data are impossible.
int is_capturing(void* stream, bool* capturing);

}  // namespace diffqkv::cuda
