// Attention of the few newest queries over a range of cached keys. An item holds all query rows of one KV group, so
// each byte of K and V is read once; ranges of keys are merged from left to right.
#include "cpu/group_split.h"
#include "cpu/kernels.h"

namespace diffqkv {
namespace {

template <bool kDot, class E>
void attention_split(const AttentionParams& p, const AttentionPlan& plan, int64_t item, void* workspace,
                     float* partials) {
  Scratch scratch(workspace);
  const GroupSplit<kDot> part(p, plan, item, scratch);
  const int64_t rows = part.rows, rows_v = p.heads.q_per_v() * p.s_q, stride_o = padded_dim(p.d_v);
  float *o = scratch.take<float>(rows * stride_o), *s = part.s;
  for (int64_t x = 0; x < rows * stride_o; ++x) o[x] = 0.0f;

  const float c = exp2_scale(p);
  for (int64_t t0 = part.range.lo / kKeyTile * kKeyTile; t0 < part.range.hi; t0 += kKeyTile) {
    const KeyRange tile = {max_of(part.range.lo, t0), min_of(part.range.hi, t0 + kKeyTile)};
    part.score(t0, tile);
    for (int64_t r = 0; r < rows; r += kPvRows) {
      const int64_t few = min_of(kPvRows, rows - r);
      float factor[16];
      softmax_rows<false>(
          few, s + r * kKeyTile, nullptr, [&](int64_t x) { return part.columns_of(r + x, t0, tile); },
          {tile.lo - t0, tile.hi - t0}, c, part.state + r, factor);
      for (int64_t x = 0; x < few; ++x)
        if (factor[x] != 1.0f) scale_row(o + (r + x) * stride_o, stride_o, factor[x]);
    }
    for (int64_t v = 0; v < p.heads.v_per_group(); ++v)
      for (int64_t t = tile.lo; t < tile.hi;) {
        const int64_t end = page_end(p.paging, t, tile.hi);
        const KvSlot slot = kv_page(p.paging, part.b, t);
        const auto* values = (const typename E::T*)p.v.data + kv_row(p.v, part.group, v, slot);
        for (int64_t r = v * rows_v; r < (v + 1) * rows_v; r += kPvRows)
          accumulate_rows<false, E>(min_of(kPvRows, (v + 1) * rows_v - r), (const word*)(s + r * kKeyTile + (t - t0)),
                                    values, p.v.stride_token, end - t, p.d_v, o + r * stride_o, stride_o);
        t = end;
      }
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (plan.splits == 1) {
      store_row(p, part.b, part.q_head(r), part.query(r), o + r * stride_o, part.state[r], c);
      continue;
    }
    float* partial = partials + (item * rows + r) * (p.d_v + 2);
    partial[0] = part.state[r].max;
    partial[1] = part.state[r].sum;
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
