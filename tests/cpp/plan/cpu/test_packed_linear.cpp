#include <algorithm>
#include <cstdint>
#include <vector>

#include "plan/cpu/packed_linear.h"
#include "support/catch.h"

using namespace diffqkv;

namespace {

PackedLinearParams linear(int64_t rows, int64_t in_features, int64_t out_features, WeightForm form = WeightForm::f32) {
  PackedLinearParams p;
  p.rows = rows, p.in_features = in_features, p.out_features = out_features;
  p.form = form;
  if (p.is_integer()) p.group_size = 32;
  if (form == WeightForm::bf16) p.dtype = DType::bf16;
  return p;
}

constexpr WeightForm kForms[] = {WeightForm::f32, WeightForm::bf16, WeightForm::int4};

}  // namespace

TEST_CASE("packed_linear: items cover every row with every panel once") {
  for (const WeightForm form : kForms)
    for (const int64_t rows : {1, 2, 11, 12, 13, 47, 48, 49, 240, 241, 1000})
      for (const int64_t in_features : {32, 1024, 65536})
        for (const int64_t out_features : {1, 31, 32, 33, 1000, 9999})
          for (const int64_t threads : {1, 2, 7, 64}) {
            const PackedLinearParams p = linear(rows, in_features, out_features, form);
            const PackedLinearPlan plan = plan_packed_linear(p, threads);
            CAPTURE(int(form), rows, in_features, out_features, threads);
            // Only the last of the row blocks may end within a tile.
            REQUIRE(plan.row_block % kLinearTileRows == 0);
            const int64_t blocks = plan.row_blocks, panels = p.panels();
            std::vector<int> seen(blocks * panels);
            int64_t covered = 0;
            for (int64_t b = 0; b < blocks; ++b)
              covered += std::max<int64_t>(0, std::min(plan.row_block, rows - b * plan.row_block));
            REQUIRE((covered == rows && (blocks - 1) * plan.row_block < rows));
            for (int64_t i = 0; i < plan.items; ++i) {
              const int64_t first = i / blocks * plan.panels_per_item;
              REQUIRE(first < panels);
              for (int64_t n = first; n < std::min(panels, first + plan.panels_per_item); ++n)
                ++seen[i % blocks * panels + n];
            }
            REQUIRE(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; }));
          }
}

TEST_CASE("packed_linear: no more threads than items, nor than the work pays for") {
  for (const int64_t rows : {1, 13, 500})
    for (const int64_t out_features : {1, 32, 5000})
      for (const int64_t threads : {0, 1, 3, 64}) {
        const PackedLinearPlan plan = plan_packed_linear(linear(rows, 512, out_features), threads);
        CAPTURE(rows, out_features, threads);
        REQUIRE((plan.threads >= 1 && plan.threads <= std::max<int64_t>(1, threads)));
        REQUIRE(plan.threads <= plan.items);
        REQUIRE((plan.row_threads >= 1 && plan.row_threads <= plan.threads));
      }
  REQUIRE(plan_packed_linear(linear(1, 64, 64), 16).threads == 1);
  // One token of a large model has work for all threads, although it is one row.
  const PackedLinearPlan token = plan_packed_linear(linear(1, 2048, 32000, WeightForm::int4), 16);
  REQUIRE((token.threads == 16 && token.items >= 16 && token.row_threads == 1));
  REQUIRE(plan_packed_linear(linear(4096, 2048, 2048), 16).row_threads == 16);
}

TEST_CASE("packed_linear: scratch holds the sums of an item's rows, and a piece or a group of a panel") {
  for (const WeightForm form : {WeightForm::f32, WeightForm::int8})
    for (const int64_t group_size : {32, 256})
      for (const int64_t rows : {1, 12, 100, 100000}) {
        PackedLinearParams p = linear(rows, 2048, 100, form);
        if (p.is_integer()) p.group_size = group_size;
        const PackedLinearPlan plan = plan_packed_linear(p, 2);
        const int64_t words = std::max(kLinearWords, p.is_integer() ? group_size / 2 : 0);
        REQUIRE(plan.scratch_bytes >= 4 * kPanelFeatures * (std::min(rows, plan.row_block) + words) + 3 * 64);
      }
  const auto scratch = [](int64_t rows) { return plan_packed_linear(linear(rows, 2048, 100), 2).scratch_bytes; };
  REQUIRE(scratch(1 << 20) <= scratch(1 << 24));
  REQUIRE(scratch(1 << 24) <= 1 << 20);
}

TEST_CASE("packed_linear: without rows there is nothing to do") {
  for (const WeightForm form : kForms) REQUIRE(plan_packed_linear(linear(0, 64, 100, form), 4).items == 0);
}

TEST_CASE("packed_linear: any number of output features has panels") {
  REQUIRE(linear(1, 32, 1).panels() == 1);
  REQUIRE(linear(1, 32, 32).panels() == 1);
  REQUIRE(linear(1, 32, 33).panels() == 2);
  REQUIRE(linear(1, 32, INT64_MAX).panels() == int64_t(1) << 58);
}
