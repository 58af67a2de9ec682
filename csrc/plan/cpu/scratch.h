// Sizes that all CPU planners reckon with: pieces of a thread's scratch, and how many threads pay.
#pragma once
#include <algorithm>
#include <cstdint>

#include "params/arithmetic.h"
#include "params/params.h"
#include "plan/cpu/attention.h"

namespace diffqkv {

inline constexpr int64_t kAlignmentSlack = 64 * 64;  // for the beginnings of so many pieces

// Pieces of scratch begin at multiples of 64 bytes.
inline int64_t aligned(int64_t bytes) { return round_up(bytes, 64); }

// Bytes of a packed panel and the rows that it is packed from.
inline int64_t panel_bytes(int64_t d) { return 2 * aligned(4 * kPanelTokens * d); }

// A parallel region costs about 1 us; below kFlopsPerThread a second thread does not pay for it.
inline int64_t useful_threads(double flops, int64_t items, int64_t threads) {
  constexpr double kFlopsPerThread = 2e5;
  const int64_t useful = static_cast<int64_t>(flops / kFlopsPerThread);
  return std::clamp<int64_t>(std::min(useful, items), 1, std::max<int64_t>(1, threads));
}

}  // namespace diffqkv
