// How the CPU cuts flash_attention and decode_attention into work items: a pure function of shapes and thread count.
#pragma once
#include <cstdint>

#include "params/params.h"

namespace diffqkv {

// Tokens that share one softmax step of the block kernel. Part of the numerics: results depend on it, so it is the same
// everywhere.
inline constexpr int64_t kKeyTile = 256;
// Tokens that one item of the split kernel reads, in one softmax step. Fixed, so that neither the batch nor the
// number of threads changes a result; long, because each head's share of it is one stretch of memory, and short
// stretches never bring the hardware prefetchers up to speed; a thread's scores of it fit the L2 cache.
inline constexpr int64_t kSplitTokens = 1024;

// What the kernels of every instruction set keep to: lanes of a vector, by which reads and writes may overshoot, and
// rows whose scores an item holds at once.
inline constexpr int64_t kLanes = 16, kScoreRows = 12;

// The state of a row before its un-normalised result: maximum, sum and norm of the softmax.
inline constexpr int64_t kPartialHeader = 3;

enum class AttentionKernel : int32_t {
  block = 0,  // item = block of queries x some heads of a group, walking all its keys: flash_attention
  split = 1,  // item = all query rows of a KV group x a range of keys, merged afterwards: decode_attention
  plain = 2,  // item = q head, a row of scores at a time: float64
};

struct AttentionPlan {
  AttentionKernel kernel = AttentionKernel::block;
  int64_t groups = 0;          // KV groups per batch entry
  int64_t rows = 0;            // query rows of a group: n_q / G * s_q
  int64_t block_q = 0;         // block: queries of an item
  int64_t heads_per_item = 0;  // block: q heads of an item
  int64_t head_chunks = 0;     // block: items that share the heads of a group
  int64_t splits = 0;          // split: key ranges per group
  int64_t items = 0;
  int64_t threads = 1;         // worth starting
  int64_t scratch_bytes = 0;   // per thread
  int64_t partial_floats = 0;  // split, if splits > 1: [items, rows, kPartialHeader + d_v]
  double flops = 0, bytes = 0;
};

// max_keys: the longest sequence of the call. threads: those of the caller's pool.
AttentionPlan plan_attention(const AttentionParams& params, int64_t max_keys, int64_t threads);

// The plan of AttentionKernel::split, whatever the shape.
AttentionPlan plan_split_attention(const AttentionParams& params, int64_t max_keys, int64_t threads);

}  // namespace diffqkv
