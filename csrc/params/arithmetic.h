// Arithmetic of sizes and positions, for every kernel and planner.
#pragma once
#include <cstdint>

#include "params/groups.h"

// No copy compiled for one instruction set may be linked into another's code: hence always_inline.
#define DIFFQKV_INLINE DIFFQKV_HOST_DEVICE inline __attribute__((always_inline))

namespace diffqkv {
namespace {

DIFFQKV_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
DIFFQKV_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
DIFFQKV_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DIFFQKV_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
}  // namespace diffqkv
