// How selective_v_attention is cut into launches and blocks on CUDA: a pure function of shapes and device. It looks at
// the cache's capacity, never at a length, so that a captured graph serves every length. No bit of a result depends on
// the plan, so that it may follow the batch.
#pragma once
#include "params/params.h"
#include "plan/cuda/device_facts.h"

namespace diffqkv {

inline constexpr int kSelectiveVAttentionThreads = 256, kSelectiveVAttentionWarps = kSelectiveVAttentionThreads / 32;
// Tokens whose softmax statistics are kept together, and those of a block of the pass over V. Both are part of the
// numerics.
inline constexpr int kSelectiveVAttentionQuantum = 512, kSelectiveVAttentionPartTokens = 2048;
// Scoring: a block takes a chunk of tokens and this many query rows of a K head, the columns of a matrix product whose
// rows are tokens. A warp brings a tile of tokens to shared memory slice by slice of the K rows, through a ring.
inline constexpr int kSelectiveVAttentionColumns = 8, kSelectiveVAttentionTileTokens = 16;
inline constexpr int kSelectiveVAttentionSliceBytes = 128, kSelectiveVAttentionStages = 3;
inline constexpr int kSelectiveVAttentionRowBytes =
    kSelectiveVAttentionSliceBytes + 16;  // an odd number of 16-byte pieces: no bank conflicts
inline constexpr int kSelectiveVAttentionRingBytes =
    kSelectiveVAttentionStages * kSelectiveVAttentionTileTokens * kSelectiveVAttentionRowBytes;
// The distance from a column of a quantum's scores to the next: neighbouring columns lie in different banks.
inline constexpr int kSelectiveVAttentionScoreStride = kSelectiveVAttentionQuantum + 4;
inline constexpr int kSelectiveVAttentionStep = 32;  // dimensions multiplied at a time, zeros after the last
// Bytes of a query row in shared memory: whole steps, and an odd number of 16-byte pieces.
DIFFQKV_HOST_DEVICE constexpr int selective_v_attention_q_bytes(int d_k, int element_bytes) {
  return (d_k + kSelectiveVAttentionStep - 1) / kSelectiveVAttentionStep * kSelectiveVAttentionStep * element_bytes +
         16;
}
// Bytes of shared memory that a gathering block needs beside candidates and list.
inline constexpr int kSelectiveVAttentionGatherBytes = 13 * 1024;

struct CudaSelectiveVAttentionPlan {
  float exp2_scale = 0;  // scores times this are exponents of 2
  int32_t chunk_tokens = kSelectiveVAttentionQuantum, chunks = 0, quanta = 0;
  int32_t candidates = 0;                               // that a chunk leaves of a row, zeros after fewer; even
  int32_t wanted = 0;                                   // best rows that a result may use
  int32_t forced = 0;                                   // keep_first and keep_last rows of a query row
  int32_t parts = 0;                                    // of a V head in the pass over V; 0: no pass
  bool k_vectors = false, v_vectors = false;            // rows can be read 16 bytes at a time
  bool keys_in_shared = false, list_in_shared = false;  // candidates and rows to read of a query row, gathering
  int64_t score_shared = 0, gather_shared = 0;          // bytes of shared memory
  // A launch takes so many batch entries and queries, which bounds the workspace.
  int64_t entries = 1, queries = 1;
  // Byte offsets into the workspace: per query row of a launch statistics [quanta, 2], candidates [chunks, candidates],
  // scores of forced keys, and the list [wanted] of rows to read with weights; for the whole call, where v_stats are
  // not given, [batch, n_v, parts, d_v + 1].
  int64_t keys_at = 0, forced_at = 0, list_at = 0, parts_at = 0, workspace_bytes = 0;

  bool empty() const { return entries == 0 || queries == 0; }
};

// workspace_bytes bounds what a launch takes; one query of one entry may need more.
inline constexpr int64_t kSelectiveVAttentionWorkspaceBytes = int64_t{256} << 20;
CudaSelectiveVAttentionPlan plan_cuda_selective_v_attention(
    const SelectiveVAttentionParams& params, const DeviceFacts& facts,
    int64_t workspace_bytes = kSelectiveVAttentionWorkspaceBytes);

}  // namespace diffqkv
