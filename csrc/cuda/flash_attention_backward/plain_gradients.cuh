// The gradients in fp32 and fp64, straight from their definition: a warp to a query for dQ, to a key for dK and dV.
#pragma once
#include "cuda/dropout.cuh"
#include "cuda/flash_attention_backward/call.cuh"
#include "cuda/warp.cuh"

namespace diffqkv::device {

// One warp; lane l holds dimensions l, l + 32, ... of rows.
template <class E>
struct PlainWarp {
  using T = typename E::T;
  static constexpr int kPerLane = kMaxHeadDim / 32;
  struct Row {
    T x[kPerLane];
  };

  const FlashAttentionBackwardCall& call;
  const AttentionParams& p = call.p.forward;

  static DIFFQKV_DEVICE Row load(const T* from, int64_t d) {
    Row row;
    DIFFQKV_UNROLL
    for (int i = 0; i < kPerLane; ++i) row.x[i] = lane() + 32 * i < d ? from[lane() + 32 * i] : T(0);
    return row;
  }
  static DIFFQKV_DEVICE void store(T* to, int64_t d, const Row& row) {
    DIFFQKV_UNROLL
    for (int i = 0; i < kPerLane; ++i)
      if (lane() + 32 * i < d) to[lane() + 32 * i] = row.x[i];
  }
  static DIFFQKV_DEVICE T dot(const Row& a, const Row& b) {
    T sum = 0;
    DIFFQKV_UNROLL
    for (int i = 0; i < kPerLane; ++i) sum += a.x[i] * b.x[i];
    return warp_sum(sum);
  }
  static DIFFQKV_DEVICE void add(Row& sum, T factor, const Row& row) {
    DIFFQKV_UNROLL
    for (int i = 0; i < kPerLane; ++i) sum.x[i] += factor * row.x[i];
  }

  DIFFQKV_DEVICE Row query(const TokenView& view, const Entry& entry, int64_t head, int64_t i, int64_t d) const {
    return load(static_cast<const T*>(view.data) + row_of(view, entry, head, i), d);
  }
  DIFFQKV_DEVICE Row key(const KvView& view, const Entry& entry, int64_t head, int64_t per_group, int64_t j,
                         int64_t d) const {
    return load(key_at<T>(p, view, entry, head, per_group, j), d);
  }
  DIFFQKV_DEVICE RowFacts<T> facts(const Entry& entry, int64_t head, int64_t i) const {
    return call.rows<T>()[lse_of(p, entry, head, i)];
  }

  // slope: what a change of the dot product does to the score.
  DIFFQKV_DEVICE T probability(T x, T lse, T& slope) const {
    slope = T(p.softmax_scale);
    T score = mul(x, slope);
    if (p.softcap > 0) {
      const T t = tanh(x * T(p.softmax_scale / p.softcap));
      score = mul(t, T(p.softcap)), slope *= 1 - t * t;
    }
    return exp2((score - lse) * kLog2e<T>);
  }
  // The factor of a key's probability: 0 for what dropout takes, else what makes up for it.
  DIFFQKV_DEVICE T kept(const Entry& entry, int64_t head, int64_t i, int64_t j) const {
    if (p.dropout.threshold == 0) return 1;
    uint32_t words[4];
    dropout_words(p.dropout, entry.b * p.heads.n_q + head, i, j / kKeysPerDraw, words);
    return keeps(p.dropout, words, static_cast<int>(j % kKeysPerDraw)) ? T(p.dropout.keep_scale()) : T(0);
  }
};

// Which of `tokens` queries of a q head, or keys of a K or V head, a warp works on: [batch, tokens, heads].
struct PlainRow {
  int64_t b, token, head;
  DIFFQKV_DEVICE PlainRow(int64_t tokens, int64_t heads) {
    const int64_t row = block_x() * (kPlainFlashAttentionBackwardThreads / 32) + warp();
    b = row / heads / tokens, token = row / heads % tokens, head = row % heads;
  }
};

template <class E>
struct PlainQueryGradients {
  using Params = FlashAttentionBackwardCall;
  using T = typename E::T;
  static constexpr int kThreads = kPlainFlashAttentionBackwardThreads, kMinBlocks = 2;

