// flash_attention without matrix products, for fp32 and fp64: a warp takes a query, a lane a key and then some
// dimensions of the result.
#pragma once
#include "cuda/dropout.cuh"
#include "cuda/flash_attention/block.cuh"
#include "cuda/warp.cuh"

namespace diffqkv::device {

template <class T>
struct PlainAttention {
  using Params = FlashAttentionParams<T>;
  static constexpr int kThreads = 32 * kPlainWarps, kMinBlocks = 2;
  static constexpr int kDims = kMaxHeadDim / 32;  // of a result, per lane
  static_assert(kPlainKeys == 32);

  struct Shared {
    T *q, *tile;  // [kPlainWarps, d_k], [kPlainKeys, stride], of K and then of V
    FlashAttentionBlock* block;
    int stride;  // odd: lanes read a column of the tile

    DIFFQKV_DEVICE Shared(char* shared, const AttentionParams& p)
        : q(reinterpret_cast<T*>(shared + sizeof(FlashAttentionBlock))),
          tile(q + kPlainWarps * p.d_k),
          block(reinterpret_cast<FlashAttentionBlock*>(shared)),
          stride(static_cast<int>(max_of(p.d_k, p.d_v) | 1)) {}
  };

  // Loads the rows of the keys [first_key, first_key + kPlainKeys), zeros for keys that the block does not see.
  template <bool kValues>
  static DIFFQKV_DEVICE void load(const AttentionParams& p, const Shared& s, int first_key) {
    const FlashAttentionBlock& b = *s.block;
    const T* data = static_cast<const T*>(kValues ? p.v.data : p.k.data);
    const int d = static_cast<int>(kValues ? p.d_v : p.d_k);
    sync_block();  // what was there has been read
    for (int i = warp(); i < kPlainKeys; i += kPlainWarps) {
      const int key = first_key + i;
      const KeyRows rows = key_rows(p, b, key);
      for (int x = lane(); x < d; x += 32)
        s.tile[i * s.stride + x] = key >= b.lo && key < b.hi ? data[(kValues ? rows.v : rows.k) + x] : T(0);
    }
    sync_block();
  }

  static DIFFQKV_DEVICE T dot(const T* a, const T* b, int d) {
    T sum = 0;
    for (int x = 0; x < d; ++x) sum += a[x] * b[x];
    return sum;
  }

  static DIFFQKV_DEVICE void run(const Params& params, char* shared) {
    const AttentionParams& p = params.p;
    const SoftmaxFactors<T>& factors = params.factors;
    const Shared s(shared, p);
    if (thread() == 0) *s.block = flash_attention_block(params);
    sync_block();
    const FlashAttentionBlock& b = *s.block;
    if (b.queries <= 0) return;
    // Warps beyond the last query repeat it, and write nothing.
    const Entry entry = entry_of(p, b.batch);
    const int64_t query = b.first_query + min_of(warp(), b.queries - 1);
    const KeyRange keys = keys_of_query(p, entry, query);
    T* q = s.q + warp() * p.d_k;
    const T* source = static_cast<const T*>(p.q.data) + row_of(p.q, entry, b.head, query);
    for (int x = lane(); x < p.d_k; x += 32) q[x] = factors.negative ? -source[x] : source[x];

    T o[kDims] = {}, most = T(-INFINITY), sum = 0;  // sum: of this lane's keys
    const int first_tile = static_cast<int>(KeyRange{b.lo, b.hi}.first_tile(kPlainKeys));
    for (int first_key = first_tile; first_key < b.hi; first_key += kPlainKeys) {
      const int key = first_key + lane();
      load<false>(p, s, first_key);
      T score = dot(q, s.tile + lane() * s.stride, static_cast<int>(p.d_k));
      if (factors.capped) score = tanh(score * factors.inner);
      if (key < keys.lo || key >= keys.hi) score = T(-INFINITY);
      const T top = warp_max(score > most ? score : most);
      T base;
      if (factors.base_of(top, base)) score -= top, most -= top;
      const T scale = exp2(most * factors.exponent - base);
      T probability = exp2(score * factors.exponent - base);
      most = top;
      sum = sum * scale + probability;
      if (p.dropout.threshold > 0) {
        uint32_t words[4];
        dropout_words(p.dropout, b.batch * p.heads.n_q + b.head, query, key / kKeysPerDraw, words);
        if (!keeps(p.dropout, words, key % kKeysPerDraw)) probability = 0;
      }
      load<true>(p, s, first_key);
      DIFFQKV_UNROLL
      for (int i = 0; i < kDims; ++i) o[i] *= scale;
      for (int j = 0; j < kPlainKeys; ++j) {
        const T weight = shuffle(probability, j);
        DIFFQKV_UNROLL
        for (int i = 0; i < kDims; ++i)
          if (lane() + 32 * i < p.d_v) o[i] += weight * s.tile[j * s.stride + lane() + 32 * i];
      }
    }
    T lse;
    const T scale = factors.finish(p, b.head, most, warp_sum(sum), lse);
    if (warp() >= b.queries) return;
    if (lane() == 0) static_cast<T*>(p.lse)[lse_of(p, entry, b.head, query)] = lse;
    T* out = static_cast<T*>(p.out.data) + row_of(p.out, entry, b.head, query);
    DIFFQKV_UNROLL
    for (int i = 0; i < kDims; ++i)
      if (lane() + 32 * i < p.d_v) out[lane() + 32 * i] = o[i] * scale;
  }
};

}  // namespace diffqkv::device
