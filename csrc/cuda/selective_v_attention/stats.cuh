// The sum of the V rows and the largest row norm of a part of a V head, for callers that do not keep v_stats.
#pragma once
#include "cuda/selective_v_attention/cache_rows.cuh"
#include "cuda/selective_v_attention/params.cuh"
#include "cuda/warp.cuh"

namespace diffqkv::device::selective_v_attention {

template <class E>
struct Stats {
  using Params = selective_v_attention::Params;
  static constexpr int kThreads = kSelectiveVAttentionThreads, kMinBlocks = 4;
  using Lanes = RowLanes<E>;
  static constexpr int kWidth = Lanes::P::kWidth, kAtOnce = 4 / Lanes::kPieces;

  struct Shared {
    float sums[kSelectiveVAttentionWarps][kMaxHeadDim];
    float norms[kSelectiveVAttentionWarps];
  };
  static constexpr int kSharedBytes = sizeof(Shared);

  static DIFFQKV_DEVICE void run(const Params& params, char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const AttentionParams& p = params.sp.attention;
    const uint32_t block = uint32_t(block_x()), parts = uint32_t(params.plan.parts), n_v = uint32_t(p.heads.n_v);
    const int64_t part = block % parts, batch_v_head = block / parts, b = batch_v_head / n_v, head = batch_v_head % n_v;
    const KeyRange all = entry_of(p, b).keys;
    const KeyRange keys = {max_of(all.lo, part * kSelectiveVAttentionPartTokens),
                           min_of(all.hi, (part + 1) * kSelectiveVAttentionPartTokens)};
    if (keys.lo >= keys.hi || params.sp.top_k >= all.hi - all.lo) return;  // nobody reads this part

    const Lanes lanes(int(p.d_v));
    const HeadRows<typename E::T> rows(p.v, p.paging, b, head, p.heads.v_per_group());
    float sum[Lanes::kColumns] = {}, norm = 0.0f;
    const int slots = kSelectiveVAttentionWarps * lanes.rows, slot = warp() * lanes.rows + lanes.row;
    for (int64_t first = keys.lo; first < keys.hi; first += slots * kAtOnce) {
      typename Lanes::P::Vector v[kAtOnce][Lanes::kPieces];
      DIFFQKV_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t t = first + j * slots + slot;
        lanes.load(t < keys.hi ? rows[uint32_t(t)] : rows.head, t < keys.hi, params.plan.v_vectors, v[j]);
      }
      DIFFQKV_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        float square = 0.0f;
        DIFFQKV_UNROLL
        for (int i = 0; i < Lanes::kColumns; ++i) {
          const float x = E::get(v[j][i / kWidth].x[i % kWidth]);
          sum[i] = add(sum[i], x);
          square = fma(x, x, square);
        }
        norm = max_norm(norm, sqrt(lanes.sum_of_columns(square)));
      }
    }
    for (int mask = lanes.lanes; mask < 32; mask *= 2) norm = max_norm(norm, shuffle_xor(norm, mask));
    if (lane() == 0) shared.norms[warp()] = norm;
    DIFFQKV_UNROLL
    for (int i = 0; i < Lanes::kColumns; ++i) {
      sum[i] = lanes.sum_of_rows(sum[i]);
      if (lanes.row == 0 && lanes.has(i)) shared.sums[warp()][lanes.column(i)] = sum[i];
    }
    sync_block();
    float* out = params.part(batch_v_head, part);
    const int c = thread();
    if (c < p.d_v) {
      float total = 0.0f;
      for (int w = 0; w < kSelectiveVAttentionWarps; ++w) total += shared.sums[w][c];
      out[c] = total;
    }
    if (c == 0) {
      float most = 0.0f;
      for (int w = 0; w < kSelectiveVAttentionWarps; ++w) most = max_norm(most, shared.norms[w]);
      out[p.d_v] = most;
    }
  }
};

}  // namespace diffqkv::device::selective_v_attention
