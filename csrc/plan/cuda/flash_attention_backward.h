// How the gradients of flash_attention are cut into blocks on a GPU: a pure function of shapes and device.
#pragma once
#include <cstdint>

#include "params/params.h"
#include "plan/cuda/device_facts.h"

namespace diffqkv {

inline constexpr int32_t kFlashAttentionBackwardWarps = 4;   // of a block, each with its share of the block's rows
inline constexpr int32_t kFlashAttentionBackwardBlocks = 2;  // to a multiprocessor, as far as registers go

// A block of the key kernel owns `rows` keys and walks the queries by `step`, one of the query kernel the other way
// round. A warp takes a multiple of 16 rows: 32 read shared memory half as often per product as 16.
struct FlashAttentionBackwardTile {
  int32_t rows, step;
};
// Kernels on matrix products, for fp16 and bf16.
struct FlashAttentionBackwardVariant {
  int32_t d_k, d_v;  // head dimensions that fit; smaller ones are padded with zeros in shared memory
  FlashAttentionBackwardTile keys, queries;

  DIFFQKV_HOST_DEVICE constexpr bool holds(int64_t k, int64_t v) const { return k <= d_k && v <= d_v; }
  // Registers hold the gradients of K and V at once; else a block of keys computes one of them.
  DIFFQKV_HOST_DEVICE constexpr bool both() const { return d_k + d_v <= 256; }
};
// Smaller ones first, for the dimensions of flash_attention's kernels. Bits depend on the variant, which is a function
// of the dimensions alone, and on chunk_heads. 32 rows of a gradient take d registers, of at most 255.
inline constexpr FlashAttentionBackwardVariant kFlashAttentionBackwardVariants[] = {
    {32, 64, {128, 32}, {128, 64}},  {64, 64, {128, 32}, {128, 64}}, {64, 128, {64, 32}, {128, 32}},
    {128, 128, {64, 32}, {128, 32}}, {256, 256, {64, 16}, {64, 16}},
};
inline constexpr int32_t kFlashAttentionBackwardVariantCount =
    sizeof(kFlashAttentionBackwardVariants) / sizeof(kFlashAttentionBackwardVariants[0]);

struct CudaFlashAttentionBackwardPlan {
  int32_t variant = -1;   // of kFlashAttentionBackwardVariants; -1: the plain kernels, for fp32 and fp64
  bool features = false;  // softcap or dropout
  bool aligned = false;   // rows of the inputs begin at multiples of 16 bytes
  int32_t threads = 0;    // of a block of the key and the query kernel
  // Tiles of a walk in shared memory: 2 where the next one comes while one is computed with.
  int32_t key_stages = 0, query_stages = 0;
  int64_t key_shared_bytes = 0, query_shared_bytes = 0;
  // A block of keys walks chunk_heads q heads of its group, a number that the batch does not change. Where the q heads
  // of a K or V head are in several chunks, their sums go to fp32 slots of the workspace and are added in the order of
  // the chunks; 1 slot: none is needed.
  int64_t chunk_heads = 0, chunks = 1, k_slots = 1, v_slots = 1;
  // Grids: sums over rows; dK and dV, of the plain kernels dK alone; their dV; dQ; sums of slots.
  int64_t row_blocks = 0, key_blocks = 0, value_blocks = 0, query_blocks = 0, k_sum_blocks = 0, v_sum_blocks = 0;
  int64_t partial_k = 0, partial_v = 0;  // bytes of the workspace before the slots; first come the facts of rows
  int64_t workspace_bytes = 0;
  double flops = 0;
};

CudaFlashAttentionBackwardPlan plan_cuda_flash_attention_backward(const FlashAttentionBackwardParams& params,
                                                                  const DeviceFacts& facts);

}  // namespace diffqkv
