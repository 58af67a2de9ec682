// Counter-based dropout: whether a probability is dropped depends on the seed and its place alone, so that no tile
// size, thread count or device changes it.
#pragma once
#include "params/params.h"
#include "params/philox.h"

namespace diffqkv {
namespace {

constexpr int64_t kDraws = 16;  // computed side by side

// Draws the random numbers of the keys [begin, end) of a query into bits[key - begin / 8 * 8]; writes whole runs of
// 128. row: batch entry * n_q + q head.
inline void draw_bits(const Dropout& dropout, int64_t row, int64_t query, int64_t begin, int64_t end, uint16_t* bits) {
  for (int64_t draw = begin / kKeysPerDraw; draw * kKeysPerDraw < end; draw += kDraws) {
    uint32_t x0[kDraws], x1[kDraws], x2[kDraws], x3[kDraws];
    for (int64_t i = 0; i < kDraws; ++i) {
      x0[i] = uint32_t(draw + i);
      x1[i] = uint32_t(query);
      x2[i] = uint32_t(row);
      x3[i] = dropout.offset;
    }
    uint32_t key0 = uint32_t(dropout.seed), key1 = uint32_t(dropout.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxKeyStep0, key1 += kPhiloxKeyStep1)
      for (int64_t i = 0; i < kDraws; ++i) philox_round(x0[i], x1[i], x2[i], x3[i], key0, key1);
    for (int64_t i = 0; i < kDraws; ++i, bits += kKeysPerDraw) {
      const uint32_t words[] = {x0[i], x1[i], x2[i], x3[i]};
      __builtin_memcpy(bits, words, sizeof words);
    }
  }
}

}  // namespace
}  // namespace diffqkv
