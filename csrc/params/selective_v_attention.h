// What selective_v_attention means, shared by its kernels on every device.
#pragma once
#include "params/key_range.h"

namespace diffqkv {
namespace {

// The allowance for what the rounding of fp32 sums takes from 1 - kept mass.
constexpr float kMassRounding = 0x1p-18f;
// With max_error a row may fetch this many times top_k before dense attention is cheaper.
constexpr int64_t kMaxAdded = 4;

// The keys that a query reads whatever their scores: the first ones up to first_end, the last ones from last_begin.
struct ForcedKeys {
  int64_t first, first_end, last_begin, last_end;
  DIFFQKV_INLINE ForcedKeys(const SelectiveVAttentionParams& sp, KeyRange keys)
      : first(keys.lo),
        first_end(keys.lo + min_of(sp.keep_first, keys.hi - keys.lo)),
        last_begin(max_of(first_end, keys.hi - min_of(sp.keep_last, keys.hi))),
        last_end(keys.hi) {}
  DIFFQKV_INLINE bool has(int64_t key) const { return key < first_end || key >= last_begin; }
  // The place of a forced key among them, in the order of the keys.
  DIFFQKV_INLINE int64_t place(int64_t key) const {
    return key < first_end ? key - first : first_end - first + key - last_begin;
  }
};

}  // namespace
}  // namespace diffqkv
