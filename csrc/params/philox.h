// Philox4x32-10 (Salmon et al., SC 2011): a round of it, and what a draw is. Shared by the kernels of every device.
#pragma once
#include "params/arithmetic.h"

namespace diffqkv {
namespace {

constexpr int kPhiloxRounds = 10;
// What is added to a round's key for the next one's.
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;
constexpr int64_t kKeysPerDraw = 8;  // a draw's 128 bits, 16 a key

DIFFQKV_INLINE void philox_round(uint32_t& x0, uint32_t& x1, uint32_t& x2, uint32_t& x3, uint32_t key0, uint32_t key1) {
  const uint64_t a = uint64_t(x0) * 0xD2511F53u, b = uint64_t(x2) * 0xCD9E8D57u;
  x0 = uint32_t(b >> 32) ^ x1 ^ key0;
  x1 = uint32_t(b);
  x2 = uint32_t(a >> 32) ^ x3 ^ key1;
  x3 = uint32_t(a);
}

}  // namespace
}  // namespace diffqkv
