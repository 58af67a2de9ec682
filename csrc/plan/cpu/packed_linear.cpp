#include "plan/cpu/packed_linear.h"

#include <algorithm>

#include "plan/cpu/scratch.h"

namespace diffqkv {
namespace {

// The rows of an item stay in the L2 cache while panels go by.
constexpr int64_t kRowBytes = 512 * 1024;
constexpr int64_t kLeastRowBlock = 4 * kLinearTileRows, kMostRowBlock = 20 * kLinearTileRows;
// Where many rows share a panel, a range of so many panels keeps both threads on weights that the L3 cache holds.
constexpr int64_t kPanelsOfManyRows = 8;
// Ranges of panels per thread where there are few rows: long, since each is one stretch of memory to read.
constexpr int64_t kRangesPerThread = 4;
// Elements of x that a thread rewrites before a second one pays off.
constexpr int64_t kElementsPerThread = 32768;

}  // namespace

PackedLinearPlan plan_packed_linear(const PackedLinearParams& p, int64_t threads) {
  PackedLinearPlan plan;
  if (p.rows == 0) return plan;
  const int64_t word_bytes = p.dtype == DType::f32 && !p.is_integer() ? 4 : 2;
  plan.row_block =
      std::clamp(kRowBytes / (word_bytes * std::max<int64_t>(1, p.in_features)) / kLinearTileRows * kLinearTileRows,
                 kLeastRowBlock, kMostRowBlock);
  plan.row_blocks = ceil_div(p.rows, plan.row_block);
  plan.row_block = round_up(ceil_div(p.rows, plan.row_blocks), kLinearTileRows);
  plan.row_blocks = ceil_div(p.rows, plan.row_block);
  const int64_t panels = p.panels();
  plan.panels_per_item = std::max<int64_t>(1, ceil_div(panels, kRangesPerThread * std::max<int64_t>(1, threads)));
  if (p.rows > kLinearTileRows) plan.panels_per_item = std::min(plan.panels_per_item, kPanelsOfManyRows);
  plan.items = ceil_div(panels, plan.panels_per_item) * plan.row_blocks;
  plan.threads =
      useful_threads(2.0 * double(p.rows) * double(p.in_features) * double(p.out_features), plan.items, threads);
  plan.row_threads = std::clamp<int64_t>(p.rows * p.in_features / kElementsPerThread, 1, plan.threads);
  const int64_t widened = p.is_integer() ? ceil_div(p.group_size, 2) : kLinearWords;
  plan.scratch_bytes = aligned(4 * kPanelFeatures * std::min(p.rows, plan.row_block)) +
                       aligned(4 * kPanelFeatures * std::max(widened, kLinearWords)) + kAlignmentSlack;
  return plan;
}

}  // namespace diffqkv
