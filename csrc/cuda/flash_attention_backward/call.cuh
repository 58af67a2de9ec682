// What the kernels of flash_attention_backward share.
//
//   P = exp(S - lse)   dV = P^T dO   dP = dO V^T   dS = P (dP - delta)   dQ = scale dS K   dK = scale dS^T Q
//
// The key kernel has S^T and dP^T, keys as rows, the query kernel S and dP: either way P and dS are left operands of
// the next products without leaving their registers. Both recompute S and dP from the lse, so that no gradient is
// summed up by more than one block at a time, and in a fixed order.
#pragma once
#include <algorithm>

#include "cuda/flash_attention_backward/products.cuh"
#include "params/key_range.h"
#include "plan/cuda/flash_attention_backward_tiles.h"

namespace diffqkv::device {

inline constexpr int kFlashAttentionBackwardThreads = 32 * kFlashAttentionBackwardWarps;
inline constexpr float kInfinity = __builtin_huge_valf();

template <int kDk, int kDv>
constexpr FlashAttentionBackwardVariant backward_variant() {
  for (const FlashAttentionBackwardVariant& v : kFlashAttentionBackwardVariants)
    if (v.d_k == kDk && v.d_v == kDv) return v;
  return {};
}

// What the gradients need of a query and head besides their rows, in the order of lse: lse, +inf instead of -inf, so
// that a row without a finite score has no probabilities; rowsum(dO * O) - dlse. The 16-bit kernels have lse * log2(e)
// instead, unless scores are capped.
template <class T>
struct alignas(2 * sizeof(T)) RowFacts {
  T lse, delta;
};

// The exponent of 2 of a probability, x * factor - base.
struct Exponent {
  float factor, base;
};

struct ScoreFactors {
  float exponent;  // dot product -> exponent of 2
  float score;     // dot product, or tanh of its share of the softcap -> score
  float inner;     // dot product -> its share of the softcap
  float scale, keep_scale;
  float hidden;  // instead of the dot product with a key that the query does not see
  bool capped;

  explicit ScoreFactors(const AttentionParams& p)
      : exponent(not_zero(p.softmax_scale * kLog2e<double>)),
        score(not_zero(p.softcap > 0 ? p.softcap : p.softmax_scale)),
        inner(p.softcap > 0 ? not_zero(p.softmax_scale / p.softcap) : 0.0f),
        scale(float(p.softmax_scale)),
        keep_scale(float(p.dropout.keep_scale())),
        hidden(score > 0 ? -kInfinity : kInfinity),
        capped(p.softcap > 0) {}

  // Whether lse, as RowFacts has it, is too large for products of dot products that are subtracted from it.
  template <bool kFeatures>
  DIFFQKV_DEVICE bool large(float lse) const {
    return !(kFeatures && capped) && !(lse >= -kLargeExponent && lse <= kLargeExponent);
  }
  // slope: what a change of the scaled dot product does to the score.
  template <bool kFeatures>
  DIFFQKV_DEVICE float probability(float x, const Exponent& of_row, float& slope) const {
    slope = 1.0f;
    if (kFeatures && capped) {
      const float t = tanh(x * inner);
      slope -= t * t;
      return exp2((mul(x == hidden ? x : t, score) - of_row.base) * kLog2e<float>);
    }
    return exp2(x * of_row.factor - of_row.base);
  }
  // What the dot products of a row with a large lse, given here itself, become first; their Exponent is {log2(e), 0}
  // then.
  DIFFQKV_DEVICE float difference(float x, float lse) const { return mul(x, score) - lse; }

 private:
  // Times infinity it must not be NaN.
  static float not_zero(double x) { return float(x < 0 ? std::min(x, -1e-37) : std::max(x, 1e-37)); }
};

struct FlashAttentionBackwardCall {
  FlashAttentionBackwardParams p;
  CudaFlashAttentionBackwardPlan plan;
  char* workspace;
  ScoreFactors factors{p.forward};

  template <class T = float>
  DIFFQKV_DEVICE RowFacts<T>* rows() const {
    return reinterpret_cast<RowFacts<T>*>(workspace);
  }
};

// The lse of a row as RowFacts has it.
template <class T>
DIFFQKV_DEVICE T lse_or_infinity(const AttentionParams& p, int64_t row) {
  const T lse = static_cast<const T*>(p.lse)[row];
  return lse == T(-kInfinity) ? T(kInfinity) : lse;
}

// A row of a head of K or V.
template <class T = uint16_t>
DIFFQKV_DEVICE const T* key_at(const AttentionParams& p, const KvView& view, const Entry& entry, int64_t head,
                               int64_t heads_per_group, int64_t key) {
  return head_at<const T>(view, p.cu_seqlens_k ? 0 : entry.b, head, heads_per_group) +
         (entry.first_key + key) * view.stride_token;
}
DIFFQKV_DEVICE const uint16_t* query_at(const TokenView& view, const Entry& entry, int64_t head, int64_t query) {
  return static_cast<const uint16_t*>(view.data) + row_of(view, entry, head, query);
}

// Starts to copy kRows rows of d elements, those in [begin, end) of them; the rest of the tile is 0.
template <int kRows, int kD>
DIFFQKV_DEVICE void load_tile(uint16_t* tile, const uint16_t* rows, int64_t stride, int64_t begin, int64_t end,
                              int64_t d, bool aligned) {
  constexpr int kPieces = kD / kPiece, kRowsAtOnce = kFlashAttentionBackwardThreads / kPieces;
  const int piece = thread() % kPieces * kPiece;
  int row = thread() / kPieces;
  tile += row * tile_stride(kD) + piece;
  rows += row * stride + piece;
  DIFFQKV_UNROLL_BY(1)
  for (; row < kRows; row += kRowsAtOnce) {
    copy_piece(tile, rows, row >= begin && row < end && piece < d, aligned);
    tile += kRowsAtOnce * tile_stride(kD);
    rows += kRowsAtOnce * stride;
  }
}

// Writes rows [16 * kM of this warp] of a gradient, those below `rows`, d elements each, in E.
template <class E, int kM, int kN, class Row>
DIFFQKV_DEVICE void store_rows(const float (&c)[kM][kN][4], float factor, int64_t rows, int64_t d, const Row& row_at) {
  struct alignas(2 * sizeof(typename E::T)) Pair {
    typename E::T x[2];
  };
  DIFFQKV_UNROLL
  for (int m = 0; m < kM; ++m) {
    DIFFQKV_UNROLL
    for (int e = 0; e < 4; e += 2) {
      const int row = warp() * 16 * kM + product_row(m, e);
      if (row >= rows) continue;
      auto* pairs = reinterpret_cast<Pair*>(row_at(row));
      DIFFQKV_UNROLL
      for (int n = 0; n < kN; ++n)
        if (8 * n < d) pairs[product_column(n, 0) / 2] = {E::put(c[m][n][e] * factor), E::put(c[m][n][e + 1] * factor)};
    }
  }
}

// Row of a gradient of K or V in the partial sums, [slots, batch, heads, s_k].
DIFFQKV_DEVICE int64_t partial_row(const AttentionParams& p, int64_t b, int64_t head, int64_t heads, int64_t slot,
                                   int64_t key) {
  return ((slot * p.batch + b) * heads + head) * p.s_k + key;
}

}  // namespace diffqkv::device
