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

// Runs range(begin, end) for ranges of n rows of d elements, each row in a few passes: a range is worth a thread.
template <class Range>
void for_ranges(int64_t n, int64_t d, const Caller& caller, const Range& range) {
  constexpr int64_t kElementsPerItem = 16384;
  const int64_t rows = std::max<int64_t>(1, kElementsPerItem / std::max<int64_t>(1, d));
  for_items((n + rows - 1) / rows, caller.threads, caller.parallel,
            [&](int64_t i, int64_t) { range(i * rows, std::min(n, (i + 1) * rows)); });
}

}  // namespace diffqkv::cpu
