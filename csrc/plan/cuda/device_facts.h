// What the planners know of a GPU.
#pragma once
#include <cstdint>

namespace diffqkv {

struct DeviceFacts {
  int32_t multiprocessors = 132;
  int32_t capability = 90;                           // 10 * major + minor
  int64_t shared_per_block = 227 * 1024;             // bytes that a block can have
  int64_t shared_per_multiprocessor = 228 * 1024;    // of all its blocks, 1 KiB of each for the system
  int64_t registers_per_multiprocessor = 64 * 1024;  // of 32 bits
  int64_t bandwidth_gb_s = 0;                        // of the device's memory by its data sheet, 0: unknown

  // The devices that planners are tested with and explain can name.
  static constexpr DeviceFacts h100() { return {132, 90, 227 * 1024, 228 * 1024, 64 * 1024, 3350}; }
  static constexpr DeviceFacts h200() { return {132, 90, 227 * 1024, 228 * 1024, 64 * 1024, 4800}; }
  static constexpr DeviceFacts a100() { return {108, 80, 163 * 1024, 164 * 1024, 64 * 1024, 2039}; }
  static constexpr DeviceFacts rtx4090() { return {128, 89, 99 * 1024, 100 * 1024, 64 * 1024, 1008}; }
};
inline constexpr int64_t kSystemSharedBytes = 1024;  // shared memory that a block costs beside its own
// Older GPUs lack the instructions of the kernels.
inline constexpr int32_t kLeastCapability = 80;

}  // namespace diffqkv
