#include <set>

#include "cuda/ticket_pool.h"
#include "support/catch.h"

using diffqkv::TicketPool;

TEST_CASE("calls under way never share tickets; captured ones keep theirs") {
  TicketPool pool;
  std::set<int64_t> kept, recent;
  for (int64_t call = 0; call < 1000; ++call) {
    const int64_t first = pool.take(100, call % 2 == 0);
    REQUIRE(first >= 0);
    auto& taken = call % 2 == 0 ? kept : recent;
    for (int64_t i = 0; i < 100; ++i) REQUIRE(taken.insert(first + i).second);
  }
  for (const int64_t ticket : recent) REQUIRE((ticket < TicketPool::kRing && kept.count(ticket) == 0));
  for (const int64_t ticket : kept) REQUIRE((ticket >= TicketPool::kRing && ticket < TicketPool::kSize));
}

TEST_CASE("the ring of tickets goes round, those of graphs come to an end, and too many are refused") {
  TicketPool pool;
  const int64_t most = TicketPool::kRing / 4;
  REQUIRE(pool.take(most + 1, false) == -1);
  for (int round = 0; round < 3; ++round)
    for (int64_t quarter = 0; quarter < 4; ++quarter) REQUIRE(pool.take(most, false) == quarter * most);
  REQUIRE(pool.take(3, false) == 0);
  REQUIRE(pool.take(most, false) == 3);
  REQUIRE(pool.take(most, false) == 3 + most);
  REQUIRE(pool.take(most, false) == 3 + 2 * most);
  REQUIRE(pool.take(most, false) == 0);  // never across the end
  REQUIRE(pool.take(TicketPool::kKept / 4, true) == TicketPool::kRing);
  REQUIRE(pool.take(TicketPool::kKept / 4, true) == TicketPool::kRing + most);
  REQUIRE(pool.take(TicketPool::kKept / 4, true) >= 0);
  REQUIRE(pool.take(TicketPool::kKept / 4, true) >= 0);
  REQUIRE(pool.take(1, true) == -1);
}
