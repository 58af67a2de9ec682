#include "cuda/attention.h"
#include "plan/cuda/decode_attention.h"

namespace diffqkv::cuda {

int run(const AttentionParams& p, const Launch& launch) {
  if (p.batch == 0 || p.s_q == 0) return cudaSuccess;
  return cuda_decode_attention_takes(p) ? decode_attention(p, launch) : flash_attention(p, launch);
}

}  // namespace diffqkv::cuda
