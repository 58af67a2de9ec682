// Whether the tokens' rows can be copied 16 bytes at a time.
#pragma once
#include <initializer_list>

#include "params/params.h"

namespace diffqkv {

inline bool rows_aligned(const void* data, std::initializer_list<int64_t> strides, int64_t element_bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) aligned = aligned && stride * element_bytes % 16 == 0;
  return aligned;
}
inline bool rows_aligned(const KvView& view, int64_t element_bytes) {
  return rows_aligned(view.data, {view.stride_page, view.stride_group, view.stride_head, view.stride_token},
                      element_bytes);
}
inline bool rows_aligned(const TokenView& view, int64_t element_bytes) {
  return rows_aligned(view.data, {view.stride_batch, view.stride_head, view.stride_token}, element_bytes);
}

}  // namespace diffqkv
