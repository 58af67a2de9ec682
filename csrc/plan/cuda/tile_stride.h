// Rows of 16-bit elements in shared memory, for kernels and planners alike.
#pragma once
#include "params/params.h"

namespace diffqkv {

inline constexpr int kPiece = 8;  // elements of a 16-byte piece, the unit of copies and of matrix loads

// Elements from a row to the next, for rows of `width` elements, a multiple of kPiece. An odd number of pieces: then 8
// neighbouring rows of a matrix load lie in different banks.
DIFFQKV_HOST_DEVICE constexpr int tile_stride(int width) { return (width / kPiece | 1) * kPiece; }

}  // namespace diffqkv
