#include "ops/ops_cuda.h"

STABLE_TORCH_LIBRARY_IMPL(diffqkv, CUDA, m) {
  DIFFQKV_IMPL(m, flash_attention, diffqkv::flash_attention_cuda);
  DIFFQKV_IMPL(m, flash_attention_varlen, diffqkv::flash_attention_varlen_cuda);
  DIFFQKV_IMPL(m, decode_attention, diffqkv::decode_attention_cuda);
  DIFFQKV_IMPL(m, flash_attention_backward, diffqkv::flash_attention_backward_cuda);
  DIFFQKV_IMPL(m, flash_attention_varlen_backward, diffqkv::flash_attention_varlen_backward_cuda);
  DIFFQKV_IMPL(m, kv_cache_update, diffqkv::kv_cache_update_cuda);
  DIFFQKV_IMPL(m, selective_v_attention, diffqkv::selective_v_attention_cuda);
  DIFFQKV_IMPL(m, swiglu, diffqkv::swiglu_cuda);
  DIFFQKV_IMPL(m, swiglu_backward, diffqkv::swiglu_backward_cuda);
}
