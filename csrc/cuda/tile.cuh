// Tiles of rows in shared memory.
#pragma once
#include "core/cuda/tile_stride.h"
#include "core/key_range.h"
#include "cuda/device.cuh"

namespace diffqkv::device {

// Starts a copy of a piece, zeros where it is not valid. Sources that are not aligned to 16 bytes are copied at once,
// element by element.
DIFFQKV_DEVICE void copy_piece(uint16_t* shared, const uint16_t* global, bool valid, bool aligned) {
  if (aligned) return copy_async(shared, global, valid);
  for (int i = 0; i < kPiece; ++i) shared[i] = valid ? global[i] : uint16_t(0);
}

}  // namespace diffqkv::device
