// What the planner and the kernels of flash_attention_backward have to agree in.
#pragma once
#include "plan/cuda/flash_attention_backward.h"
#include "plan/cuda/tile_stride.h"

namespace diffqkv {

inline constexpr int kRowSumThreads = 256, kSlotSumThreads = 256, kPlainFlashAttentionBackwardThreads = 128;
inline constexpr int64_t kSlotSumWidth = 4;  // elements that a thread adds up

// Lanes that share the sum over a row of d elements: each takes 16 bytes at a time.
DIFFQKV_HOST_DEVICE constexpr int row_sum_lanes(int64_t d, int64_t element_bytes) {
  int lanes = 8;
  while (lanes < 32 && lanes * 16 < d * element_bytes) lanes *= 2;
  return lanes;
}

// Shared memory: what a block knows of itself, lse and delta of queries, and the tiles.
inline constexpr int64_t kFlashAttentionBackwardBlockBytes = 128, kRowFactsBytes = 8;
constexpr int64_t tile_bytes(const FlashAttentionBackwardVariant& v, int64_t rows) {
  return 2 * rows * (tile_stride(v.d_k) + tile_stride(v.d_v));
}
constexpr int64_t key_shared_bytes(const FlashAttentionBackwardVariant& v, int64_t stages) {
  return kFlashAttentionBackwardBlockBytes + kRowFactsBytes * stages * v.keys.step +
         tile_bytes(v, v.keys.rows + stages * v.keys.step);
}
constexpr int64_t query_shared_bytes(const FlashAttentionBackwardVariant& v, int64_t stages) {
  return kFlashAttentionBackwardBlockBytes + kRowFactsBytes * v.queries.rows +
         tile_bytes(v, v.queries.rows + stages * v.queries.step);
}

}  // namespace diffqkv
