// A caller of the CPU ops under test.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/run.h"

// Runs one worker after the other on this thread, and frees the memory of a call when it ends.
template <class Params>
void run_serially(const Params& params, int64_t threads) {
  struct VectorMemory final : diffqkv::Memory {
    std::vector<char> piece;
    void* take(int64_t bytes) override {
      piece.resize(static_cast<size_t>(bytes));
      return piece.data();
    }
  } memory;
  const auto serial = [](int64_t workers, void (*body)(void*, int64_t), void* context) {
    for (int64_t w = 0; w < workers; ++w) body(context, w);
  };
  diffqkv::cpu::run(params, {threads, serial, memory});
}
