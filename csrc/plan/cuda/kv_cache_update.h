// How one kv_cache_update launch is cut into blocks: a pure function of the parameters.
#pragma once
#include <cstdint>

#include "params/params.h"

namespace diffqkv {

inline constexpr int32_t kKvCacheUpdateThreads = 256;  // per block; v_stats take a thread per dimension
static_assert(kKvCacheUpdateThreads >= kMaxHeadDim);

// A unit is what a thread moves at once: `width` neighbouring dimensions of one head of one token, or of a K head under
// RoPE the two such vectors that rotate together. A tile is `tile_tokens` new tokens of one (batch entry, KV group), K
// and V. Blocks [0, stats_blocks) each keep the v_stats of one (batch entry, V head), the others copy one tile each.
struct CudaKvCacheUpdatePlan {
  int32_t groups = 0, k_heads = 0, v_heads = 0;  // heads per group
  int32_t k_head_units = 0, v_head_units = 0;    // per head and token
  int32_t width = 1;                             // elements of a vector: 16 bytes, or 1
  int32_t tile_tokens = 1, token_tiles = 0;
  int64_t stats_blocks = 0, blocks = 0;  // blocks: in all
};

CudaKvCacheUpdatePlan plan_cuda_kv_cache_update(const KvCacheUpdateParams& p);

}  // namespace diffqkv
