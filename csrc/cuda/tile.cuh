// Tiles of rows in shared memory.
#pragma once
#include "cuda/device.cuh"
#include "plan/cuda/tile_stride.h"

namespace diffqkv::device {

// Copies the elements of a piece one by one, without delay; zeros where it is not valid.
template <class T>
DIFFQKV_DEVICE void copy_elements(T* shared, const T* global, bool valid) {
  DIFFQKV_UNROLL_BY(1)
  for (int i = 0; i < 16 / int(sizeof(T)); ++i) shared[i] = valid ? global[i] : T(0);
}
// Starts a copy of a piece where the source is aligned to 16 bytes.
template <class T>
DIFFQKV_DEVICE void copy_piece(T* shared, const T* global, bool valid, bool aligned) {
  if (aligned)
    copy_async(shared, global, valid);
  else
    copy_elements(shared, global, valid);
}

struct alignas(16) Piece {
  uint32_t words[4];
};
DIFFQKV_DEVICE void store_piece(uint16_t* global, const Piece& piece, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Piece*>(global) = piece;
    return;
  }
  DIFFQKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    global[2 * i] = static_cast<uint16_t>(piece.words[i]);
    global[2 * i + 1] = static_cast<uint16_t>(piece.words[i] >> 16);
  }
}

// Four neighbouring lanes exchange words: afterwards words[i] of lane j is what words[j] of lane i was. So four
// accumulator tiles of 8 columns, a word each of a lane's two columns, become one whole tile to a lane.
DIFFQKV_DEVICE void transpose_words(uint32_t (&words)[4]) {
  DIFFQKV_UNROLL
  for (int step = 2; step > 0; step /= 2) {  // 2 x 2 blocks of words, then the words of each
    const bool upper = lane() & step;
    DIFFQKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t got = shuffle_xor(upper ? words[i] : words[i | step], step);
      if (upper)
        words[i] = got;
      else
        words[i | step] = got;
    }
  }
}

}  // namespace diffqkv::device
