// How the CPU cuts kv_cache_update into work items: a pure function of the parameters, the positions among them, and
// the thread count.
#pragma once
#include <cstdint>

#include "params/params.h"

namespace diffqkv {

// New tokens of an item, whole panels.
inline constexpr int64_t kKvCacheUpdateTokens = 4 * kPanelTokens;

// An item is a range of the new tokens of a batch entry's KV group. Where the order of the tokens matters, one item has
// all of them.
struct KvCacheUpdatePlan {
  int64_t groups = 0;   // KV groups per batch entry
  int64_t ranges = 1;   // of the tokens of an entry
  int64_t items = 0;    // [batch, ranges, groups]
  int64_t threads = 1;  // worth starting
};

struct KvCacheUpdateItem {
  int64_t entry, group;
  int64_t begin, end;  // tokens; end <= begin: none
};

// threads: those of the caller's pool.
KvCacheUpdatePlan plan_kv_cache_update(const KvCacheUpdateParams& params, int64_t threads);

KvCacheUpdateItem kv_cache_update_item(const KvCacheUpdateParams& params, const KvCacheUpdatePlan& plan, int64_t item);

}  // namespace diffqkv
