// The small kernels around the gradients: the facts of rows before, sums of slots and the gradients of sinks after.
#pragma once
#include "cuda/flash_attention_backward/call.cuh"
#include "cuda/warp.cuh"

namespace diffqkv::device {

// The batch entry, head and token of a row in the order of lse.
struct LseRow {
  int64_t b, head, token;
  DIFFQKV_DEVICE LseRow(const AttentionParams& p, int64_t row) {
    const int64_t queries = p.cu_seqlens_q ? p.packed_queries : p.s_q;
    token = row % queries, head = row / queries % p.heads.n_q, b = row / queries / p.heads.n_q;
  }
  template <class T>
  DIFFQKV_DEVICE const T* at(const TokenView& view) const {
    return static_cast<const T*>(view.data) + b * view.stride_batch + head * view.stride_head +
           token * view.stride_token;
  }
};

// Computes lse and rowsum(dO * O) - dlse of every row. The workspace holds fp32, for fp64 inputs fp64.
template <class E>
struct RowSums {
  using Params = FlashAttentionBackwardCall;
  using T = typename E::T;
  using Sum = decltype(E::get(T()));
  static constexpr int kThreads = kRowSumThreads, kMinBlocks = 4, kWidth = 16 / sizeof(T);
  struct alignas(16) Vector {
    T x[kWidth];
  };

  static DIFFQKV_DEVICE Vector load(const T* from, bool aligned) {
    if (aligned) return *reinterpret_cast<const Vector*>(from);
    Vector v;
    DIFFQKV_UNROLL
    for (int i = 0; i < kWidth; ++i) v.x[i] = from[i];
    return v;
  }

  static DIFFQKV_DEVICE void run(const Params& call, char*) {
    const AttentionParams& p = call.p.forward;
    const int lanes = row_sum_lanes(p.d_v, sizeof(T));
    const int64_t index = block_x() * (kThreads / lanes) + thread() / lanes, rows = p.total_queries() * p.heads.n_q;
    const LseRow row(p, min_of(index, rows - 1));
    const T *out = row.at<T>(p.out), *dout = row.at<T>(call.p.dout);
    Sum sum = 0;
    for (int64_t d = thread() % lanes * kWidth; d < p.d_v; d += lanes * kWidth) {
      const Vector a = load(out + d, call.plan.aligned), b = load(dout + d, call.plan.aligned);
      DIFFQKV_UNROLL
      for (int i = 0; i < kWidth; ++i) sum += E::get(a.x[i]) * E::get(b.x[i]);
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (thread() % lanes != 0 || index >= rows) return;
    const Sum lse = lse_or_infinity<Sum>(p, index);
    if (call.p.dlse != nullptr) sum -= static_cast<const Sum*>(call.p.dlse)[index];
    call.rows<Sum>()[index] = {sizeof(T) > 2 || call.factors.capped ? lse : lse * kLog2e<Sum>, sum};
  }
};

// A block sums up what a sink gets from all queries of its head.
template <class E>
struct SinkGradients {
  using Params = FlashAttentionBackwardCall;
  using Sum = decltype(E::get(typename E::T()));
  static constexpr int kThreads = 1024, kMinBlocks = 1;
  static constexpr int64_t kSharedBytes = kThreads / 32 * sizeof(double);

  static DIFFQKV_DEVICE void run(const Params& call, char* shared) {
    const AttentionParams& p = call.p.forward;
    const int64_t head = block_x(), queries = p.cu_seqlens_q ? p.packed_queries : p.s_q;
    const Sum sink = static_cast<const Sum*>(p.sinks)[head];
    double sum = 0.0;
    if (sink > -kInfinity) {
      for (int64_t i = thread(); i < p.total_queries(); i += kThreads) {
        const int64_t row = (i / queries * p.heads.n_q + head) * queries + i % queries;
        sum -= exp2((sink - static_cast<const Sum*>(p.lse)[row]) * kLog2e<Sum>) * call.rows<Sum>()[row].delta;
      }
    }
    double* sums = reinterpret_cast<double*>(shared);
    sum = warp_sum(sum);
    if (lane() == 0) sums[warp()] = sum;
    sync_block();
    if (thread() != 0) return;
    for (int w = 1; w < kThreads / 32; ++w) sum += sums[w];
    static_cast<Sum*>(call.p.dsinks)[head] = static_cast<Sum>(sum);
  }
};

// Adds up a gradient of K or V from the slots of its chunks.
template <class E, bool kOfV>
struct SlotSums {
  using Params = FlashAttentionBackwardCall;
  static constexpr int kThreads = kSlotSumThreads, kMinBlocks = 4;

  static DIFFQKV_DEVICE void run(const Params& call, char*) {
    const AttentionParams& p = call.p.forward;
    const HeadGroups& h = p.heads;
    const int64_t heads = kOfV ? h.n_v : h.n_k, q_per_head = kOfV ? h.q_per_v() : h.q_per_k();
    const int64_t d = kOfV ? p.d_v : p.d_k, i = (block_x() * kThreads + thread()) * kSlotSumWidth;
    const int64_t x = i % d, key = i / d % p.s_k, head = i / d / p.s_k % heads, b = i / d / p.s_k / heads;
    if (b >= p.batch) return;
    const Entry entry = entry_of(p, b);
    if (key >= entry.s_k) return;
    const int64_t first_q = head * q_per_head % h.q_per_group();
    const int64_t slots = (first_q + q_per_head - 1) / call.plan.chunk_heads - first_q / call.plan.chunk_heads + 1;
    const auto* partials =
        reinterpret_cast<const float*>(call.workspace + (kOfV ? call.plan.partial_v : call.plan.partial_k));
    Float4 sum{};
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t row = partial_row(p, b, head, heads, slot, key);
      const Float4 more = *reinterpret_cast<const Float4*>(partials + row * d + x);
      DIFFQKV_UNROLL
      for (int e = 0; e < 4; ++e) sum.x[e] += more.x[e];
    }
    const TokenView& view = kOfV ? call.p.dv : call.p.dk;
    auto* to = static_cast<typename E::T*>(view.data) + key_row_of(view, entry, head, key) + x;
    DIFFQKV_UNROLL
    for (int e = 0; e < 4; ++e) to[e] = E::put(sum.x[e]);
  }
};

}  // namespace diffqkv::device
