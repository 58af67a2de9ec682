// The CUDA launch API: parameters and a stream in, a cudaError_t (as int, 0 is success) out. Compiled when DIFFQKV_CUDA
// is on. Launches never allocate and never synchronise, so they can be captured in a CUDA graph. No torch and no CUDA
// header here. A stream is a cudaStream_t; the current device must be the stream's.
#pragma once
#include "diffqkv/cuda_backward_plan.h"
#include "diffqkv/cuda_decode_plan.h"
#include "diffqkv/cuda_prefill_plan.h"
#include "diffqkv/cuda_select_plan.h"
#include "diffqkv/device_facts.h"
#include "diffqkv/params.h"

namespace diffqkv {

// Writes the new tokens, K rotated if cos and sin are given, and updates v_stats: sum and largest L2 norm of the V rows
// written, added in token order. A token whose position is -1, beyond the capacity or in an unmapped block is not
// written. Two tokens of a call must not have the same slot. cudaErrorInvalidValue where K and V dtypes differ or d_v
// exceeds kMaxHeadDim.
DIFFQKV_API int cuda_kv_cache_update(const CacheUpdateParams& p, void* stream);

// Contiguous operands of fp32, fp16 or bf16.
DIFFQKV_API int cuda_swiglu(const SwigluParams& p, const DeviceFacts& facts, void* stream);
DIFFQKV_API int cuda_swiglu_backward(const SwigluParams& p, const DeviceFacts& facts, void* stream);

// fp16 and bf16, up to kMaxDecodeQueries queries. plan: plan_cuda_decode of the same params. workspace:
// plan.workspace_floats floats, aligned to 16 bytes. tickets: plan.tickets zeros, which are zeros again afterwards.
DIFFQKV_API int cuda_decode_attention(const AttentionParams& p, const CudaDecodePlan& plan, void* workspace,
                                      uint32_t* tickets, void* stream);

// K in rows. plan: plan_cuda_prefill of the same params. Head dimensions up to kMaxHeadDim, sequences up to
// kMaxPrefillTokens; cudaErrorInvalidValue beyond them, cudaErrorInvalidConfiguration for 2^31 blocks or more.
DIFFQKV_API int cuda_flash_attention(const AttentionParams& p, const CudaPrefillPlan& plan, void* stream);

// A cache in rows, of fp32, fp16 or bf16. plan: plan_cuda_select of the same params. workspace: plan.workspace_bytes,
// aligned to 256, of any content. cudaErrorInvalidConfiguration for 2^31 blocks or more.
DIFFQKV_API int cuda_selective_v_attention(const SelectiveVParams& p, const CudaSelectPlan& plan, void* workspace,
                                           void* stream);

// plan: plan_cuda_backward of the same params, which have no block table. workspace: plan.workspace_bytes, aligned to
// 256, of any content. cudaErrorInvalidConfiguration for 2^31 blocks or more.
DIFFQKV_API int cuda_flash_attention_backward(const AttentionBackwardParams& p, const CudaBackwardPlan& plan,
                                              void* workspace, void* stream);

// Zeros for the tickets of a kernel about to be launched on the current device, whose number this is; null where the
// caller has to bring zeros of its own. captured: the launch becomes part of a graph.
DIFFQKV_API int cuda_tickets(int device, int64_t count, bool captured, uint32_t** first);

// Of the device with this number.
DIFFQKV_API int cuda_device_facts(int device, DeviceFacts* facts);

// Text of an error that a function of this header returned.
DIFFQKV_API const char* cuda_error_string(int error);

// Whether the stream is being captured, when host-side checks of device data are impossible.
DIFFQKV_API int cuda_is_capturing(void* stream, bool* capturing);

}  // namespace diffqkv
