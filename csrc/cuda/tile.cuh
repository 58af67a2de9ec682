// Tiles of rows in shared memory.
#pragma once
#include "core/key_range.h"
#include "cuda/device.cuh"

namespace diffqkv::device {

inline constexpr int kPiece = 8;  // 16-bit elements of a 16-byte piece, the unit of copies and bank-free loads

// Elements from a row to the next, for rows of `width` 16-bit elements, a multiple of kPiece. An odd number of 16-byte
// pieces: then 8 neighbouring rows of a matrix load lie in different banks.
DIFFQKV_HOST_DEVICE constexpr int tile_stride(int width) { return (width / kPiece | 1) * kPiece; }

// Starts a copy of a piece, zeros where it is not valid. Sources that are not aligned to 16 bytes are copied at once,
// element by element.
DIFFQKV_DEVICE void copy_piece(uint16_t* shared, const uint16_t* global, bool valid, bool aligned) {
  if (aligned) return copy_async(shared, global, valid);
  for (int i = 0; i < kPiece; ++i) shared[i] = valid ? global[i] : uint16_t(0);
}

}  // namespace diffqkv::device
