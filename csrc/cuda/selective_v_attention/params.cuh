// What the kernels of selective_v_attention are given.
#pragma once
#include "cuda/device.cuh"
#include "params/selective_v_attention.h"
#include "plan/cuda/selective_v_attention.h"

namespace diffqkv::device::selective_v_attention {

struct Params {
  SelectiveVAttentionParams sp;
  CudaSelectiveVAttentionPlan plan;
  char* workspace;
  int64_t first_entry, first_query, entries, queries;  // of this launch

  DIFFQKV_HOST_DEVICE int64_t rows() const { return entries * sp.attention.heads.n_q * queries; }
  DIFFQKV_HOST_DEVICE int64_t columns() const { return sp.attention.heads.q_per_k() * queries; }  // of a K head
  DIFFQKV_HOST_DEVICE int64_t column_tiles() const {
    return (columns() + kSelectiveVAttentionColumns - 1) / kSelectiveVAttentionColumns;
  }
  // What the workspace holds of query row `row` of this launch: maximum and sum of every quantum, candidates of every
  // chunk, scores of the forced keys, tokens and weights of the rows to read.
  DIFFQKV_HOST_DEVICE float* mass(int64_t row) const {
    return reinterpret_cast<float*>(workspace) + row * plan.quanta * 2;
  }
  DIFFQKV_HOST_DEVICE uint64_t* keys(int64_t row) const {
    return reinterpret_cast<uint64_t*>(workspace + plan.keys_at) + row * plan.chunks * plan.candidates;
  }
  DIFFQKV_HOST_DEVICE float* forced(int64_t row) const {
    return reinterpret_cast<float*>(workspace + plan.forced_at) + row * plan.forced;
  }
  DIFFQKV_HOST_DEVICE char* list(int64_t row) const { return workspace + plan.list_at + row * plan.wanted * 8; }
  // Sum of the rows and largest norm of a part of a V head.
  DIFFQKV_HOST_DEVICE float* part(int64_t batch_v_head, int64_t i) const {
    return reinterpret_cast<float*>(workspace + plan.parts_at) +
           (batch_v_head * plan.parts + i) * (sp.attention.d_v + 1);
  }
};

}  // namespace diffqkv::device::selective_v_attention
