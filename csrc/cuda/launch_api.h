// The CUDA launch API: parameters and a stream in, a cudaError_t (as int, 0 is success) out. Compiled when DIFFQKV_CUDA
// is on. Launches never allocate and never synchronise, so they can be captured in a CUDA graph. No torch and no CUDA
// header here. A stream is a cudaStream_t; the current device must be the stream's.
#pragma once
#include "params/params.h"
#include "plan/cuda/decode_attention.h"
#include "plan/cuda/device_facts.h"
#include "plan/cuda/flash_attention.h"
#include "plan/cuda/flash_attention_backward.h"
#include "plan/cuda/selective_v_attention.h"

namespace diffqkv {

// Writes the new tokens, K rotated if cos and sin are given, and updates v_stats: sum and largest L2 norm of the V rows
// written, added in token order. A token whose position is -1, beyond the capacity or in an unmapped block is not
// written. Two tokens of a call must not have the same slot. cudaErrorInvalidValue where K and V dtypes differ or d_v
// exceeds kMaxHeadDim.
int cuda_kv_cache_update(const KvCacheUpdateParams& p, void* stream);

// Both take contiguous operands of fp32, fp16 or bf16.
int cuda_swiglu(const SwigluParams& p, const DeviceFacts& facts, void* stream);
int cuda_swiglu_backward(const SwigluParams& p, const DeviceFacts& facts, void* stream);

// Takes fp16 and bf16, up to kMaxDecodeQueries queries. plan: plan_cuda_decode_attention of the same params. workspace:
// plan.workspace_floats floats, aligned to 16 bytes. tickets: plan.tickets zeros, which are zeros again afterwards.
int cuda_decode_attention(const AttentionParams& p, const CudaDecodeAttentionPlan& plan, void* workspace,
                          uint32_t* tickets, void* stream);

// Takes K in rows. plan: plan_cuda_flash_attention of the same params. Head dimensions up to kMaxHeadDim, sequences up
// to kMaxFlashAttentionTokens; cudaErrorInvalidValue beyond them, cudaErrorInvalidConfiguration for 2^31 blocks or
// more.
int cuda_flash_attention(const AttentionParams& p, const CudaFlashAttentionPlan& plan, void* stream);

// Takes a cache in rows, of fp32, fp16 or bf16. plan: plan_cuda_selective_v_attention of the same params. workspace:
// plan.workspace_bytes, aligned to 256, of any content. cudaErrorInvalidConfiguration for 2^31 blocks or more.
int cuda_selective_v_attention(const SelectiveVAttentionParams& p, const CudaSelectiveVAttentionPlan& plan,
                               void* workspace, void* stream);

// plan: plan_cuda_flash_attention_backward of the same params, which have no block table. workspace:
// plan.workspace_bytes, aligned to 256, of any content. cudaErrorInvalidConfiguration for 2^31 blocks or more.
int cuda_flash_attention_backward(const FlashAttentionBackwardParams& p, const CudaFlashAttentionBackwardPlan& plan,
                                  void* workspace, void* stream);

// Finds zeros for the tickets of a kernel about to be launched on the current device, whose number this is; null where
// the caller has to bring zeros of its own. captured: the launch becomes part of a graph.
int cuda_tickets(int device, int64_t count, bool captured, uint32_t** first);

// The facts that planners ask for, of the device with this number.
int cuda_device_facts(int device, DeviceFacts* facts);

// The text of an error that a function of this header returned.
const char* cuda_error_string(int error);

// Whether the stream is being captured, when host-side checks of device data are impossible.
int cuda_is_capturing(void* stream, bool* capturing);

}  // namespace diffqkv
