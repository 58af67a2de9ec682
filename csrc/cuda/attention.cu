#include "cuda/attention.h"
#include "plan/cuda/decode_attention.h"
#include "plan/cuda/flash_attention.h"

namespace diffqkv::cuda {

int run(const AttentionParams& p, const Launch& launch) {
  if (p.d_k > kMaxHeadDim || p.d_v > kMaxHeadDim || p.k.layout != KLayout::rows || p.s_q > kMaxFlashAttentionTokens ||
      p.s_k > kMaxFlashAttentionTokens)
    return cudaErrorInvalidValue;
  if (p.batch == 0 || p.s_q == 0) return cudaSuccess;
  return cuda_decode_attention_takes(p) ? decode_attention(p, launch) : flash_attention(p, launch);
}

}  // namespace diffqkv::cuda
