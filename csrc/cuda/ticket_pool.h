// Which counters a call's blocks take their tickets from.
#pragma once
#include <atomic>
#include <cstdint>

namespace diffqkv {

// Counters that are zero between kernels: each kernel leaves those it used as it found them. Two kernels under way at
// the same time must not share any, whatever their streams. A call that runs once takes the next counters of a ring,
// which is longer than what can be under way; a captured call, which runs again whenever its graph does, keeps its own
// for good.
class TicketPool {
 public:
  static constexpr int64_t kRing = 1 << 18, kKept = 1 << 18, kSize = kRing + kKept;

  // The first of `count` counters, or -1: the caller has to bring its own.
  int64_t take(int64_t count, bool captured) {
    if (count > kRing / 4) return -1;
    if (captured) {
      int64_t first = kept_.load(std::memory_order_relaxed);
      do {
        if (first + count > kKept) return -1;
      } while (!kept_.compare_exchange_weak(first, first + count, std::memory_order_relaxed));
      return kRing + first;
    }
    int64_t next = next_.load(std::memory_order_relaxed), first;
    do {
      first = next + count > kRing ? 0 : next;  // never across the ring's end
    } while (!next_.compare_exchange_weak(next, first + count, std::memory_order_relaxed));
    return first;
  }

 private:
  std::atomic<int64_t> next_{0}, kept_{0};
};

}  // namespace diffqkv
