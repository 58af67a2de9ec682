// K and V caches with their block table: checks, and their translation into params.
#pragma once
#include "ops/checks.h"

namespace diffqkv {

struct CacheArguments {
  HeadGroups heads;  // n_q: any common multiple of n_k and n_v
  int64_t d_k = 0, d_v = 0;
  int64_t pages = 0, capacity = 0;  // capacity: tokens that an entry can address
  KvView k, v;
  Paging paging;
};

// Checks the caches of a call whose b is known; n_k, n_v, d_k and d_v are known from then on.
CacheArguments cache_arguments(TensorChecks& checks, const Tensor& k_cache, const Tensor& v_cache,
                               const std::optional<Tensor>& block_table, int64_t k_layout);

// Checks that the block table's number `block` of a batch entry is a page of the pool. The table is in host memory.
void check_block(const Paging& paging, int64_t pages, int64_t entry, int64_t block);

// Checks the sums and largest norms of V rows, in a call whose b, n_v and d_v are known.
void check_v_stats(TensorChecks& checks, const Tensor& v_stats);

}  // namespace diffqkv
