// dQ: a block owns queries of a head and walks the keys that they see.
#pragma once
#include "cuda/dropout.cuh"
#include "cuda/flash_attention_backward/call.cuh"

namespace diffqkv::device {

template <class E, int kDk, int kDv, bool kFeatures>
struct QueryGradients {
  using Params = FlashAttentionBackwardCall;
  static constexpr int kThreads = kFlashAttentionBackwardThreads, kMinBlocks = kFlashAttentionBackwardBlocks;
  static constexpr FlashAttentionBackwardVariant kVariant = backward_variant<kDk, kDv>();
  static constexpr int kQueries = kVariant.queries.rows, kKeys = kVariant.queries.step;
  static constexpr int kWarpQueries = kQueries / kFlashAttentionBackwardWarps, kM = kWarpQueries / 16, kN = kKeys / 8;
  static constexpr int kStrideK = tile_stride(kDk), kStrideV = tile_stride(kDv);

  // What a block knows of itself lies in shared memory too: registers are for the gradients.
  struct Block {
    Entry entry;
    int64_t head, i0, queries;  // i0: the first one
    int64_t lo, hi;             // keys that one of the queries sees, from a multiple of 8 on
  };
  struct Keys {
    alignas(16) uint16_t k[kKeys * kStrideK];
    alignas(16) uint16_t v[kKeys * kStrideV];
  };
  struct Shared {
    Block block;
    RowFacts<float> rows[kQueries];
    alignas(16) uint16_t q[kQueries * kStrideK];
    alignas(16) uint16_t dout[kQueries * kStrideV];
    Keys keys[2];  // or fewer
  };
  static_assert(sizeof(Shared) <= query_shared_bytes(kVariant, 2) &&
                sizeof(Shared) - sizeof(Keys) <= query_shared_bytes(kVariant, 1));

  const FlashAttentionBackwardCall& call;
  Shared& shared;
  const AttentionParams& p = call.p.forward;
  const Block& block = shared.block;

  DIFFQKV_DEVICE Block block_of() const {
    // Causal blocks of late queries see most keys: they come first. The heads of a group stand side by side, so that
    // their keys stay in the L2 cache.
    const int64_t x = block_x() / p.heads.n_q, blocks = grid_x() / p.heads.n_q / p.batch;
    Block b{entry_of(p, x % p.batch), block_x() % p.heads.n_q, (blocks - 1 - x / p.batch) * kQueries, 0, 0, 0};
    b.queries = min_of(kQueries, b.entry.s_q - b.i0);
    if (b.queries <= 0) return b;  // a packed sequence that is not the longest
    b.lo = keys_of_query(p, b.entry, b.i0).lo;
    b.hi = keys_of_query(p, b.entry, b.i0 + b.queries - 1).hi;
    if (b.lo < b.hi) b.lo -= b.lo % kKeysPerDraw;
    return b;
  }

  DIFFQKV_DEVICE void run() const {
    if (thread() == 0) shared.block = block_of();
    sync_block();
    if (block.queries <= 0) return;
    float dq[kM][kDk / 8][4];
    clear(dq);
    if (block.lo < block.hi) walk(dq);
    const TokenView& view = call.p.dq;
    store_rows<E>(dq, call.factors.scale, block.queries, p.d_k, [&](int row) {
      return static_cast<uint16_t*>(view.data) + row_of(view, block.entry, block.head, block.i0 + row);
    });
  }

  DIFFQKV_DEVICE void walk(float (&dq)[kM][kDk / 8][4]) const {
    const bool two = call.plan.query_stages == 2;
    load_queries();
    int stage = 0;
    load_keys(block.lo, stage);
    for (int64_t j = block.lo; j < block.hi; j += kKeys) {
      copy_wait<0>();
      sync_block();  // the tile is there, and nobody reads the other one any more
      const bool more = j + kKeys < block.hi;
      if (two && more) load_keys(j + kKeys, 1 - stage);
      add(dq, j, shared.keys[stage]);
      if (two) {
        stage = 1 - stage;
      } else if (more) {
        sync_block();
        load_keys(j + kKeys, stage);
      }
    }
  }

  DIFFQKV_DEVICE void load_queries() const {
    const TokenView& dout = call.p.dout;
    const bool aligned = call.plan.aligned;
    load_tile<kQueries, kDk>(shared.q, query_at(p.q, block.entry, block.head, block.i0), p.q.stride_token, 0,
                             block.queries, p.d_k, aligned);
    load_tile<kQueries, kDv>(shared.dout, query_at(dout, block.entry, block.head, block.i0), dout.stride_token, 0,
                             block.queries, p.d_v, aligned);
    for (int i = thread(); i < kQueries; i += kThreads)
      copy_async_8(&shared.rows[i], call.rows() + lse_of(p, block.entry, block.head, block.i0 + i), i < block.queries);
  }
  DIFFQKV_DEVICE void load_keys(int64_t j, int stage) const {
    const Entry& entry = block.entry;
    const HeadGroups& h = p.heads;
    const int64_t begin = entry.keys.lo - j, end = entry.keys.hi - j;
    const bool aligned = call.plan.aligned;
    load_tile<kKeys, kDk>(shared.keys[stage].k, key_at(p, p.k, entry, h.k_head(block.head), h.k_per_group(), j),
                          p.k.stride_token, begin, end, p.d_k, aligned);
    load_tile<kKeys, kDv>(shared.keys[stage].v, key_at(p, p.v, entry, h.v_head(block.head), h.v_per_group(), j),
                          p.v.stride_token, begin, end, p.d_v, aligned);
    copy_commit();
  }

