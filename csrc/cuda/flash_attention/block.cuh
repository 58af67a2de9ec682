// What a block of flash_attention works on: some neighbouring queries of a q head.
#pragma once
#include "cuda/softmax.cuh"
#include "params/key_range.h"
#include "params/layout.h"
#include "plan/cuda/flash_attention.h"

namespace diffqkv::device {

// T: the type of the softmax, of lse and of sinks.
template <class T>
struct FlashAttentionParams {
  AttentionParams p;
  CudaFlashAttentionPlan plan;
  SoftmaxFactors<T> factors{p};
  // Numbers of the head map, whose greatest common divisor is no work for every block.
  int32_t q_per_k = static_cast<int32_t>(p.heads.q_per_k()), q_per_v = static_cast<int32_t>(p.heads.q_per_v());
  int32_t k_per_group = static_cast<int32_t>(p.heads.k_per_group());
  int32_t v_per_group = static_cast<int32_t>(p.heads.v_per_group());
};

// Where rows begin in K and in V, in elements.
struct KeyRows {
  int64_t k, v;
};
static_assert(sizeof(KeyRows) == kFlashAttentionRowBytes);

// It lies in shared memory, since registers are short.
struct alignas(16) FlashAttentionBlock {
  int lo, hi;          // keys that any of its queries sees
  int all_lo, all_hi;  // that all of them see
  int batch, head, first_query, queries;
  KeyRows heads;  // in page 0
};
static_assert(sizeof(FlashAttentionBlock) == kFlashAttentionBlockBytes);

template <class T>
DIFFQKV_DEVICE FlashAttentionBlock flash_attention_block(const FlashAttentionParams<T>& params) {
  const AttentionParams& p = params.p;
  FlashAttentionBlock b;
  // Neighbours are the q heads, which share K and V heads. The blocks of late queries see most keys: they come first,
  // so that the last ones to end are short.
  const int x = static_cast<int>(block_x()), n_q = static_cast<int>(p.heads.n_q);
  const int query_blocks = static_cast<int>(params.plan.query_blocks), block_m = params.plan.block_m;
  b.head = x % n_q;
  b.batch = x / n_q / query_blocks;
  b.first_query = (query_blocks - 1 - x / n_q % query_blocks) * block_m;
  const Entry entry = entry_of(p, b.batch);
  b.queries = static_cast<int>(min_of(block_m, entry.s_q - b.first_query));
  const KeyRange first = keys_of_query(p, entry, b.first_query);
  const KeyRange last = keys_of_query(p, entry, b.first_query + b.queries - 1);
  b.lo = static_cast<int>(first.lo), b.hi = static_cast<int>(last.hi);
  b.all_lo = static_cast<int>(last.lo), b.all_hi = static_cast<int>(first.hi);
  const auto begin_of = [](const KvView& view, int head, int per_group) {
    return head / per_group * view.stride_group + head % per_group * view.stride_head;
  };
  b.heads = {begin_of(p.k, b.head / params.q_per_k, params.k_per_group),
             begin_of(p.v, b.head / params.q_per_v, params.v_per_group)};
  return b;
}

// The rows of a key. Beside the keys that the block sees, any row will do.
DIFFQKV_DEVICE KeyRows key_rows(const AttentionParams& p, const FlashAttentionBlock& b, int key) {
  const KvSlot slot = kv_page(p.paging, b.batch, max_of(b.lo, min_of(b.hi - 1, key)));
  const auto row = [&](const KvView& view, int64_t head) {
    return head + max_of(slot.page, 0) * view.stride_page + slot.token * view.stride_token;
  };
  return {row(p.k, b.heads.k), row(p.v, b.heads.v)};
}

}  // namespace diffqkv::device
