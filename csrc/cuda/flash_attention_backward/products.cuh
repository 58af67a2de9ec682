// Matrix products of a warp, on tiles of 16-bit rows in shared memory (tile_stride apart).
#pragma once
#include "cuda/tile.cuh"

namespace diffqkv::device {

// c += a b^T, for rows a [16 * kM, kD] and b [8 * kN, kD]. Tile (m, n) of c lies in the lanes as E::mma says.
template <class E, int kM, int kN, int kD>
DIFFQKV_DEVICE void multiply_rows(float (&c)[kM][kN][4], const uint16_t* a, const uint16_t* b) {
  constexpr int kStride = tile_stride(kD);
  a += lane() % 16 * kStride + lane() / 16 * kPiece;
  b += (lane() % 8 + lane() / 16 * 8) * kStride + lane() / 8 % 2 * kPiece;
  DIFFQKV_UNROLL_BY(2)  // all at once, so many loads go ahead that registers spill
  for (int d = 0; d < kD; d += 16) {
    uint32_t x[kM][4];
    DIFFQKV_UNROLL
    for (int m = 0; m < kM; ++m) load_matrices(x[m], a + m * 16 * kStride + d);
    DIFFQKV_UNROLL
    for (int n = 0; n < kN; n += 2) {
      uint32_t y[4];
      load_matrices(y, b + n * 8 * kStride + d);
      DIFFQKV_UNROLL
      for (int m = 0; m < kM; ++m) {
        E::mma(c[m][n], x[m], y[0], y[1]);
        E::mma(c[m][n + 1], x[m], y[2], y[3]);
      }
    }
  }
}

// c += a b, for a [16 * kM, 16 * kK] in registers and rows b [16 * kK, kD].
template <class E, int kM, int kK, int kD>
DIFFQKV_DEVICE void multiply_columns(float (&c)[kM][kD / 8][4], const uint32_t (&a)[kM][kK][4], const uint16_t* b) {
  constexpr int kStride = tile_stride(kD);
  b += lane() % 16 * kStride + lane() / 16 * kPiece;
  DIFFQKV_UNROLL
  for (int k = 0; k < kK; ++k) {
    DIFFQKV_UNROLL
    for (int n = 0; n < kD / 8; n += 2) {
      uint32_t y[4];
      load_matrices_transposed(y, b + k * 16 * kStride + n * 8);
      DIFFQKV_UNROLL
      for (int m = 0; m < kM; ++m) {
        E::mma(c[m][n], a[m][k], y[0], y[1]);
        E::mma(c[m][n + 1], a[m][k], y[2], y[3]);
      }
    }
  }
}

// A product becomes the left operand of the next: row halves and pairs of columns stay in their lanes.
template <class E, int kM, int kN>
DIFFQKV_DEVICE void to_operand(uint32_t (&a)[kM][kN / 2][4], const float (&c)[kM][kN][4]) {
  DIFFQKV_UNROLL
  for (int m = 0; m < kM; ++m) {
    DIFFQKV_UNROLL
    for (int n = 0; n < kN; ++n) {
      a[m][n / 2][n % 2 * 2] = E::pack(c[m][n][0], c[m][n][1]);
      a[m][n / 2][n % 2 * 2 + 1] = E::pack(c[m][n][2], c[m][n][3]);
    }
  }
}

template <int kM, int kN>
DIFFQKV_DEVICE void clear(float (&c)[kM][kN][4]) {
  DIFFQKV_UNROLL
  for (int m = 0; m < kM; ++m) {
    DIFFQKV_UNROLL
    for (int n = 0; n < kN; ++n) {
      DIFFQKV_UNROLL
      for (int e = 0; e < 4; ++e) c[m][n][e] = 0.0f;
    }
  }
}
// Row of c and column that element e of tile (m, n) is in this lane.
DIFFQKV_DEVICE int product_row(int m, int e) { return 16 * m + lane() / 4 + e / 2 * 8; }
DIFFQKV_DEVICE int product_column(int n, int e) { return 8 * n + 2 * (lane() % 4) + e % 2; }

}  // namespace diffqkv::device
