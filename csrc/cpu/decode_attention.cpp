// Attention of the few newest queries over a range of cached keys. An item holds all query rows of one KV group, so each
// byte of K and V is read once; ranges of keys are merged from left to right.
#include "cpu/attention_tile.h"
#include "cpu/kernels.h"

namespace diffqkv {
namespace {

template <bool kDot, class E>
void attention_split(const AttentionParams& p, const AttentionPlan& plan, int64_t item, void* workspace,
                     float* partials) {
  const int64_t split = item % plan.splits, group = item / plan.splits % plan.groups, b = item / plan.splits / plan.groups;
  const int64_t W = kDot ? p.d_k / 2 : p.d_k, stride_o = padded_dim(p.d_v), rows = plan.rows, s_q = p.s_q;
  Scratch scratch(workspace);
  word* q = scratch.take<word>(rows * W);
  float* o = scratch.take<float>(rows * stride_o);
  RowState* state = scratch.take<RowState>(rows);
  word* panel = scratch.take<word>(kPanelTokens * W);
  float* row_copies = scratch.take<float>(kPanelTokens * p.d_k);
  float* s = scratch.take<float>(rows * kKeyTile);

  const KeyRange entry = keys_of_entry(p, b);
  const KeyRange newest = keys_of_query(p, b, entry, s_q - 1);
  const KeyRange range = {max_of(newest.lo, split * kSplitTokens), min_of(newest.hi, (split + 1) * kSplitTokens)};

  const int64_t rows_k = p.heads.q_per_k() * s_q, rows_v = p.heads.q_per_v() * s_q;
  const int64_t h0 = group * p.heads.q_per_group();
  for (int64_t r = 0; r < rows; ++r) {
    state[r] = kEmptyRow;
    const int64_t at = b * p.q.stride_batch + (h0 + r / s_q) * p.q.stride_head + r % s_q * p.q.stride_token;
    const void* src = p.q.dtype == DType::f32 ? (const void*)((const float*)p.q.data + at)
                                              : (const uint16_t*)p.q.data + at;
    pack_query<kDot>(src, p.q.dtype, p.d_k, p.softmax_scale < 0, q + r / rows_k * rows_k * W, r % rows_k, rows_k);
  }
  for (int64_t x = 0; x < rows * stride_o; ++x) o[x] = 0.0f;

  const float c = exp2_scale(p);
  for (int64_t t0 = range.lo / kKeyTile * kKeyTile; t0 < range.hi; t0 += kKeyTile) {
    const KeyRange tile = {max_of(range.lo, t0), min_of(range.hi, t0 + kKeyTile)};
    for (int64_t k = 0; k < p.heads.k_per_group(); ++k)
      for (int64_t t = tile.lo / kPanelTokens * kPanelTokens; t < tile.hi; t += kPanelTokens) {
        const word* keys = key_panel<kDot>(p, b, group * p.heads.k_per_group() + k, t, tile, panel, row_copies);
        score_rows<kDot>(q + k * rows_k * W, 0, rows_k, keys, W, s + k * rows_k * kKeyTile + (t - t0));
      }
    for (int64_t r = 0; r < rows; ++r) {
      const KeyRange keys = keys_of_query(p, b, entry, r % s_q);
      const int64_t lo = max_of(tile.lo, keys.lo) - t0, hi = min_of(tile.hi, keys.hi) - t0;
      float* row = s + r * kKeyTile;
      if (lo >= hi) {
        for (int64_t j = tile.lo - t0; j < tile.hi - t0; ++j) row[j] = 0.0f;
        continue;
      }
      const float factor = softmax_row<false>(row, nullptr, lo, hi, tile.lo - t0, tile.hi - t0, c, state[r]);
      if (factor != 1.0f) scale_row(o + r * stride_o, stride_o, factor);
    }
    for (int64_t v = 0; v < p.heads.v_per_group(); ++v)
      for (int64_t t = tile.lo; t < tile.hi;) {
        const int64_t end = page_end(p.paging, t, tile.hi);
        const KvSlot slot = kv_page(p.paging, b, t);
        const typename E::T* values =
            head_at<const typename E::T>(p.v, slot.page, group * p.heads.v_per_group() + v, p.heads.v_per_group()) +
            slot.token * p.v.stride_token;
        for (int64_t r = v * rows_v; r < (v + 1) * rows_v; r += kPvRows)
          accumulate_rows<false, E>(min_of(kPvRows, (v + 1) * rows_v - r), (const word*)(s + r * kKeyTile + (t - t0)),
                                    values, p.v.stride_token, end - t, p.d_v, o + r * stride_o, stride_o);
        t = end;
      }
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (plan.splits == 1) {
      store_row(p, b, h0 + r / s_q, r % s_q, o + r * stride_o, state[r], c);
      continue;
    }
    float* partial = partials + (item * rows + r) * (p.d_v + 2);
    partial[0] = state[r].max;
    partial[1] = state[r].sum;
    for (int64_t x = 0; x < p.d_v; ++x) partial[2 + x] = o[r * stride_o + x];
  }
}

template <bool kDot>
void attention_split_of(const AttentionParams& p, const AttentionPlan& plan, int64_t item, void* scratch,
                        float* partials) {
  if (p.v.dtype == DType::f32) return attention_split<false, F32>(p, plan, item, scratch, partials);
  if (p.v.dtype == DType::f16) return attention_split<false, F16>(p, plan, item, scratch, partials);
  attention_split<kDot, BF16>(p, plan, item, scratch, partials);
}

}  // namespace

namespace DIFFQKV_ISA {

void attention_split(const AttentionParams& p, const AttentionPlan& plan, int64_t item, void* scratch,
                     float* partials) {
#if defined(__AVX512BF16__)
  attention_split_of<true>(p, plan, item, scratch, partials);
#else
  attention_split_of<false>(p, plan, item, scratch, partials);
#endif
}

void attention_merge(const AttentionParams& p, const AttentionPlan& plan, int64_t batch_group, const float* partials) {
  const float c = exp2_scale(p);
  const int64_t b = batch_group / plan.groups, h0 = batch_group % plan.groups * p.heads.q_per_group();
  float o[kMaxHeadDim];
  for (int64_t r = 0; r < plan.rows; ++r) {
    RowState state = kEmptyRow;
    for (int64_t x = 0; x < p.d_v; ++x) o[x] = 0.0f;
    for (int64_t split = 0; split < plan.splits; ++split) {
      const float* partial = partials + ((batch_group * plan.splits + split) * plan.rows + r) * (p.d_v + 2);
      if (partial[1] == 0.0f) continue;  // no key of this range, or -inf scores only
      const float maximum = partial[0] > state.max ? partial[0] : state.max;
      const float old = state.max > -kInf ? exp2_of((state.max - maximum) * c) : 1.0f;
      const float now = partial[0] > -kInf ? exp2_of((partial[0] - maximum) * c) : 1.0f;
      state.max = maximum;
      state.norm = state.sum = state.sum * old + partial[1] * now;
      for (int64_t x = 0; x < p.d_v; ++x) o[x] = o[x] * old + partial[2 + x] * now;
    }
    store_row(p, b, h0 + r / p.s_q, r % p.s_q, o, state, c);
  }
}

}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
