// Arithmetic of sizes and positions, and constants of the softmax, for every kernel and planner.
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

// Softmax runs on powers of 2: log2(e) leads there from e, ln(2) back to natural logarithms.
template <class T>
constexpr T kLog2e = T(1.44269504088896341);
template <class T>
constexpr T kLn2 = T(0.693147180559945309);

}  // namespace
}  // namespace diffqkv
