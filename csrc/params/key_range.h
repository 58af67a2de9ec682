// Which keys a query sees, and where queries and keys lie. Plain arithmetic, shared by all attention kernels of every
// device.
#pragma once
#include "params/arithmetic.h"
#include "params/params.h"

namespace diffqkv {
namespace {

struct KeyRange {
  int64_t lo, hi;

  // Where a walk over tiles of `size` begins: an empty range has none, wherever it lies.
  DIFFQKV_INLINE int64_t first_tile(int64_t size) const { return lo < hi ? lo / size * size : hi; }
};

// A batch entry: one sequence of queries over one of keys.
struct Entry {
  int64_t b;
  int64_t s_q, s_k;
  int64_t first_query, first_key;  // where they begin among packed ones
  int64_t position;                // of query 0 among the keys
  KeyRange keys;                   // that exist: 0 <= lo <= hi <= s_k, whatever kv_start and kv_end are
};
DIFFQKV_INLINE Entry entry_of(const AttentionParams& p, int64_t b) {
  const int32_t *cu_q = p.cu_seqlens_q, *cu_k = p.cu_seqlens_k;
  const int64_t s_q = cu_q ? cu_q[b + 1] - cu_q[b] : p.s_q, s_k = cu_k ? cu_k[b + 1] - cu_k[b] : p.s_k;
  const int64_t hi = p.kv_end ? max_of(0, min_of(s_k, p.kv_end[b])) : s_k;
  const int64_t lo = p.kv_start ? min_of(hi, max_of(0, p.kv_start[b])) : 0;
  const int64_t position = (p.length ? p.length[b] : s_k) - s_q;
  return {b, s_q, s_k, cu_q ? cu_q[b] : 0, cu_k ? cu_k[b] : 0, position, {lo, hi}};
}
// The longest entry: no query of the call sees a key from there on. Reads kv_end, which a GPU's host must not.
DIFFQKV_INLINE int64_t most_keys(const AttentionParams& p) {
  if (p.kv_end == nullptr) return p.s_k;
  int64_t most = 0;
  for (int64_t b = 0; b < p.batch; ++b) most = max_of(most, min_of(p.s_k, p.kv_end[b]));
  return most;
}
// The keys that a query sees, lo <= hi. Neither end moves backwards from a query to the next.
DIFFQKV_INLINE KeyRange keys_of_query(const AttentionParams& p, const Entry& entry, int64_t query) {
  const int64_t position = entry.position + query;
  KeyRange keys = entry.keys;
  if (p.window_left >= 0) keys.lo = min_of(keys.hi, max_of(keys.lo, position - p.window_left));
  if (p.window_right >= 0) keys.hi = max_of(keys.lo, min_of(keys.hi, position + p.window_right + 1));
  return keys;
}

// The queries that see a key of the range.
DIFFQKV_INLINE KeyRange queries_of_keys(const AttentionParams& p, const Entry& entry, KeyRange keys) {
  keys = {max_of(keys.lo, entry.keys.lo), min_of(keys.hi, entry.keys.hi)};
  if (keys.lo >= keys.hi) return {0, 0};
  const int64_t lo = p.window_right >= 0 ? max_of(0, keys.lo - p.window_right - entry.position) : 0;
  const int64_t hi = p.window_left >= 0 ? min_of(entry.s_q, keys.hi + p.window_left - entry.position) : entry.s_q;
  return {lo, max_of(lo, hi)};
}

// The tokens [token, result) lie in one page.
DIFFQKV_INLINE int64_t page_end(const Paging& paging, int64_t token, int64_t end) {
  if (paging.block_table == nullptr) return end;
  return min_of(end, (token / paging.page_size + 1) * paging.page_size);
}
template <class T>
DIFFQKV_INLINE T* head_at(const KvView& view, int64_t page, int64_t head, int64_t heads_per_group) {
  return (T*)view.data + page * view.stride_page + head / heads_per_group * view.stride_group +
         head % heads_per_group * view.stride_head;
}
// The element offset of a token of a head in q, out or their gradients.
DIFFQKV_INLINE int64_t row_of(const TokenView& view, const Entry& entry, int64_t head, int64_t query) {
  return entry.b * view.stride_batch + head * view.stride_head + (entry.first_query + query) * view.stride_token;
}
// The element offset of a key of a head in the gradients of K and V.
DIFFQKV_INLINE int64_t key_row_of(const TokenView& view, const Entry& entry, int64_t head, int64_t key) {
  return entry.b * view.stride_batch + head * view.stride_head + (entry.first_key + key) * view.stride_token;
}
// The place of a query and head in lse.
DIFFQKV_INLINE int64_t lse_of(const AttentionParams& p, const Entry& entry, int64_t head, int64_t query) {
  if (p.cu_seqlens_q != nullptr) return head * p.total_queries() + entry.first_query + query;
  return (entry.b * p.heads.n_q + head) * p.s_q + query;
}

}  // namespace
}  // namespace diffqkv
