// What the CPU ops are given by whoever calls them, besides their params.
#pragma once
#include <cstdint>

#include "params/memory.h"

namespace diffqkv::cpu {

// The caller's thread pool: calls body(context, w) once for each w in [0, workers) and returns when all are done.
using Parallel = void (*)(int64_t workers, void (*body)(void* context, int64_t worker), void* context);

struct Caller {
  int64_t threads;  // of the pool
  Parallel parallel;
  Memory& memory;
};

}  // namespace diffqkv::cpu
