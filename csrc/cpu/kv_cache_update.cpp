#include "plan/cpu/kv_cache_update.h"

#include "cpu/isa.h"
#include "cpu/items.h"
#include "cpu/kernels/kernels.h"
#include "cpu/run.h"

namespace diffqkv::cpu {

void run(const KvCacheUpdateParams& p, const Caller& caller) {
  const KvCacheUpdatePlan plan = plan_kv_cache_update(p, caller.threads);
  for_items(plan.items, plan.threads, caller.parallel, [&](int64_t i, int64_t) {
    const KvCacheUpdateItem item = kv_cache_update_item(p, plan, i);
    cpu_kernels().kv_cache_update(p, item.entry, item.group, item.begin, item.end);
  });
}

}  // namespace diffqkv::cpu