  static DIFFQKV_DEVICE void run(const Params& call, char*) {
    const PlainWarp<E> w{call};
    const AttentionParams& p = call.p.forward;
    const HeadGroups& h = p.heads;
    const auto [b, i, head] = PlainRow(p.s_q, h.n_q);
    if (b >= p.batch) return;
    const Entry entry = entry_of(p, b);
    if (i >= entry.s_q) return;
    const auto q = w.query(p.q, entry, head, i, p.d_k), dout = w.query(call.p.dout, entry, head, i, p.d_v);
    const RowFacts<T> row = w.facts(entry, head, i);
    const KeyRange seen = keys_of_query(p, entry, i);
    typename PlainWarp<E>::Row dq{};
    for (int64_t j = seen.lo; j < seen.hi; ++j) {
      const auto k = w.key(p.k, entry, h.k_head(head), h.k_per_group(), j, p.d_k);
      const auto v = w.key(p.v, entry, h.v_head(head), h.v_per_group(), j, p.d_v);
      T slope;
      const T probability = w.probability(w.dot(q, k), row.lse, slope);
      w.add(dq, probability * (w.dot(dout, v) * w.kept(entry, head, i, j) - row.delta) * slope, k);
    }
    w.store(static_cast<T*>(call.p.dq.data) + row_of(call.p.dq, entry, head, i), p.d_k, dq);
  }
};

// dV, or without kOfV dK, of a key and its head: the sum over the q heads, and over the queries that see the key.
template <class E, bool kOfV>
struct PlainKeyGradients {
  using Params = FlashAttentionBackwardCall;
  using T = typename E::T;
  static constexpr int kThreads = kPlainFlashAttentionBackwardThreads, kMinBlocks = 2;

  static DIFFQKV_DEVICE void run(const Params& call, char*) {
    const PlainWarp<E> w{call};
    const AttentionParams& p = call.p.forward;
    const HeadGroups& h = p.heads;
    const int64_t heads = kOfV ? h.n_v : h.n_k, q_per_head = kOfV ? h.q_per_v() : h.q_per_k();
    const auto [b, j, head] = PlainRow(p.s_k, heads);
    if (b >= p.batch) return;
    const Entry entry = entry_of(p, b);
    if (j >= entry.s_k) return;
    const KeyRange queries = queries_of_keys(p, entry, {j, j + 1});
    typename PlainWarp<E>::Row sum{};
    for (int64_t q_head = head * q_per_head; queries.lo < queries.hi && q_head < (head + 1) * q_per_head; ++q_head) {
      const auto k = w.key(p.k, entry, h.k_head(q_head), h.k_per_group(), j, p.d_k);
      const auto v = w.key(p.v, entry, h.v_head(q_head), h.v_per_group(), j, p.d_v);
      for (int64_t i = queries.lo; i < queries.hi; ++i) {
        const auto q = w.query(p.q, entry, q_head, i, p.d_k), dout = w.query(call.p.dout, entry, q_head, i, p.d_v);
        const RowFacts<T> row = w.facts(entry, q_head, i);
        T slope;
        const T probability = w.probability(w.dot(q, k), row.lse, slope), kept = w.kept(entry, q_head, i, j);
        if (kOfV)
          w.add(sum, probability * kept, dout);
        else
          w.add(sum, probability * (w.dot(dout, v) * kept - row.delta) * slope, q);
      }
    }
    const TokenView& view = kOfV ? call.p.dv : call.p.dk;
    w.store(static_cast<T*>(view.data) + key_row_of(view, entry, head, j), kOfV ? p.d_v : p.d_k, sum);
  }
};

}  // namespace diffqkv::device
