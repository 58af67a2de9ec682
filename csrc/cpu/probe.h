// The physical limits that benchmarks compare with, on the threads that the ops use.
#pragma once
#include "cpu/caller.h"

namespace diffqkv::cpu {

enum class Probe : int32_t {
  fma = 0,   // fp32 multiply-adds on registers
  dot = 1,   // bf16 dot products on registers
  read = 2,  // memory, read from end to end in equal shares
};
// Does `rounds` of it on every thread; returns the FLOPs done, or the bytes read, and 0 where the CPU has no such
// thing.
double probe(Probe what, int64_t rounds, const void* data, int64_t bytes, int64_t threads, Parallel parallel);

}  // namespace diffqkv::cpu
