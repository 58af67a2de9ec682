// dK and dV: a block owns keys of a KV group and walks the queries that see them, q head by q head. When the V head
// changes, dV of the last one is done, when the K head changes, dK.
#pragma once
#include "cuda/dropout.cuh"
#include "cuda/flash_attention_backward/call.cuh"

namespace diffqkv::device {

template <class E, int kDk, int kDv, bool kFeatures>
struct KeyGradients {
  using Params = FlashAttentionBackwardCall;
  static constexpr int kThreads = kFlashAttentionBackwardThreads, kMinBlocks = kFlashAttentionBackwardBlocks;
  static constexpr FlashAttentionBackwardVariant kVariant = backward_variant<kDk, kDv>();
  static constexpr int kKeys = kVariant.keys.rows, kQueries = kVariant.keys.step;
  static constexpr int kWarpKeys = kKeys / kFlashAttentionBackwardWarps, kM = kWarpKeys / 16, kN = kQueries / 8;
  static constexpr int kStrideK = tile_stride(kDk), kStrideV = tile_stride(kDv);

  // What a block knows of itself lies in shared memory too: registers are for the gradients.
  struct Block {
    Entry entry;
    int64_t group, chunk, j0;
    int64_t h0, h1;  // q heads
    int64_t lo, hi;  // queries that see one of the keys
  };
  struct Queries {
    RowFacts<float> rows[kQueries];
    alignas(16) uint16_t q[kQueries * kStrideK];
    alignas(16) uint16_t dout[kQueries * kStrideV];
  };
  struct Shared {
    Block block;
    alignas(16) uint16_t k[kKeys * kStrideK];
    alignas(16) uint16_t v[kKeys * kStrideV];
    Queries queries[2];  // or fewer
  };
  static_assert(sizeof(Shared) <= key_shared_bytes(kVariant, 2) &&
                sizeof(Shared) - sizeof(Queries) <= key_shared_bytes(kVariant, 1));

  // kWantsK, kWantsV: which gradients the block computes.
  template <bool kWantsK, bool kWantsV>
  struct Walk {
    const FlashAttentionBackwardCall& call;
    Shared& shared;
    const AttentionParams& p = call.p.forward;
    const Block& block = shared.block;

    DIFFQKV_DEVICE Block block_of(int64_t x) const {
      // Causal blocks of early keys are seen by most queries: they come first.
      const HeadGroups& h = p.heads;
      const int64_t chunk = x % call.plan.chunks, group = x / call.plan.chunks % h.groups();
      x /= call.plan.chunks * h.groups();
      Block b{entry_of(p, x % p.batch), group, chunk, x / p.batch * kKeys, 0, 0, 0, 0};
      b.h0 = group * h.q_per_group() + chunk * call.plan.chunk_heads;
      b.h1 = min_of(b.h0 + call.plan.chunk_heads, (group + 1) * h.q_per_group());
      const KeyRange queries = queries_of_keys(p, b.entry, {b.j0, b.j0 + kKeys});
      b.lo = queries.lo, b.hi = queries.hi;
      return b;
    }

    DIFFQKV_DEVICE void run(int64_t x) const {
      if (thread() == 0) shared.block = block_of(x);
      sync_block();
      if (block.j0 >= block.entry.s_k) return;  // a packed sequence that is not the longest
      float dk[kM][kWantsK ? kDk / 8 : 1][4], dv[kM][kWantsV ? kDv / 8 : 1][4];
      clear(dk), clear(dv);
      const bool two = call.plan.key_stages == 2;
      int stage = 0;
      if (two && block.lo < block.hi) load_queries(block.h0, block.lo, stage);
      for (int64_t head = block.h0; head < block.h1; ++head) {
        if (block.lo < block.hi) load_heads(head);
        for (int64_t i = block.lo; i < block.hi; i += kQueries) {
          if (!two) {
            sync_block();
            load_queries(head, i, stage);
          }
          copy_wait<0>();
          sync_block();  // the tile is there, and nobody reads the other one any more
          if (two) {
            if (i + kQueries < block.hi)
              load_queries(head, i + kQueries, 1 - stage);
            else if (head + 1 < block.h1)
              load_queries(head + 1, block.lo, 1 - stage);
          }
          add(dk, dv, head, i, shared.queries[stage]);
          if (two) stage = 1 - stage;
        }
        store_heads(dk, dv, head);
      }
    }

    DIFFQKV_DEVICE void load_queries(int64_t head, int64_t i, int stage) const {
      const TokenView& dout = call.p.dout;
      Queries& queries = shared.queries[stage];
      const int64_t end = block.entry.s_q - i;
      load_tile<kQueries, kDk>(queries.q, query_at(p.q, block.entry, head, i), p.q.stride_token, 0, end, p.d_k,
                               call.plan.aligned);
      load_tile<kQueries, kDv>(queries.dout, query_at(dout, block.entry, head, i), dout.stride_token, 0, end, p.d_v,
                               call.plan.aligned);
      if (thread() < kQueries)
        copy_async_8(&queries.rows[thread()], call.rows() + lse_of(p, block.entry, head, i + thread()), thread() < end);
      copy_commit();
    }

