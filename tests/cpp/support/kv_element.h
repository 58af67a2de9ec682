#pragma once
#include "params/layout.h"

namespace diffqkv {

// Element offset of (token, dim) in either layout.
inline int64_t kv_element(const KvView& view, int64_t group, int64_t head, KvSlot slot, int64_t dim) {
  return view.layout == KLayout::rows
             ? kv_row(view, group, head, slot) + dim
             : kv_panel(view, group, head, slot) + panel_element(slot.token % kPanelTokens, dim, view.dtype);
}

}  // namespace diffqkv
