// How the CPU cuts an attention call into work items: a pure function of shapes and thread count.
#pragma once
#include <cstdint>

#include "params/params.h"

namespace diffqkv {

// Tokens that share one softmax step in prefill. Part of the numerics: results depend on it, so it is the same
// everywhere.
inline constexpr int64_t kKeyTile = 256;
// Tokens that one item of the split kernel reads, and softmax step of decode. Fixed, so that neither the batch nor the
// number of threads changes a result; long, because each head's share of it is one stretch of memory, and short
// stretches never bring the hardware prefetchers up to speed; a thread's scores of it fit the L2 cache.
inline constexpr int64_t kSplitTokens = 1024;

// The state of a row before its un-normalised result: maximum, sum and norm of the softmax.
inline constexpr int64_t kPartialHeader = 3;

enum class AttentionKernel : int32_t {
  block = 0,  // item = block of queries x some heads of a group, walking all its keys: prefill
  split = 1,  // item = all query rows of a KV group x a range of keys, merged afterwards: decode
  plain = 2,  // item = q head, a row of scores at a time: float64
};

// Arithmetic of the (query, key) pairs that the window lets through, and every operand read or written once.
struct AttentionCost {
  double flops = 0, bytes = 0;
};
// max_keys: the longest sequence of the call.
AttentionCost attention_cost(const AttentionParams& params, int64_t max_keys);

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

// How selective V cuts its work: scores by chunks of splits, which leave a list of candidates per row; then selection
// and fetch by V head and block of kRowsPerFetch rows.
struct SelectiveVAttentionPlan {
  AttentionPlan dense;         // of entries that read all of V; its splits are also the quanta of the softmax mass
  int64_t chunk_splits = 0;    // splits of a chunk
  int64_t chunks = 0;          // per group
  int64_t candidates = 0;      // a chunk keeps per row
  int64_t candidate_room = 0;  // of a row while its chunk is scored
  int64_t forced = 0;          // keep_first and keep_last rows per query row
  int64_t listed_room = 0;     // candidates of all chunks of a row, with the forced ones
  int64_t used_room = 0;       // rows that a query row fetches
  int64_t items = 0;           // of scoring
  int64_t fetch_items = 0;
  int64_t scratch_bytes = 0;  // per thread
};
inline constexpr int64_t kRowsPerFetch = 4;
// With max_error a row may fetch this many times top_k before dense attention is cheaper.
inline constexpr int64_t kMaxAdded = 4;

SelectiveVAttentionPlan plan_selective_v_attention(const SelectiveVAttentionParams& params, int64_t max_keys,
                                                   int64_t threads);

// max_keys: the longest sequence of the call. threads: those of the caller's pool.
AttentionPlan plan_attention(const AttentionParams& params, int64_t max_keys, int64_t threads);

// The backward pass: item = block of keys x KV group. It walks the queries that see its keys, head by head, keeps the
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
inline constexpr int64_t kBackwardQueries = 96;
inline constexpr int64_t kMaxBackwardKeys = 256;
// From a row of a tile of scores to the next: no power of two, or the rows of a column would share their cache lines.
inline constexpr int64_t kBackwardStride = kMaxBackwardKeys + 16;

FlashAttentionBackwardPlan plan_flash_attention_backward(const AttentionParams& params, int64_t threads);

constexpr int64_t dtype_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

}  // namespace diffqkv
