// How the CPU cuts selective_v_attention into work items: a pure function of shapes and thread count.
#pragma once
#include "plan/cpu/attention.h"

namespace diffqkv {

// Query rows of a V head that one item selects and fetches.
inline constexpr int64_t kRowsPerFetch = 4;

// Scores come by chunks of splits, which leave a list of candidates per row; then selection and fetch by V head and
// block of kRowsPerFetch rows.
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

// max_keys: the longest sequence of the call. threads: those of the caller's pool.
SelectiveVAttentionPlan plan_selective_v_attention(const SelectiveVAttentionParams& params, int64_t max_keys,
                                                   int64_t threads);

}  // namespace diffqkv
