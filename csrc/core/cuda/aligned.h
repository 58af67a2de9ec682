// Whether rows of tensors may be moved 16 bytes at a time.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "diffqkv/params.h"

namespace diffqkv {

inline constexpr int64_t kVectorBytes = 16;

struct Stride {
  int64_t elements, extent;
};

inline bool aligned_strides(const void* data, int64_t element_bytes, int64_t bytes,
                            std::initializer_list<Stride> strides) {
  if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) != 0) return false;
  return std::all_of(strides.begin(), strides.end(), [&](Stride s) {
    return s.extent <= 1 || s.elements * element_bytes % bytes == 0;  // the stride of a single element is never used
  });
}

// K or V in rows.
inline bool aligned_rows(const KvView& view, int64_t element_bytes, int64_t pages, int64_t groups, int64_t heads,
                         int64_t tokens) {
  return aligned_strides(
      view.data, element_bytes, kVectorBytes,
      {{view.stride_page, pages}, {view.stride_group, groups}, {view.stride_head, heads}, {view.stride_token, tokens}});
}

}  // namespace diffqkv
