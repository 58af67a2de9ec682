// decode_attention: the few newest queries over a range of cached keys. An item holds all query rows of one KV group,
// so each byte of K and V is read once; ranges of keys are merged from left to right.
#include "cpu/kernels/group_split.h"
#include "cpu/kernels/kernels.h"

namespace diffqkv {
namespace {

// out[rows] += probabilities of the columns [t - t0, end - t0) times the V rows of the keys [t, end), which lie in a
// page.
template <class E>
struct Values {
  static constexpr bool kDot = false;
  using T = typename E::T;
  static void accumulate(int64_t rows, const float* s, const uint16_t*, int64_t column, const T* v, int64_t stride_v,
                         int64_t n, int64_t d, float* o, int64_t stride_o) {
    accumulate_rows<false, Rows<false, kSplitTokens, true>, E>(rows, (const word*)(s + column), v, stride_v, n, d, o,
                                                               stride_o);
  }
  static void finish(float*, int64_t) {}
};

#if defined(__AVX512BF16__)
// The same by bf16 dot products over pairs of keys, for d_v that are multiples of kPairColumns. A key whose partner in
// its pair of columns lies elsewhere is paired with zeros.
struct PairedValues {
  static constexpr bool kDot = true;
  using T = uint16_t;
  static void accumulate(int64_t rows, const float*, const uint16_t* p, int64_t column, const T* v, int64_t stride_v,
                         int64_t n, int64_t d, float* o, int64_t stride_o) {
    const T* zeros = (const T*)kZeroRow;
    const word* pairs = (const word*)(p + column / 2 * 2);
    if (column % 2 == 1) {
      accumulate_pairs<kSplitTokens>(rows, pairs++, zeros, v, 0, 1, d, o, stride_o);
      v += stride_v;
      --n;
    }
    accumulate_pairs<kSplitTokens>(rows, pairs, v, v + stride_v, 2 * stride_v, n / 2, d, o, stride_o);
    if (n % 2 == 1)
      accumulate_pairs<kSplitTokens>(rows, pairs + n / 2, v + (n - 1) * stride_v, zeros, 0, 1, d, o, stride_o);
  }
  static void finish(float* o, int64_t d) { unshuffle(o, d); }
};
#endif

template <bool kDot, class V>
void attention_split(const AttentionParams& p, const AttentionPlan& plan, int64_t item, void* memory, float* partials) {
  Scratch scratch(memory);
  const int64_t split = item % plan.splits, batch_group = item / plan.splits;
  const GroupSplit<kDot> part(p, batch_group / plan.groups, batch_group % plan.groups,
                              {split * kSplitTokens, (split + 1) * kSplitTokens}, scratch);
  const int64_t rows = part.rows, rows_v = p.heads.q_per_v() * part.entry.s_q, stride_o = padded_dim(p.d_v);
  float *o = scratch.take<float>(rows * stride_o), *s = part.s;
  uint16_t* s16 = V::kDot ? scratch.take<uint16_t>(rows * kSplitTokens) : nullptr;
  for (int64_t x = 0; x < rows * stride_o; ++x) o[x] = 0.0f;

  const float c = exp2_scale(p);
  const int64_t t0 = split * kSplitTokens;
  const KeyRange keys = part.range;
  if (keys.lo < keys.hi) part.score(t0, keys);
  // With pairs also the partners of the first and the last key get a probability, 0.
  KeyRange columns = {keys.lo - t0, keys.hi - t0};
  if (V::kDot) columns = {columns.lo / 2 * 2, round_up(columns.hi, 2)};
  for (int64_t r = 0; r < rows && keys.lo < keys.hi; r += kPvRows) {
    float unused[16];  // nothing has been accumulated that a larger maximum could scale
    softmax_rows<V::kDot, kSplitTokens>(
        min_of(kPvRows, rows - r), s + r * kSplitTokens, V::kDot ? s16 + r * kSplitTokens : nullptr,
        [&](int64_t x) { return part.columns_of(r + x, t0, keys); }, columns, c, part.state + r, unused);
  }
  for (int64_t v = 0; v < p.heads.v_per_group(); ++v)
    for (int64_t t = keys.lo; t < keys.hi;) {
      const int64_t end = page_end(p.paging, t, keys.hi);
      const auto* values =
          (const typename V::T*)p.v.data + kv_row(p.v, part.group, v, kv_page(p.paging, part.entry.b, t));
      for (int64_t r = v * rows_v; r < (v + 1) * rows_v; r += kPvRows)
        V::accumulate(min_of(kPvRows, (v + 1) * rows_v - r), s + r * kSplitTokens,
                      V::kDot ? s16 + r * kSplitTokens : nullptr, t - t0, values, p.v.stride_token, end - t, p.d_v,
                      o + r * stride_o, stride_o);
      t = end;
    }
  for (int64_t r = 0; r < rows; ++r) {
    V::finish(o + r * stride_o, p.d_v);
    if (partials == nullptr) {
      store_result(p, part.entry, part.q_head(r), part.query(r), o + r * stride_o, part.state[r]);
      continue;
    }
    float* partial = partials + (item * rows + r) * (p.d_v + kPartialHeader);
    partial[0] = part.state[r].max;
    partial[1] = part.state[r].sum;
    partial[2] = part.state[r].norm;
    for (int64_t x = 0; x < p.d_v; ++x) partial[kPartialHeader + x] = o[r * stride_o + x];
  }
}

}  // namespace

namespace DIFFQKV_ISA {

void attention_split(const AttentionParams& p, const AttentionPlan& plan, int64_t item, void* scratch,
                     float* partials) {
  switch (p.v.dtype) {
    case DType::f32: return diffqkv::attention_split<false, Values<F32>>(p, plan, item, scratch, partials);
    case DType::f16: return diffqkv::attention_split<false, Values<F16>>(p, plan, item, scratch, partials);
    case DType::f64: return;  // attention_f64 does it
    case DType::bf16:
#if defined(__AVX512BF16__)
      if (p.d_v % kPairColumns == 0)
        return diffqkv::attention_split<true, PairedValues>(p, plan, item, scratch, partials);
      return diffqkv::attention_split<true, Values<BF16>>(p, plan, item, scratch, partials);
#else
      return diffqkv::attention_split<false, Values<BF16>>(p, plan, item, scratch, partials);
#endif
  }
}

void attention_merge(const AttentionParams& p, const AttentionPlan& plan, int64_t batch_group, int64_t row,
                     const float* partials) {
  const Entry entry = entry_of(p, batch_group / plan.groups);
  const float c = exp2_scale(p);
  RowState state = kEmptyRow;
  float o[kMaxHeadDim];
  for (int64_t x = 0; x < p.d_v; ++x) o[x] = 0.0f;
  for (int64_t split = 0; split < plan.splits; ++split) {
    const float* partial =
        partials + ((batch_group * plan.splits + split) * plan.rows + row) * (p.d_v + kPartialHeader);
    if (partial[1] == 0.0f) continue;  // no key of this range, or -inf scores only
    const auto [old, now] = merge(state, {partial[0], partial[1], partial[2]}, c);
    for (int64_t x = 0; x < p.d_v; ++x) o[x] = o[x] * old + partial[kPartialHeader + x] * now;
  }
  const int64_t h0 = batch_group % plan.groups * p.heads.q_per_group();
  store_result(p, entry, h0 + row / entry.s_q, row % entry.s_q, o, state);
}

}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
