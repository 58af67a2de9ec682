#include "plan/cpu/kv_cache_update.h"

#include <algorithm>

#include "params/layout.h"

namespace diffqkv {
namespace {

// Cache rows that a thread writes before a second one pays off.
constexpr int64_t kRowsPerThread = 64;

// Whether the new tokens of each entry have increasing positions, so that ranges of them can be written in any order.
bool in_order(const KvCacheUpdateParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    int64_t last = -1;
    for (int64_t t = 0; t < p.s_new; ++t) {
      const int64_t position = new_token_position(p, b, t);
      if (position < 0) continue;
      if (position <= last) return false;
      last = position;
    }
  }
  return true;
}

}  // namespace

KvCacheUpdatePlan plan_kv_cache_update(const KvCacheUpdateParams& p, int64_t threads) {
  KvCacheUpdatePlan plan;
  plan.groups = p.heads.groups();
  // v_stats are summed up in the order of the tokens, by one item. Ranges begin at panels, so that an entry whose first
  // token lies within one needs room for the tokens before.
  if (p.s_new > kKvCacheUpdateTokens && p.v_stats == nullptr && in_order(p))
    plan.ranges = ceil_div(p.s_new + kPanelTokens, kKvCacheUpdateTokens);
  plan.items = p.batch * plan.ranges * plan.groups;
  const int64_t rows = p.batch * p.s_new * (p.heads.n_k + p.heads.n_v);
  plan.threads = std::clamp<int64_t>(rows / kRowsPerThread, 1, std::max<int64_t>(1, threads));
  return plan;
}

KvCacheUpdateItem kv_cache_update_item(const KvCacheUpdateParams& p, const KvCacheUpdatePlan& plan, int64_t item) {
  // Groups innermost: their heads often lie side by side in the new tokens.
  const int64_t entry = item / plan.groups / plan.ranges, range = item / plan.groups % plan.ranges;
  const int64_t group = item % plan.groups;
  if (plan.ranges == 1) return {entry, group, 0, p.s_new};
  const int64_t in_panel = std::max<int64_t>(0, new_token_position(p, entry, 0)) % kPanelTokens;
  const int64_t begin = range * kKvCacheUpdateTokens - in_panel, end = std::min(p.s_new, begin + kKvCacheUpdateTokens);
  return {entry, group, std::max<int64_t>(0, begin), end};
}

}  // namespace diffqkv
