// Every bit of the device's dropout against the CPU's.

#include "cpu/kernels/dropout.h"
#include "cuda/dropout.cuh"
#include "support/catch.h"

using namespace diffqkv;
using namespace diffqkv::device;

namespace {

constexpr int64_t kQueries = 8, kKeys = 32;  // of a warp: four tiles of accumulators

// kept[query, key] of one warp, by words of whole draws and by the words that the lanes of an accumulator exchange.
struct Kept {
  struct Params {
    Dropout dropout;
    int64_t row, first_query, first_draw;
    bool *by_key, *by_columns;
  };
  static constexpr int kThreads = 32, kMinBlocks = 1;
  static void run(const Params& p, char*) {
    const int query = lane() / 4;
    for (int draw = lane() % 4; draw < kKeys / 8; draw += 4) {
      uint32_t words[4];
      dropout_words(p.dropout, p.row, p.first_query + query, p.first_draw + draw, words);
      for (int key = 0; key < 8; ++key) p.by_key[query * kKeys + draw * 8 + key] = keeps(p.dropout, words, key);
    }
    uint32_t words[4];
    dropout_words_of_columns(p.dropout, p.row, p.first_query + query, p.first_draw, words);
    for (int tile = 0; tile < 4; ++tile) {
      bool* kept = p.by_columns + query * kKeys + tile * 8 + 2 * (lane() % 4);
      kept[0] = keeps_low(p.dropout, words[tile]);
      kept[1] = keeps_high(p.dropout, words[tile]);
    }
  }
};

}  // namespace

TEST_CASE("the device drops what the CPU drops") {
  for (const uint32_t threshold : {0u, 1u, 11141u, 32768u, 65535u})
    for (const int64_t row : {0, 5, 70000})
      for (const int64_t first_query : {int64_t{0}, int64_t{131}, int64_t{1} << 31})
        for (const int64_t first_draw : {int64_t{0}, int64_t{12}, int64_t{1} << 28}) {
          const Dropout dropout{threshold, 3, 0xfedcba9876543210u};
          bool by_key[kQueries * kKeys], by_columns[kQueries * kKeys];
          emulate<Kept>({dropout, row, first_query, first_draw, by_key, by_columns}, {}, 0,
                        emulator::Schedule::forward);
          for (int64_t i = 0; i < kQueries; ++i) {
            uint16_t bits[kDraws * kKeysPerDraw];
            draw_bits(dropout, row, first_query + i, first_draw * 8, first_draw * 8 + kKeys, bits);
            for (int64_t j = 0; j < kKeys; ++j) {
              CAPTURE(threshold, row, first_query, first_draw, i, j);
              REQUIRE(by_key[i * kKeys + j] == (bits[j] >= threshold));
              REQUIRE(by_columns[i * kKeys + j] == (bits[j] >= threshold));
            }
          }
        }
}
