// The steps of attention over one tile of keys, shared by the kernels of flash_attention, decode_attention and
// selective_v_attention: panels, scores, softmax, weighted sums, results. All that they need lies in a thread's
// scratch.
#pragma once
#include "cpu/kernels/dropout.h"
#include "cpu/kernels/panels.h"
#include "cpu/kernels/results.h"
#include "cpu/kernels/scores.h"
#include "cpu/kernels/softmax.h"
#include "cpu/kernels/weighted_sums.h"
#include "plan/cpu/attention.h"

namespace diffqkv {
namespace {

static_assert(kQkRows <= kScoreRows && VL <= kLanes);

constexpr int64_t kRandomBits = kKeyTile + kDraws * kKeysPerDraw;  // room for the random bits of a row's tile

DIFFQKV_INLINE int64_t padded_dim(int64_t d) { return round_up(d, 16); }

struct Scratch {  // hands out 64-byte aligned pieces of a thread's memory
  char* at;
  explicit Scratch(void* p) : at((char*)(((uintptr_t)p + 63) & ~uintptr_t(63))) {}
  template <class T>
  T* take(int64_t n) {
    T* piece = (T*)at;
    at += round_up(n * int64_t(sizeof(T)), 64);
    return piece;
  }
};

}  // namespace
}  // namespace diffqkv
