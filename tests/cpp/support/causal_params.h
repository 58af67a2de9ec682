// The params of a causal attention call, without tensors: what a planner looks at.
#pragma once
#include "params/params.h"

inline diffqkv::AttentionParams causal_params(diffqkv::HeadGroups heads, int64_t batch, int64_t s_q, int64_t s_k,
                                              int64_t d, diffqkv::DType dtype = diffqkv::DType::f32) {
  diffqkv::AttentionParams p;
  p.heads = heads;
  p.batch = batch, p.s_q = s_q, p.s_k = s_k, p.d_k = p.d_v = d;
  p.q.dtype = dtype;
  p.window_right = 0;
  return p;
}
