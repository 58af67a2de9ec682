// flash_attention on matrix products: a block takes some queries of a q head and walks their keys tile by tile, with
// the scores of a tile and the accumulator of the results in registers (FlashAttention-2, Dao 2023).
#pragma once
#include "cuda/dropout.cuh"
#include "cuda/flash_attention/block.cuh"
#include "cuda/tile.cuh"

namespace diffqkv::device {

constexpr FlashAttentionVariant flash_attention_variant(int d_k, int d_v) {
  for (const FlashAttentionVariant& v : kFlashAttentionVariants)
    if (v.d_k == d_k && v.d_v == d_v) return v;
  return {};
}

// kFeatures: softcap and dropout; all else is in every kernel.
template <class E, int kDk, int kDv, bool kFeatures>
struct FlashAttention {
  using Params = FlashAttentionParams<float>;
  using Block = FlashAttentionBlock;
  static constexpr FlashAttentionVariant kVariant = flash_attention_variant(kDk, kDv);
  static constexpr int kThreads = 32 * kVariant.warps, kMinBlocks = kVariant.blocks;
  static constexpr int kBlockM = kVariant.block_m(), kBlockN = kVariant.block_n;
  static constexpr int kRowTiles = kVariant.warp_rows / 16;  // of 16 queries, per warp
  static constexpr int kKeyTiles = kBlockN / 8, kDimTiles = kDv / 8;
  static constexpr int kStrideK = tile_stride(kDk), kStrideV = tile_stride(kDv);
  // Fragments of q that every tile of keys meets stay in registers where those suffice.
  static constexpr bool kHoldQ = kDk + kDv <= 128;
  // The largest kernel serves dimensions far below its own: it passes over those that are not there.
  static constexpr bool kPartial = kDk == 256;

  // The first row in a tile of 16 that this lane holds; the second one is 8 further.
  static DIFFQKV_DEVICE int row_of_lane(int row_tile) { return (warp() * kRowTiles + row_tile) * 16 + lane() / 4; }

  // ---- shared memory ------------------------------------------------------------------------------------------------

  struct Shared {
    uint16_t *q, *k, *v;  // [kBlockM], [stages, kBlockN], [stages, kBlockN] rows
    KeyRows* rows;        // [2, kBlockN], of the keys of even and odd tiles
    Block* block;

    DIFFQKV_DEVICE Shared(char* shared, int stages)
        : q(reinterpret_cast<uint16_t*>(shared)),
          k(q + kBlockM * kStrideK),
          v(k + stages * kBlockN * kStrideK),
          rows(reinterpret_cast<KeyRows*>(v + stages * kBlockN * kStrideV)),
          block(reinterpret_cast<Block*>(rows + 2 * kBlockN)) {}
  };

  // Finds the rows of the keys [first_key, first_key + kBlockN), once for all pieces of a row, however tokens are
  // paged.
  static DIFFQKV_DEVICE void find_rows(const AttentionParams& p, const Block& b, int first_key, KeyRows* rows) {
    if (thread() < kBlockN) rows[thread()] = key_rows(p, b, first_key + thread());
  }

  // Starts to copy kRows rows of d elements, which begin at row_at(row), zeros for rows outside of [lo, hi).
  template <int kRows, int kWidth, class RowAt>
  static DIFFQKV_DEVICE void load_rows(uint16_t* tile, const void* data, int64_t d, int lo, int hi, bool aligned,
                                       const RowAt& row_at) {
    constexpr int kPieces = kWidth / kPiece, kStep = kThreads / kPieces, kStride = tile_stride(kWidth);
    static_assert(kThreads % kPieces == 0 && kRows % kStep == 0);
    const int first = thread() / kPieces, column = thread() % kPieces * kPiece;
    const bool inside = column < d;
    const auto* elements = static_cast<const uint16_t*>(data) + (inside ? column : 0);
    tile += first * kStride + column;
    if (aligned) {
      constexpr int kAtOnce = kRows / kStep < 4 ? kRows / kStep : 4;  // addresses under way
      DIFFQKV_UNROLL
      for (int row = 0; row < kRows; row += kAtOnce * kStep) {
        int64_t at[kAtOnce];
        DIFFQKV_UNROLL
        for (int i = 0; i < kAtOnce; ++i) at[i] = row_at(first + row + i * kStep);
        DIFFQKV_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int here = row + i * kStep;
          copy_async(tile + here * kStride, elements + at[i], inside && first + here >= lo && first + here < hi);
        }
      }
    } else {
      DIFFQKV_UNROLL_BY(1)
      for (int row = 0; row < kRows; row += kStep)
        copy_elements(tile + row * kStride, elements + row_at(first + row),
                      inside && first + row >= lo && first + row < hi);
    }
  }

