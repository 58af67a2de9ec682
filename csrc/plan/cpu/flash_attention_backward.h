// How the CPU cuts flash_attention_backward into work items: a pure function of shapes and thread count.
#pragma once
#include <cstdint>

#include "params/params.h"

namespace diffqkv {

// An item is a block of keys x a KV group. It walks the queries that see its keys, head by head, keeps the
// gradients of its K and V rows to itself, and adds to those of the queries in the order of the key blocks.
struct FlashAttentionBackwardPlan {
  int64_t groups = 0;
  int64_t block_k = 0, key_blocks = 0;    // keys of an item; items per group
  int64_t block_q = 0, query_blocks = 0;  // queries that an item takes at a time
  int64_t items = 0;
  int64_t threads = 1;        // worth starting
  int64_t scratch_bytes = 0;  // per thread
  int64_t dq_floats = 0;      // 16-bit inputs: dq while it is summed up
  double flops = 0;
};
// A multiple of the rows that share their scores. Part of the numerics, like the keys of a block.
inline constexpr int64_t kFlashAttentionBackwardQueries = 96;
inline constexpr int64_t kMaxFlashAttentionBackwardKeys = 256;
// The distance from a row of a tile of scores to the next: no power of two, or the rows of a column would share their
// cache lines.
inline constexpr int64_t kFlashAttentionBackwardStride = kMaxFlashAttentionBackwardKeys + 16;

// threads: those of the caller's pool.
FlashAttentionBackwardPlan plan_flash_attention_backward(const AttentionParams& params, int64_t threads);

}  // namespace diffqkv
