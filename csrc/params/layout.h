// Where a token lies in a cache: slot -> page -> element offset. Shared by the CPU and CUDA kernels and by the tests.
#pragma once
#include <cstdint>

#include "params/arithmetic.h"
#include "params/params.h"

namespace diffqkv {

// The offset of element (token in panel, dim) in its panel: [d, 32]; bf16: [d / 2, 32, 2].
DIFFQKV_INLINE int64_t panel_element(int64_t token_in_panel, int64_t dim, DType dtype) {
  return dtype == DType::bf16 ? dim / 2 * (2 * kPanelTokens) + token_in_panel * 2 + dim % 2
                              : dim * kPanelTokens + token_in_panel;
}

// A token's place in a cache. page is -1 where the token has none.
struct KvSlot {
  int64_t page = -1;
  int64_t token = 0;  // in the page
};

// The place of a token below the cache's capacity; -1 where the block table's entry is negative.
DIFFQKV_INLINE KvSlot kv_page(const Paging& paging, int64_t entry, int64_t token) {
  if (paging.first_token != nullptr) return {0, paging.first_token[entry] + token};
  if (paging.block_table == nullptr) return {entry, token};
  const int64_t block = token / paging.page_size;
  const int64_t page = paging.block_table[entry * paging.stride + block];
  return {page < 0 ? -1 : page, token - block * paging.page_size};
}

// The place of a position that nobody has checked: -1 where it is negative, beyond the capacity, or in a block that is
// not a page of the pool.
DIFFQKV_INLINE KvSlot kv_page_checked(const Paging& paging, int64_t pages, int64_t capacity, int64_t entry,
                                      int64_t position) {
  if (position < 0 || position >= capacity) return {-1, 0};
  const KvSlot slot = kv_page(paging, entry, position);
  return slot.page < pages ? slot : KvSlot{-1, 0};
}

// Element offset of the first dimension of a token in the rows layout.
DIFFQKV_INLINE int64_t kv_row(const KvView& view, int64_t group, int64_t head, KvSlot slot) {
  return slot.page * view.stride_page + group * view.stride_group + head * view.stride_head +
         slot.token * view.stride_token;
}

// Element offset of the panel that holds a token in the panels layout; panel_element(slot.token % 32, ...) goes on.
DIFFQKV_INLINE int64_t kv_panel(const KvView& view, int64_t group, int64_t head, KvSlot slot) {
  return slot.page * view.stride_page + group * view.stride_group + head * view.stride_head +
         slot.token / kPanelTokens * view.stride_panel;
}

// Position of the new token `token` of batch entry `entry`.
DIFFQKV_INLINE int64_t new_token_position(const KvCacheUpdateParams& p, int64_t entry, int64_t token) {
  const int64_t i = entry * p.positions_stride_batch + token * p.positions_stride_token;
  return p.positions_int64 ? static_cast<const int64_t*>(p.positions)[i] : static_cast<const int32_t*>(p.positions)[i];
}

// The slot that this token is written to; page -1: none.
DIFFQKV_INLINE KvSlot new_token_slot(const KvCacheUpdateParams& p, int64_t entry, int64_t token) {
  return kv_page_checked(p.paging, p.pages, p.capacity, entry, new_token_position(p, entry, token));
}

}  // namespace diffqkv