  // ---- products -----------------------------------------------------------------------------------------------------

  using QueryFragments = uint32_t[kRowTiles][4];
  using Scores = float[kRowTiles][kKeyTiles][4];
  using Probabilities = uint32_t[kRowTiles][kKeyTiles / 2][4];
  using Sums = float[kRowTiles][kDimTiles][4];

  // Loads dimensions [16 * step, 16 * step + 16) of this warp's queries.
  static DIFFQKV_DEVICE void load_fragments(const uint16_t* q, int step, QueryFragments& fragments) {
    q += (warp() * kVariant.warp_rows + lane() % 16) * kStrideK + lane() / 16 * kPiece + step * 16;
    DIFFQKV_UNROLL
    for (int m = 0; m < kRowTiles; ++m) load_matrices(fragments[m], q + m * 16 * kStrideK);
  }

  // S = Q K^T
  template <class LoadQuery>
  static DIFFQKV_DEVICE void multiply_keys(Scores& s, const LoadQuery& query_fragments, const uint16_t* k, int64_t d) {
    k += (lane() % 8 + lane() / 16 * 8) * kStrideK + lane() / 8 % 2 * kPiece;
    DIFFQKV_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      DIFFQKV_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        DIFFQKV_UNROLL
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
      }
    }
    DIFFQKV_UNROLL
    for (int step = 0; step < kDk / 16; ++step) {
      if (kPartial && step * 16 >= d) continue;
      QueryFragments q;
      query_fragments(step, q);
      DIFFQKV_UNROLL
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t y[4];
        load_matrices(y, k + n * 8 * kStrideK + step * 16);
        DIFFQKV_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          E::mma(s[m][n], q[m], y[0], y[1]);
          E::mma(s[m][n + 1], q[m], y[2], y[3]);
        }
      }
    }
  }

  // An accumulator becomes a left operand without leaving its registers.
  static DIFFQKV_DEVICE void pack(Probabilities& p, const Scores& s) {
    DIFFQKV_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      DIFFQKV_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        DIFFQKV_UNROLL
        for (int half = 0; half < 2; ++half)
          p[m][n / 2][n % 2 * 2 + half] = E::pack(s[m][n][2 * half], s[m][n][2 * half + 1]);
      }
    }
  }

  // O += P V
  static DIFFQKV_DEVICE void multiply_values(Sums& o, const Probabilities& p, const uint16_t* v, int64_t d) {
    v += lane() % 16 * kStrideV + lane() / 16 * kPiece;
    DIFFQKV_UNROLL
    for (int k = 0; k < kKeyTiles; k += 2) {
      DIFFQKV_UNROLL
      for (int n = 0; n < kDimTiles; n += 2) {
        if (kPartial && n * 8 >= d) continue;
        uint32_t y[4];
        load_matrices_transposed(y, v + k * 8 * kStrideV + n * 8);
        DIFFQKV_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          E::mma(o[m][n], p[m][k / 2], y[0], y[1]);
          E::mma(o[m][n + 1], p[m][k / 2], y[2], y[3]);
        }
      }
    }
  }

  // ---- softmax ------------------------------------------------------------------------------------------------------

  static DIFFQKV_DEVICE void mask(const AttentionParams& p, const Block& b, int first_key, Scores& s) {
    const Entry entry = entry_of(p, b.batch);
    DIFFQKV_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      DIFFQKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        const KeyRange keys = keys_of_query(p, entry, b.first_query + row_of_lane(m) + 8 * half);
        const int column = first_key + 2 * (lane() % 4);
        const int lo = static_cast<int>(keys.lo) - column, hi = static_cast<int>(keys.hi) - column;
        DIFFQKV_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
          DIFFQKV_UNROLL
          for (int i = 0; i < 2; ++i)
            if (n * 8 + i < lo || n * 8 + i >= hi) s[m][n][2 * half + i] = -INFINITY;
        }
      }
    }
  }

  struct State {
    Sums o;
    float most[kRowTiles][2], sum[kRowTiles][2];  // of a row

    DIFFQKV_DEVICE State() {
      DIFFQKV_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        DIFFQKV_UNROLL
        for (int half = 0; half < 2; ++half) most[m][half] = -INFINITY, sum[m][half] = 0.0f;
        DIFFQKV_UNROLL
        for (int n = 0; n < kDimTiles; ++n) {
          DIFFQKV_UNROLL
          for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
        }
      }
    }
  };

  // Takes the tile's scores to powers of two, divided by 2^most for the largest exponent so far; sums and accumulator
  // follow. most: of scores; a row's four lanes agree in it. sum: of this lane's columns.
  static DIFFQKV_DEVICE void softmax(const SoftmaxFactors<float>& factors, Scores& s, State& state) {
    DIFFQKV_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      DIFFQKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        float top = state.most[m][half];
        DIFFQKV_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        float most = state.most[m][half], base, added = 0.0f;
        if (factors.base_of(top, base)) {
          most -= top;
          DIFFQKV_UNROLL
          for (int n = 0; n < kKeyTiles; ++n) s[m][n][2 * half] -= top, s[m][n][2 * half + 1] -= top;
        }
        const float scale = exp2(most * factors.exponent - base);
        DIFFQKV_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
          DIFFQKV_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = exp2(s[m][n][i] * factors.exponent - base);
            added += s[m][n][i];
          }
        }
        state.most[m][half] = top;
        state.sum[m][half] = state.sum[m][half] * scale + added;
        DIFFQKV_UNROLL
        for (int n = 0; n < kDimTiles; ++n) {
          state.o[m][n][2 * half] *= scale;
          state.o[m][n][2 * half + 1] *= scale;
        }
      }
    }
  }

  static DIFFQKV_DEVICE void cap(const SoftmaxFactors<float>& factors, Scores& s) {
    DIFFQKV_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      DIFFQKV_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        DIFFQKV_UNROLL
        for (int i = 0; i < 4; ++i) s[m][n][i] = tanh(s[m][n][i] * factors.inner);
      }
    }
  }

  static DIFFQKV_DEVICE void drop(const AttentionParams& p, const Block& b, int first_key, Scores& s) {
    const Dropout& dropout = p.dropout;
    DIFFQKV_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      DIFFQKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        DIFFQKV_UNROLL
        for (int n = 0; n < kKeyTiles; n += 4) {
          uint32_t words[4];
          dropout_words_of_columns(dropout, b.batch * p.heads.n_q + b.head, b.first_query + row_of_lane(m) + 8 * half,
                                   first_key / kKeysPerDraw + n, words);
          DIFFQKV_UNROLL
          for (int i = 0; i < 4; ++i) {
            if (!keeps_low(dropout, words[i])) s[m][n + i][2 * half] = 0.0f;
            if (!keeps_high(dropout, words[i])) s[m][n + i][2 * half + 1] = 0.0f;
          }
        }
      }
    }
  }

  // ---- results ------------------------------------------------------------------------------------------------------

  static DIFFQKV_DEVICE void store(const Params& params, const Block& b, const State& state) {
    const SoftmaxFactors<float>& factors = params.factors;
    const AttentionParams& p = params.p;
    const Entry entry = entry_of(p, b.batch);
    DIFFQKV_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      DIFFQKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = row_of_lane(m) + 8 * half;
        float total = state.sum[m][half], lse;
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const float scale = factors.finish(p, b.head, state.most[m][half], total, lse);
        const int64_t query = b.first_query + row;
        if (row < b.queries && lane() % 4 == 0) static_cast<float*>(p.lse)[lse_of(p, entry, b.head, query)] = lse;
        auto* out = static_cast<uint16_t*>(p.out.data) + row_of(p.out, entry, b.head, query);
        DIFFQKV_UNROLL
        for (int n = 0; n < kDimTiles; n += 4) {
          Piece piece;
          DIFFQKV_UNROLL
          for (int i = 0; i < 4; ++i)
            piece.words[i] = E::pack(state.o[m][n + i][2 * half] * scale, state.o[m][n + i][2 * half + 1] * scale);
          transpose_words(piece.words);
          const int column = (n + lane() % 4) * 8;
          if (row < b.queries && column < p.d_v) store_piece(out + column, piece, params.plan.out_aligned);
        }
      }
    }
  }

  // ---- the walk -----------------------------------------------------------------------------------------------------

  static DIFFQKV_DEVICE void walk(const Params& params, const Shared& tiles, State& state) {
    const AttentionParams& p = params.p;
    const SoftmaxFactors<float>& factors = params.factors;
    const Block& b = *tiles.block;
    const int stages = params.plan.stages;
    const bool two = stages == 2, aligned = params.plan.aligned;
    const auto find = [&](int tile) { find_rows(p, b, tile * kBlockN, tiles.rows + (tile & 1) * kBlockN); };
    const auto load_k = [&](int tile, int stage) {
      load_rows<kBlockN, kDk>(tiles.k + stage * kBlockN * kStrideK, p.k.data, p.d_k, b.lo - tile * kBlockN,
                              b.hi - tile * kBlockN, aligned,
                              [&](int row) { return tiles.rows[(tile & 1) * kBlockN + row].k; });
      copy_commit();
    };
    const auto load_v = [&](int tile, int stage) {
      load_rows<kBlockN, kDv>(tiles.v + stage * kBlockN * kStrideV, p.v.data, p.d_v, b.lo - tile * kBlockN,
                              b.hi - tile * kBlockN, aligned,
                              [&](int row) { return tiles.rows[(tile & 1) * kBlockN + row].v; });
      copy_commit();
    };
    // Copies come in the order K, V, K, V, ...; of two stages, one copy is always under way when the one before it is
    // waited for.
    const auto arrive = [&] {
      if (two)
        copy_wait<1>();
      else
        copy_wait<0>();
      sync_block();
    };

    // Tiles are counted from key 0, so that neither the block nor the batch shows in a result's bits.
    const int first_tile = b.lo / kBlockN;
    const int64_t first_row = row_of(p.q, entry_of(p, b.batch), b.head, b.first_query);
    load_rows<kBlockM, kDk>(tiles.q, p.q.data, p.d_k, 0, b.queries, aligned,
                            [&](int row) { return first_row + min_of(row, b.queries - 1) * p.q.stride_token; });
    find(first_tile);
    if (two) find(first_tile + 1);
    sync_block();
    load_k(first_tile, 0);
    if (two) load_v(first_tile, 0);
    arrive();
    if (factors.negative) {
      DIFFQKV_UNROLL_BY(1)
      for (int i = thread(); i < kBlockM * kStrideK; i += kThreads) tiles.q[i] ^= 0x8000;
      sync_block();
    }
    QueryFragments held[kHoldQ ? kDk / 16 : 1];
    if constexpr (kHoldQ) {
      DIFFQKV_UNROLL
      for (int step = 0; step < kDk / 16; ++step) load_fragments(tiles.q, step, held[step]);
    }
    const auto query_fragments = [&](int step, QueryFragments& q) {
      if constexpr (kHoldQ) {
        DIFFQKV_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          DIFFQKV_UNROLL
          for (int i = 0; i < 4; ++i) q[m][i] = held[step][m][i];
        }
      } else {
        load_fragments(tiles.q, step, q);
      }
    };

    for (int tile = first_tile, stage = 0; tile * kBlockN < b.hi; ++tile) {
      const int first_key = tile * kBlockN, other = two ? stage ^ 1 : 0;
      arrive();  // K is here; V of the tile before has been read
      find(tile + stages);
      two ? load_k(tile + 1, other) : load_v(tile, 0);
      Scores s;
      multiply_keys(s, query_fragments, tiles.k + stage * kBlockN * kStrideK, p.d_k);
      if (kFeatures && factors.capped) cap(factors, s);
      if (first_key < b.all_lo || first_key + kBlockN > b.all_hi) mask(p, b, first_key, s);
      softmax(factors, s, state);
      if (kFeatures && p.dropout.threshold > 0) drop(p, b, first_key, s);
      Probabilities probabilities;
      pack(probabilities, s);
      arrive();  // V is here, K has been read
      two ? load_v(tile + 1, other) : load_k(tile + 1, 0);
      multiply_values(state.o, probabilities, tiles.v + stage * kBlockN * kStrideV, p.d_v);
      stage = other;
    }
  }

  static DIFFQKV_DEVICE void run(const Params& params, char* shared) {
    const Shared tiles(shared, params.plan.stages);
    if (thread() == 0) *tiles.block = flash_attention_block(params);
    sync_block();
    const Block& b = *tiles.block;
    if (b.queries <= 0) return;
    State state;
    if (b.lo < b.hi) walk(params, tiles, state);
    store(params, b, state);
  }
};

}  // namespace diffqkv::device
