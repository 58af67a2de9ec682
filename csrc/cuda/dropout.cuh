// Dropout on the device: the bits of csrc/cpu/kernels/dropout.h. A draw decides over 8 neighbouring keys of a query, 16
// bits each; row: batch entry * n_q + q head; draw: key / 8.
#pragma once
#include "cuda/tile.cuh"
#include "params/params.h"
#include "params/philox.h"

namespace diffqkv::device {

// Word w holds the bits of keys 2 * w (low half) and 2 * w + 1.
DIFFQKV_DEVICE void dropout_words(const Dropout& dropout, int64_t row, int64_t query, int64_t draw,
                                  uint32_t (&words)[4]) {
  words[0] = uint32_t(draw);
  words[1] = uint32_t(query);
  words[2] = uint32_t(row);
  words[3] = dropout.offset;
  uint32_t key0 = uint32_t(dropout.seed), key1 = uint32_t(dropout.seed >> 32);
  DIFFQKV_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(words[0], words[1], words[2], words[3], key0, key1);
    key0 += kPhiloxKeyStep0, key1 += kPhiloxKeyStep1;
  }
}

DIFFQKV_DEVICE bool keeps_low(const Dropout& dropout, uint32_t word) { return (word & 0xffffu) >= dropout.threshold; }
DIFFQKV_DEVICE bool keeps_high(const Dropout& dropout, uint32_t word) { return word >> 16 >= dropout.threshold; }
DIFFQKV_DEVICE bool keeps(const Dropout& dropout, const uint32_t (&words)[4], int key_in_draw) {
  const uint32_t low = key_in_draw & 2 ? words[1] : words[0], high = key_in_draw & 2 ? words[3] : words[2];
  const uint32_t word = key_in_draw & 4 ? high : low;
  return key_in_draw & 1 ? keeps_high(dropout, word) : keeps_low(dropout, word);
}

// The words that a lane needs for its accumulators of four 8-column tiles, whose columns are the keys of the draws
// first_draw to first_draw + 3: words[t] is word lane() % 4 of draw first_draw + t, the bits of the two columns that
// the lane holds. The four lanes of a row compute one draw each and exchange words; they must agree in row, query and
// first_draw, and all lanes of the warp take part.
DIFFQKV_DEVICE void dropout_words_of_columns(const Dropout& dropout, int64_t row, int64_t query, int64_t first_draw,
                                             uint32_t (&words)[4]) {
  dropout_words(dropout, row, query, first_draw + lane() % 4, words);
  transpose_words(words);
}

}  // namespace diffqkv::device
