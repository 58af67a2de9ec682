// How the items of a plan come to the caller's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/caller.h"

namespace diffqkv::cpu {

// Runs item(i, worker) for all i < items. Workers take the next item when they are free, since causal items differ in
// cost; which worker runs an item never changes its result.
template <class Item>
void for_items(int64_t items, int64_t threads, Parallel parallel, const Item& item) {
  const int64_t workers = std::min(threads, items);
  if (workers <= 1) {
    for (int64_t i = 0; i < items; ++i) item(i, 0);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t items;
    const Item* item;
  } context{.items = items, .item = &item};
  parallel(
      workers,
      [](void* c, int64_t worker) {
        auto& ctx = *static_cast<Context*>(c);
        for (int64_t i; (i = ctx.next.fetch_add(1, std::memory_order_relaxed)) < ctx.items;) (*ctx.item)(i, worker);
      },
      &context);
}

}  // namespace diffqkv::cpu
