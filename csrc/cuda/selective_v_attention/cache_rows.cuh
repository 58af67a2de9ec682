// Rows of K and V caches for selective_v_attention.
#pragma once
#include "cuda/device.cuh"
#include "params/key_range.h"

namespace diffqkv::device::selective_v_attention {

// Element types of 16 bytes, what a lane reads at once.
template <class E>
struct Piece {
  using T = typename E::T;
  static constexpr int kWidth = 16 / sizeof(T);
  struct alignas(16) Vector {
    T x[kWidth];
  };
  static DIFFQKV_DEVICE Vector load(const T* p, bool vectors) {
    if (vectors) return load_vector<Vector>(p);
    Vector v;
    DIFFQKV_UNROLL
    for (int i = 0; i < kWidth; ++i) v.x[i] = p[i];
    return v;
  }
};

// The rows of a head of a batch entry by token. Positions have 32 bits: 64-bit divisions are slow.
template <class T>
struct HeadRows {
  const KvView& view;
  const Paging& paging;
  const T* head;         // in page 0, of a contiguous cache in the entry's page
  const int32_t* table;  // of the entry, or null

  DIFFQKV_DEVICE HeadRows(const KvView& the_view, const Paging& the_paging, int64_t entry, int64_t h,
                          int64_t heads_per_group)
      : view(the_view),
        paging(the_paging),
        head(head_at<const T>(view, paging.block_table != nullptr ? 0 : entry, h, heads_per_group)),
        table(paging.block_table != nullptr ? paging.block_table + entry * paging.stride : nullptr) {}
  DIFFQKV_DEVICE const T* operator[](uint32_t token) const {
    if (paging.block_table == nullptr) return head + int64_t(token) * view.stride_token;
    const uint32_t page_size = uint32_t(paging.page_size), block = token / page_size;
    return head + int64_t(table[block]) * view.stride_page + int64_t(token - block * page_size) * view.stride_token;
  }
};

// How the lanes of a warp share V rows: a power of two of them take a row, one or two pieces each, so that a warp reads
// several rows at once.
template <class E>
struct RowLanes {
  using P = Piece<E>;
  static constexpr int kPieces = sizeof(typename E::T) == 4 ? 2 : 1;  // of a lane, for rows of up to kMaxHeadDim
  static constexpr int kColumns = kPieces * P::kWidth;
  int lanes, rows, row, piece, pieces;

  explicit DIFFQKV_DEVICE RowLanes(int d) : lanes(1), pieces(d / P::kWidth) {
    while (lanes < 32 && lanes < pieces) lanes *= 2;
    rows = 32 / lanes;
    row = lane() / lanes;
    piece = lane() % lanes;
  }
  DIFFQKV_DEVICE int column(int i) const { return (piece + i / P::kWidth * lanes) * P::kWidth + i % P::kWidth; }
  DIFFQKV_DEVICE bool has(int i) const { return piece + i / P::kWidth * lanes < pieces; }
  // This lane's columns of a row, zeros where there is none or `valid` is false.
  DIFFQKV_DEVICE void load(const typename E::T* data, bool valid, bool vectors,
                           typename P::Vector (&v)[kPieces]) const {
    DIFFQKV_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      v[i] = {};
      if (valid && has(i * P::kWidth)) v[i] = P::load(data + column(i * P::kWidth), vectors);
    }
  }
  // Sums over the rows of a warp, in every lane.
  DIFFQKV_DEVICE float sum_of_rows(float x) const {
    for (int mask = lanes; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
    return x;
  }
  DIFFQKV_DEVICE float sum_of_columns(float x) const {
    for (int mask = 1; mask < lanes; mask *= 2) x += shuffle_xor(x, mask);
    return x;
  }
};

// Integers in the order of the floats, 0 and -0 being equal.
DIFFQKV_DEVICE uint32_t ordered_of(float x) {
  const uint32_t u = bits_of(x + 0.0f);
  return u ^ (u >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
DIFFQKV_DEVICE float float_of_ordered(uint32_t u) { return float_of(u >> 31 != 0 ? u ^ 0x80000000u : ~u); }
// A candidate: the larger, the better. No candidate is 0.
DIFFQKV_DEVICE uint64_t key_of(uint32_t ordered, uint32_t token) { return uint64_t(ordered) << 32 | uint32_t(~token); }
DIFFQKV_DEVICE uint32_t token_of(uint64_t key) { return ~uint32_t(key); }
DIFFQKV_DEVICE float score_of(uint64_t key) { return float_of_ordered(uint32_t(key >> 32)); }

DIFFQKV_DEVICE uint32_t lanes_below() { return (1u << lane()) - 1; }

}  // namespace diffqkv::device::selective_v_attention
