// How the CPU cuts packed_linear into work items: a pure function of shapes and thread count.
#pragma once
#include <cstdint>

#include "params/params.h"

namespace diffqkv {

// Words of a panel whose products are summed up before they join a result: sums of sums round less. A part of the
// numerics, as is the group of integer weights.
inline constexpr int64_t kLinearWords = 128;
// Rows of x lie in tiles of at most so many, the words of a block of each side by side: rows apart by a power of two
// would meet in the L1 cache.
inline constexpr int64_t kLinearTileRows = 12, kLinearBlock = 4;

struct PackedLinearPlan {
  int64_t row_block = 0;        // rows of x of an item
  int64_t panels_per_item = 0;  // of weights
  int64_t row_blocks = 0;
  int64_t items = 0;          // [panel ranges, row_blocks]: items in a row read the same weights
  int64_t threads = 1;        // worth starting
  int64_t row_threads = 1;    // for the rows of x, where they are rewritten first
  int64_t scratch_bytes = 0;  // per thread
};

// threads: those of the caller's pool.
PackedLinearPlan plan_packed_linear(const PackedLinearParams& params, int64_t threads);

}  // namespace diffqkv