    // Loads K and V, where they are not those of the q head before.
    DIFFQKV_DEVICE void load_heads(int64_t head) const {
      const HeadGroups& h = p.heads;
      const bool first = head == block.h0;
      sync_block();  // nobody reads the last ones any more
      if (first || h.k_head(head) != h.k_head(head - 1))
        load_keys<kDk>(shared.k, p.k, h.k_head(head), h.k_per_group(), p.d_k);
      if (kWantsK && (first || h.v_head(head) != h.v_head(head - 1)))
        load_keys<kDv>(shared.v, p.v, h.v_head(head), h.v_per_group(), p.d_v);
      copy_commit();
    }
    template <int kD>
    DIFFQKV_DEVICE void load_keys(uint16_t* tile, const KvView& view, int64_t head, int64_t heads_per_group,
                                  int64_t d) const {
      const Entry& entry = block.entry;
      load_tile<kKeys, kD>(tile, key_at(p, view, entry, head, heads_per_group, block.j0), view.stride_token,
                           entry.keys.lo - block.j0, entry.keys.hi - block.j0, d, call.plan.aligned);
    }

    // dV += P^T dO and dK += dS^T Q for the queries of a tile, from i on.
    template <int kK8, int kV8>
    DIFFQKV_DEVICE void add(float (&dk)[kM][kK8][4], float (&dv)[kM][kV8][4], int64_t head, int64_t i,
                            const Queries& queries) const {
      const int row = warp() * kWarpKeys;
      const int64_t j = block.j0 + row;
      const KeyRange of_first = keys_of_query(p, block.entry, i);
      const KeyRange of_last = keys_of_query(p, block.entry, min_of(i + kQueries, block.entry.s_q) - 1);
      if (of_last.hi <= j || of_first.lo >= j + kWarpKeys) return;  // no query sees a key of this warp
      uint32_t a[kM][kN / 2][4], kept[kM] = {};
      float s[kM][kN][4];
      clear(s);
      multiply_rows<E, kM, kN, kDk>(s, shared.k + row * kStrideK, queries.q);
      if (of_last.lo > j || of_first.hi < j + kWarpKeys) hide(s, i, j);
      const bool dropout = kFeatures && p.dropout.threshold > 0;
      if (dropout) draw(kept, head, i);
      bool large = false;
      for (int x = lane(); x < kQueries; x += 32) large |= call.factors.template large<kFeatures>(queries.rows[x].lse);
      large = ballot(large) != 0;
      // s becomes P times the slope of the softcap, a becomes P as dropout leaves it.
      DIFFQKV_UNROLL
      for (int n = 0; n < kN; ++n) {
        Exponent exponents[2];
        DIFFQKV_UNROLL
        for (int odd = 0; odd < 2; ++odd)
          exponents[odd] = {call.factors.exponent, queries.rows[product_column(n, odd)].lse};
        if (large) take_differences(s, n, head, i, exponents);
        DIFFQKV_UNROLL
        for (int m = 0; m < kM; ++m) {
          DIFFQKV_UNROLL
          for (int half = 0; half < 2; ++half) {
            float left[2];
            DIFFQKV_UNROLL
            for (int odd = 0; odd < 2; ++odd) {
              float &x = s[m][n][2 * half + odd], slope;
              x = left[odd] = call.factors.template probability<kFeatures>(x, exponents[odd], slope);
              if (dropout) left[odd] = kept[m] >> (4 * n + 2 * half + odd) & 1 ? x * call.factors.keep_scale : 0.0f;
              x *= slope;
            }
            a[m][n / 2][n % 2 * 2 + half] = E::pack(left[0], left[1]);
          }
        }
      }
      if constexpr (kWantsV) multiply_columns<E, kM, kN / 2, kDv>(dv, a, queries.dout);
      if constexpr (kWantsK) {
        float dp[kM][kN][4];
        clear(dp);
        multiply_rows<E, kM, kN, kDv>(dp, shared.v + row * kStrideV, queries.dout);
        DIFFQKV_UNROLL
        for (int n = 0; n < kN; ++n) {
          DIFFQKV_UNROLL
          for (int e = 0; e < 4; ++e) {
            const float delta = queries.rows[product_column(n, e)].delta;
            DIFFQKV_UNROLL
            for (int m = 0; m < kM; ++m) {
              float& x = dp[m][n][e];
              if (dropout) x = kept[m] >> (4 * n + e) & 1 ? x * call.factors.keep_scale : 0.0f;
              x = s[m][n][e] * (x - delta);
            }
          }
        }
        to_operand<E>(a, dp);
        multiply_columns<E, kM, kN / 2, kDk>(dk, a, queries.q);
      }
    }

