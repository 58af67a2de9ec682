// How decode_attention is cut into blocks on a GPU: a pure function of shapes, capacity and device.
#pragma once
#include <cstdint>

#include "params/params.h"
#include "plan/cuda/device_facts.h"

namespace diffqkv {

inline constexpr int32_t kDecodeAttentionThreads = 128;
inline constexpr int32_t kDecodeAttentionWarps = kDecodeAttentionThreads / 32;
inline constexpr int32_t kDecodeAttentionColumns = 8;  // of a matrix product's right operand: one tile of query rows
inline constexpr int64_t kMaxDecodeAttentionQueries = 16;  // per q head; more go to flash_attention's kernel

inline constexpr int64_t kMaxGrid = 65535;  // blocks in the second and third direction

// What a kernel of each size holds in registers.
struct DecodeAttentionSize {
  int32_t tiles;  // of columns, whose scores a thread holds
  int32_t jobs;   // accumulators of 16 dimensions x 8 columns per warp
};
inline constexpr DecodeAttentionSize kSmallDecodeAttention{1, 8}, kLargeDecodeAttention{8, 8};

// Some neighbouring q heads of a KV group, and the K and V heads that they read. Column c of a chunk is query c % s_q
// of its q head c / s_q.
struct DecodeAttentionChunk {
  int32_t first_q = 0, q_heads = 0;  // absolute numbers of heads
  int32_t first_k = 0, k_heads = 0;
  int32_t first_v = 0, v_heads = 0;

  DIFFQKV_HOST_DEVICE static DecodeAttentionChunk of(const HeadGroups& heads, int64_t group, int64_t heads_per_chunk,
                                                     int64_t chunk) {
    const int64_t first = group * heads.q_per_group() + chunk * heads_per_chunk;
    const int64_t end_of_group = (group + 1) * heads.q_per_group(), wanted_end = first + heads_per_chunk;
    const int64_t end = wanted_end < end_of_group ? wanted_end : end_of_group;
    const int64_t k = heads.k_head(first), v = heads.v_head(first);
    return {static_cast<int32_t>(first), static_cast<int32_t>(end - first),
            static_cast<int32_t>(k),     static_cast<int32_t>(heads.k_head(end - 1) - k + 1),
            static_cast<int32_t>(v),     static_cast<int32_t>(heads.v_head(end - 1) - v + 1)};
  }
};

// A block is one split of one chunk of one batch entry's KV group: it walks the split's tokens tile by tile, with
// `stages` tiles in shared memory. The split's size follows the capacity and the heads, never the batch or the lengths:
// the results' bits depend on neither, and a captured call serves every length.
struct CudaDecodeAttentionPlan {
  int32_t heads_per_chunk = 0, chunks = 0;  // per KV group
  int32_t columns = 0, column_tiles = 0;    // of the largest chunk
  int32_t tiles_per_v_head = 0;             // column tiles that a V head's columns meet, at most
  bool large = false;                       // kLargeDecodeAttention
  int32_t k_stride = 0, v_stride = 0;       // elements from a token to the next in shared memory
  int32_t q_stride = 0, p_stride = 0;       // from a column to the next, of a token's probabilities to the next
  int32_t tile_tokens = 0, stages = 0;
  int32_t split_tokens = 0, splits = 0;  // splits: of a cache filled to its capacity
  bool bulk = false;                     // whole rows by the copy engine
  bool aligned = false;                  // rows of K and V begin at multiples of 16 bytes
  int64_t blocks = 0, shared_bytes = 0;
  int64_t partial_floats = 0;  // of a chunk and split: maximum, sum and result of each column
  int64_t workspace_floats = 0, tickets = 0;
  double flops = 0, bytes = 0;  // at full capacity
};

// Whether the kernel takes a call; others go to that of flash_attention. A packed sequence takes the same kernel
// whatever lies beside it.
constexpr bool cuda_decode_attention_takes(const AttentionParams& p) {
  return (p.q.dtype == DType::f16 || p.q.dtype == DType::bf16) && p.s_q <= kMaxDecodeAttentionQueries &&
         p.cu_seqlens_q == nullptr && p.dropout.threshold == 0 && p.batch <= kMaxGrid && p.heads.n_q <= kMaxGrid;
}

CudaDecodeAttentionPlan plan_cuda_decode_attention(const AttentionParams& params, const DeviceFacts& facts);

}  // namespace diffqkv
