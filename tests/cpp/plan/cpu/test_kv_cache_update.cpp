#include <numeric>
#include <vector>

#include "plan/cpu/kv_cache_update.h"
#include "support/catch.h"

using namespace diffqkv;

namespace {

// `tokens` new tokens of two entries with these positions, in two groups.
struct Update {
  std::vector<int64_t> positions;
  KvCacheUpdateParams p;

  Update(int64_t tokens, int64_t first) : positions(static_cast<size_t>(2 * tokens)) {
    for (int64_t b = 0; b < 2; ++b)
      std::iota(positions.begin() + b * tokens, positions.begin() + (b + 1) * tokens, first + 5 * b);
    p.heads = {4, 2, 4};
    p.batch = 2, p.s_new = tokens;
    p.positions = positions.data(), p.positions_int64 = true;
    p.positions_stride_batch = tokens, p.positions_stride_token = 1;
  }
};

}  // namespace

TEST_CASE("every new token of a group is in one item, and no two items share a panel") {
  for (const int64_t tokens : {0, 1, 128, 129, 160, 500, 1000})
    for (const int64_t first : {0, 1, 31, 32, 77}) {
      const Update update(tokens, first);
      const KvCacheUpdatePlan plan = plan_kv_cache_update(update.p, 2);
      CAPTURE(tokens, first, plan.ranges);
      REQUIRE((plan.ranges > 1) == (tokens > kKvCacheUpdateTokens));
      REQUIRE(plan.items == 2 * plan.ranges * plan.groups);
      std::vector<int64_t> next(4, 0);  // by entry and group: where the items so far end
      for (int64_t i = 0; i < plan.items; ++i) {
        const KvCacheUpdateItem item = kv_cache_update_item(update.p, plan, i);
        if (item.end <= item.begin) continue;
        int64_t& begin = next[static_cast<size_t>(item.entry * plan.groups + item.group)];
        REQUIRE(item.begin == begin);
        REQUIRE((begin == 0 || update.positions[static_cast<size_t>(item.entry * tokens + begin)] % kPanelTokens == 0));
        REQUIRE((plan.ranges == 1 || item.end - item.begin <= kKvCacheUpdateTokens));
        begin = item.end;
      }
      for (const int64_t end : next) REQUIRE(end == tokens);
    }
}

TEST_CASE("tokens are written in their order where it matters") {
  Update update(500, 10);
  REQUIRE(plan_kv_cache_update(update.p, 4).ranges > 1);
  float stats = 0;
  update.p.v_stats = &stats;
  REQUIRE(plan_kv_cache_update(update.p, 4).ranges == 1);
  update.p.v_stats = nullptr;
  update.positions[700] = -1;  // a gap
  REQUIRE(plan_kv_cache_update(update.p, 4).ranges > 1);
  update.positions[701] = 3;  // behind another, and perhaps the same
  REQUIRE(plan_kv_cache_update(update.p, 4).ranges == 1);
}

TEST_CASE("few rows take one thread, many take all, and nothing takes none away") {
  REQUIRE(plan_kv_cache_update(Update(1, 0).p, 8).threads == 1);
  REQUIRE(plan_kv_cache_update(Update(1000, 0).p, 8).threads == 8);
  REQUIRE(plan_kv_cache_update(Update(0, 0).p, 8).threads == 1);
  REQUIRE(plan_kv_cache_update(Update(1000, 0).p, 0).threads == 1);
}