    // Takes the lse from the scores in those of tile n's two columns where it is large.
    DIFFQKV_DEVICE void take_differences(float (&s)[kM][kN][4], int n, int64_t head, int64_t i,
                                         Exponent (&exponents)[2]) const {
      DIFFQKV_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        if (!call.factors.template large<kFeatures>(exponents[odd].base)) continue;
        const float lse = lse_or_infinity<float>(p, lse_of(p, block.entry, head, i + product_column(n, odd)));
        DIFFQKV_UNROLL
        for (int m = 0; m < kM; ++m) {
          DIFFQKV_UNROLL
          for (int e = odd; e < 4; e += 2) s[m][n][e] = call.factors.difference(s[m][n][e], lse);
        }
        exponents[odd] = {kLog2e<float>, 0.0f};
      }
    }

    // Takes keys away from queries that do not see them.
    DIFFQKV_DEVICE void hide(float (&s)[kM][kN][4], int64_t i, int64_t j) const {
      DIFFQKV_UNROLL
      for (int n = 0; n < kN; ++n) {
        DIFFQKV_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          const KeyRange seen = keys_of_query(p, block.entry, i + product_column(n, odd));
          DIFFQKV_UNROLL
          for (int m = 0; m < kM; ++m) {
            DIFFQKV_UNROLL
            for (int e = odd; e < 4; e += 2) {
              const int64_t key = j + product_row(m, e);
              if (key < seen.lo || key >= seen.hi) s[m][n][e] = call.factors.hidden;
            }
          }
        }
      }
    }

    // Bit 4 * n + e of kept[m]: whether dropout keeps element e of tile (m, n). A lane draws for 8 keys of one query,
    // 16 queries at a time.
    DIFFQKV_DEVICE void draw(uint32_t (&kept)[kM], int64_t head, int64_t i) const {
      DIFFQKV_UNROLL
      for (int m = 0; m < kM; ++m) {
        kept[m] = 0;
        const int64_t first = (block.j0 + warp() * kWarpKeys + m * 16) / kKeysPerDraw;
        DIFFQKV_UNROLL
        for (int n = 0; n < kN; n += 2) {
          uint32_t words[4], bits = 0;
          dropout_words(p.dropout, block.entry.b * p.heads.n_q + head, i + n * 8 + lane() % 16, first + lane() / 16,
                        words);
          DIFFQKV_UNROLL
          for (int w = 0; w < 4; ++w)
            bits |= (keeps_low(p.dropout, words[w]) | keeps_high(p.dropout, words[w]) << 1) << (2 * w);
          DIFFQKV_UNROLL
          for (int x = 0; x < 8; ++x) {
            const uint32_t of_keys = shuffle(bits, x % 4 / 2 * 16 + product_column(x / 4, x));
            kept[m] |= (of_keys >> (lane() / 4) & 1) << (4 * n + x);
          }
        }
      }
    }

    // Stores the gradients of heads that the next q head does not belong to.
    template <int kK8, int kV8>
    DIFFQKV_DEVICE void store_heads(float (&dk)[kM][kK8][4], float (&dv)[kM][kV8][4], int64_t head) const {
      const HeadGroups& h = p.heads;
      const CudaFlashAttentionBackwardPlan& plan = call.plan;
      const bool last = head + 1 == block.h1;
      const int64_t k_head = h.k_head(head), v_head = h.v_head(head);
      if constexpr (kWantsK) {
        if (last || h.k_head(head + 1) != k_head) {
          store(dk, call.factors.scale, call.p.dk, k_head, h.n_k, p.d_k,
                plan.k_slots > 1 ? call.workspace + plan.partial_k : nullptr, k_head * h.q_per_k());
          clear(dk);
        }
      }
      if constexpr (kWantsV) {
        if (last || h.v_head(head + 1) != v_head) {
          store(dv, 1.0f, call.p.dv, v_head, h.n_v, p.d_v, plan.v_slots > 1 ? call.workspace + plan.partial_v : nullptr,
                v_head * h.q_per_v());
          clear(dv);
        }
      }
    }
    // first_q: the first q head that belongs to the head.
    template <int kD8>
    DIFFQKV_DEVICE void store(const float (&sum)[kM][kD8][4], float factor, const TokenView& view, int64_t head,
                              int64_t heads, int64_t d, char* partials, int64_t first_q) const {
      const int64_t keys = min_of(block.entry.s_k, p.s_k) - block.j0;
      if (partials == nullptr) {
        store_rows<E>(sum, factor, keys, d, [&](int row) {
          return static_cast<uint16_t*>(view.data) + key_row_of(view, block.entry, head, block.j0 + row);
        });
        return;
      }
      const int64_t slot = block.chunk - (first_q - block.group * p.heads.q_per_group()) / call.plan.chunk_heads;
      float* rows = reinterpret_cast<float*>(partials) + partial_row(p, block.entry.b, head, heads, slot, block.j0) * d;
      store_rows<F32>(sum, factor, keys, d, [&](int row) { return rows + row * d; });
    }
  };

  static DIFFQKV_DEVICE void run(const Params& params, char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if constexpr (kVariant.both()) {
      Walk<true, true>{params, shared}.run(block_x());
    } else if (block_x() % 2 == 0) {
      Walk<true, false>{params, shared}.run(block_x() / 2);
    } else {
      Walk<false, true>{params, shared}.run(block_x() / 2);
    }
  }
};

}  // namespace diffqkv::device