  // dq += dS K for the keys of a tile, from j on.
  DIFFQKV_DEVICE void add(float (&dq)[kM][kDk / 8][4], int64_t j, const Keys& keys) const {
    const int row = warp() * kWarpQueries;
    const int64_t i = block.i0 + row;
    const KeyRange of_first = keys_of_query(p, block.entry, i);
    const KeyRange of_last = keys_of_query(p, block.entry, i + kWarpQueries - 1);
    if (of_last.hi <= j || of_first.lo >= j + kKeys) return;  // no query of this warp sees a key
    float s[kM][kN][4], dp[kM][kN][4];
    clear(s);
    multiply_rows<E, kM, kN, kDk>(s, shared.q + row * kStrideK, keys.k);
    if (of_last.lo > j || of_first.hi < j + kKeys) hide(s, i, j);
    DIFFQKV_UNROLL
    for (int m = 0; m < kM; ++m) {
      DIFFQKV_UNROLL
      for (int e = 0; e < 4; ++e) {
        Exponent exponent{call.factors.exponent, shared.rows[row + product_row(m, e)].lse};
        if (call.factors.template large<kFeatures>(exponent.base)) {
          const float lse = lse_or_infinity<float>(p, lse_of(p, block.entry, block.head, i + product_row(m, e)));
          DIFFQKV_UNROLL
          for (int n = 0; n < kN; ++n) s[m][n][e] = call.factors.difference(s[m][n][e], lse);
          exponent = {kLog2e<float>, 0.0f};
        }
        DIFFQKV_UNROLL
        for (int n = 0; n < kN; ++n) {
          float slope;
          s[m][n][e] = call.factors.template probability<kFeatures>(s[m][n][e], exponent, slope);
          s[m][n][e] *= slope;
        }
      }
    }
    clear(dp);
    multiply_rows<E, kM, kN, kDv>(dp, shared.dout + row * kStrideV, keys.v);
    if (kFeatures && p.dropout.threshold > 0) drop(dp, j);
    DIFFQKV_UNROLL
    for (int m = 0; m < kM; ++m) {
      DIFFQKV_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float delta = shared.rows[row + product_row(m, e)].delta;
        DIFFQKV_UNROLL
        for (int n = 0; n < kN; ++n) dp[m][n][e] = s[m][n][e] * (dp[m][n][e] - delta);
      }
    }
    uint32_t ds[kM][kN / 2][4];
    to_operand<E>(ds, dp);
    multiply_columns<E, kM, kN / 2, kDk>(dq, ds, keys.k);
  }

  // Takes keys away from queries that do not see them.
  DIFFQKV_DEVICE void hide(float (&s)[kM][kN][4], int64_t i, int64_t j) const {
    DIFFQKV_UNROLL
    for (int m = 0; m < kM; ++m) {
      DIFFQKV_UNROLL
      for (int half = 0; half < 4; half += 2) {
        const KeyRange seen = keys_of_query(p, block.entry, i + product_row(m, half));
        DIFFQKV_UNROLL
        for (int n = 0; n < kN; ++n) {
          DIFFQKV_UNROLL
          for (int e = half; e < half + 2; ++e) {
            const int64_t key = j + product_column(n, e);
            if (key < seen.lo || key >= seen.hi) s[m][n][e] = call.factors.hidden;
          }
        }
      }
    }
  }

  DIFFQKV_DEVICE void drop(float (&dp)[kM][kN][4], int64_t j) const {
    DIFFQKV_UNROLL
    for (int m = 0; m < kM; ++m) {
      DIFFQKV_UNROLL
      for (int half = 0; half < 4; half += 2) {
        const int64_t query = block.i0 + warp() * kWarpQueries + product_row(m, half);
        DIFFQKV_UNROLL
        for (int n = 0; n < kN; n += 4) {
          uint32_t words[4];
          dropout_words_of_columns(p.dropout, block.entry.b * p.heads.n_q + block.head, query, j / kKeysPerDraw + n,
                                   words);
          DIFFQKV_UNROLL
          for (int t = 0; t < 4 && n + t < kN; ++t) {
            float (&x)[4] = dp[m][n + t];
            x[half] = keeps_low(p.dropout, words[t]) ? x[half] * call.factors.keep_scale : 0.0f;
            x[half + 1] = keeps_high(p.dropout, words[t]) ? x[half + 1] * call.factors.keep_scale : 0.0f;
          }
        }
      }
    }
  }

  static DIFFQKV_DEVICE void run(const Params& params, char* memory) {
    QueryGradients{params, *reinterpret_cast<Shared*>(memory)}.run();
  }
};

}  // namespace diffqkv::device
