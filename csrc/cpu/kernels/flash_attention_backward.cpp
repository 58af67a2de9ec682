// The gradients of flash_attention. An item is a block of keys of a KV group: it recomputes the probabilities of the
// queries that see them from the lse, keeps dK and dV of its keys in fp32 until all q heads of the group have added to
// them, and adds its share to dQ when the blocks of earlier keys have added theirs, so that no sum depends on who is
// first.
//
//   P = exp(S - lse)   dV = P^T dO   dP = dO V^T   dS = P (dP - delta) scale   dQ = dS K   dK = dS^T Q
#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/kernels.h"

namespace diffqkv {
namespace {

constexpr int64_t kStride = kFlashAttentionBackwardStride;
using Columns = Walk<1, kStride>;  // a column of P or dS, step by step down the rows

// ---- rows of a block of queries ------------------------------------------------------------------------------------

struct RowFacts {
  KeyRange own;  // columns that the row sees
  float lse, delta;
};

// Rows of q or dout of one head: as words for scores, [rows, stride], and as what sums over rows multiply with: the
// same fp32 rows, or with kDot words of two neighbouring rows, [rows / 2, stride_step].
struct QueryTile {
  const word* rows;
  int64_t stride;
  const word* steps;
  int64_t stride_step;
};
template <bool kDot>
QueryTile query_tile(const TokenView& view, const Entry& entry, int64_t head, int64_t i0, int64_t rows, int64_t d,
                     word* copy, word* pairs) {
  const int64_t W = kDot ? d / 2 : d;
  QueryTile tile = {(const word*)row_at(view, entry, head, i0), W, nullptr, 0};
  // Rows far apart would share cache sets.
  if (view.stride_token != d || !(kDot || view.dtype == DType::f32)) {
    for (int64_t r = 0; r < rows; ++r)
      copy_query<kDot>(row_at(view, entry, head, i0 + r), view.dtype, d, false, copy + r * W);
    tile.rows = copy;
  }
  if (!kDot) {
    tile.steps = tile.rows;
    tile.stride_step = d;
    return tile;
  }
  tile.steps = pairs;
  tile.stride_step = padded_dim(d);
  for (int64_t r = 0; r < rows; r += 2)
    pair_rows((const uint16_t*)(tile.rows + r * W),
              (const uint16_t*)(r + 1 < rows ? tile.rows + (r + 1) * W : kZeroRow), d, pairs + r / 2 * padded_dim(d));
  return tile;
}

// ---- P and dS of a row ----------------------------------------------------------------------------------------------

struct ScoreFactors {
  float scale, exponent;  // of a dot product to a score, to an exponent of 2
  float inner, cap;       // of a dot product to its share of the softcap, of a tanh to a score
  float keep_scale;
  explicit ScoreFactors(const AttentionParams& p)
      : scale(float(p.softmax_scale)),
        exponent(scale * kLog2e<float>),
        inner(p.softcap > 0 ? float(p.softmax_scale / p.softcap) : 0.0f),
        cap(float(p.softcap)),
        keep_scale(float(p.dropout.keep_scale())) {}
};

// s[j] = s[j] * scale - lse in the columns [first, last), whole vectors, the product rounded as in the forward pass.
[[gnu::noinline, gnu::cold]] void subtract_lse(float* s, int64_t first, int64_t last, float scale, float lse) {
  for (int64_t j = first; j < last; j += VL) vstore(s + j, vsub(vrounded(vmul(vload(s + j), vset(scale))), vset(lse)));
}

// Dot products s and dP -> P, with its dropout, and dS in the columns that the row sees; 0 in the others of `all`.
// keep: by column, what dropout makes of a probability.
template <bool kDot, bool kCapped, bool kDropout>
DIFFQKV_INLINE void row_gradients(const ScoreFactors& f, const RowFacts& row, KeyRange all, const float* keep, float* s,
                                  float* dp) {
  float factor = f.exponent, base = -row.lse * kLog2e<float>;
  if (!kCapped && row.own.lo < row.own.hi && __builtin_fabsf(base) > kLargeExponent) {
    subtract_lse(s, row.own.lo / VL * VL, row.own.hi, f.scale, row.lse);
    factor = kLog2e<float>, base = 0.0f;
  }
  const vf exponent = vset(factor), shift = vset(base), delta = vset(row.delta), scale = vset(f.scale);
  if (row.own.lo < row.own.hi)
    for (int64_t j = row.own.lo / VL * VL; j < row.own.hi; j += VL) {
      vf x = vload(s + j), slope = scale;
      if (kCapped) {
        x = vtanh(vmul(x, vset(f.inner)));
        slope = vfma(vmul(x, x), vsub(vset(0.0f), scale), scale);
        x = vmul(vsub(vrounded(vmul(x, vset(f.cap))), vset(row.lse)), vset(kLog2e<float>));
      } else {
        x = vfma(x, exponent, shift);
      }
      const vf p = vexp2<kDot>(x);
      vf g = vload(dp + j), kept = p;
      if (kDropout) {
        kept = vmul(p, vload(keep + j));
        g = vmul(g, vload(keep + j));
      }
      vstore(s + j, kept);
      vstore(dp + j, vmul(vmul(p, slope), vsub(g, delta)));
    }
  for (int64_t j = all.lo; j < min_of(row.own.lo, all.hi); ++j) s[j] = dp[j] = 0.0f;
  for (int64_t j = max_of(row.own.hi, all.lo); j < all.hi; ++j) s[j] = dp[j] = 0.0f;
}

template <bool kDot>
void row_gradients(const AttentionParams& p, const ScoreFactors& f, const RowFacts& row, KeyRange all,
                   const float* keep, float* s, float* dp) {
  if (p.dropout.threshold == 0)
    p.softcap > 0 ? row_gradients<kDot, true, false>(f, row, all, keep, s, dp)
                  : row_gradients<kDot, false, false>(f, row, all, keep, s, dp);
  else
    p.softcap > 0 ? row_gradients<kDot, true, true>(f, row, all, keep, s, dp)
                  : row_gradients<kDot, false, true>(f, row, all, keep, s, dp);
}

#if defined(__AVX512BF16__)
// Writes words (even[j], odd[j]), rounded to bf16, for the columns of `all`, whole vectors of them.
DIFFQKV_INLINE void store_pairs(const float* even, const float* odd, KeyRange all, word* words) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t j = all.lo / VL * VL; j < all.hi; j += VL)
    _mm512_storeu_si512(words + j,
                        _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(vload(odd + j), vload(even + j))));
}
#endif

// ---- one item -------------------------------------------------------------------------------------------------------

template <bool kDot>
struct KeyBlock {
  const FlashAttentionBackwardParams& bp;
  const FlashAttentionBackwardPlan& plan;
  const FlashAttentionBackwardWorkspace& work;
  const AttentionParams& p = bp.forward;
  const ScoreFactors factors{p};
  Entry entry;
  int64_t group, block, j0, keys;  // the keys [j0, j0 + keys)
  KeyRange valid;                  // of them, those that exist

  const int64_t W_k = kDot ? p.d_k / 2 : p.d_k, W_v = kDot ? p.d_v / 2 : p.d_v;
  const int64_t stride_k = padded_dim(p.d_k), stride_v = padded_dim(p.d_v);
  int64_t k_head = -1, v_head = -1;
  word *k_copy, *v_copy, *k_step_copy;
  const word *k_panels[kMaxFlashAttentionBackwardKeys / kPanelTokens],
      *v_panels[kMaxFlashAttentionBackwardKeys / kPanelTokens];
  const word* k_steps;  // rows of K that dS is multiplied with
  int64_t stride_k_steps;
  float *dk, *dv, *row_copies;

  word *q_copy, *q_pairs, *dout_copy, *dout_pairs;
  RowFacts* facts;
  float *dq, *s, *dp, *keep;
  word *p_steps, *ds_steps;  // P and dS, columns of which are multiplied with rows of dO and Q
  uint16_t *ds16, *bits;

  KeyBlock(const FlashAttentionBackwardParams& params, const FlashAttentionBackwardPlan& backward_plan,
           const FlashAttentionBackwardWorkspace& workspace, int64_t item, void* memory)
      : bp(params), plan(backward_plan), work(workspace) {
    // Causal blocks of early keys are seen by most queries: they come first. All groups of a block stand side by side,
    // so that few items wait for one another.
    group = item % plan.groups;
    block = item / plan.groups / p.batch;
    entry = entry_of(p, item / plan.groups % p.batch);
    j0 = block * plan.block_k;
    keys = min_of(plan.block_k, entry.s_k - j0);
    valid = {max_of(j0, entry.keys.lo), min_of(j0 + keys, entry.keys.hi)};
    if (valid.lo >= valid.hi) valid = {j0, j0};

    Scratch scratch(memory);
    k_copy = scratch.take<word>(plan.block_k * W_k);
    v_copy = scratch.take<word>(plan.block_k * W_v);
    k_step_copy = scratch.take<word>((kDot ? plan.block_k / 2 : plan.block_k) * stride_k);
    dk = scratch.take<float>(plan.block_k * stride_k);
    dv = scratch.take<float>(plan.block_k * stride_v);
    row_copies = scratch.take<float>(kPanelTokens * max_of(p.d_k, p.d_v));
    q_copy = scratch.take<word>(plan.block_q * W_k);
    dout_copy = scratch.take<word>(plan.block_q * W_v);
    q_pairs = kDot ? scratch.take<word>(plan.block_q / 2 * stride_k) : nullptr;
    dout_pairs = kDot ? scratch.take<word>(plan.block_q / 2 * stride_v) : nullptr;
    facts = scratch.take<RowFacts>(plan.block_q);
    dq = scratch.take<float>(plan.block_q * stride_k);
    // Without dot products P and dS are used as they are computed.
    s = scratch.take<float>((kDot ? kQkRows : plan.block_q) * kStride);
    dp = scratch.take<float>((kDot ? kQkRows : plan.block_q) * kStride);
    p_steps = kDot ? scratch.take<word>(plan.block_q / 2 * kStride) : (word*)s;
    ds_steps = kDot ? scratch.take<word>(plan.block_q / 2 * kStride) : (word*)dp;
    ds16 = kDot ? scratch.take<uint16_t>(plan.block_q * kStride) : nullptr;
    keep = scratch.take<float>(kStride);
    bits = scratch.take<uint16_t>(kRandomBits);
  }

  void run() {
    if (keys <= 0) return;  // a packed sequence that is not the longest
    const int64_t h0 = group * p.heads.q_per_group(), h1 = h0 + p.heads.q_per_group();
    for (int64_t h = h0; h < h1; ++h) {
      take_heads(p.heads.k_head(h), p.heads.v_head(h));
      for (int64_t x = 0; x < plan.query_blocks && valid.lo < valid.hi; ++x) take_queries(h, x);
    }
    take_heads(-1, -1);
  }

  // Stores the gradients of heads that are done, and loads the next ones.
  void take_heads(int64_t k, int64_t v) {
    if (k != k_head) {
      if (k_head >= 0) store(bp.dk, k_head, dk, stride_k, p.d_k);
      if (k >= 0) load_k(k_head_of(p, entry.b, k));
      k_head = k;
    }
    if (v != v_head) {
      if (v_head >= 0) store(bp.dv, v_head, dv, stride_v, p.d_v);
      if (v >= 0) {
        load_panels(v_head_of(p, entry.b, v), v_copy, W_v, v_panels);
        for (int64_t x = 0; x < keys * stride_v; ++x) dv[x] = 0.0f;
      }
      v_head = v;
    }
  }
  void store(const TokenView& view, int64_t head, const float* rows, int64_t stride, int64_t d) const {
    for (int64_t j = 0; j < keys; ++j)
      store_row(view, key_row_of(view, entry, head, j0 + j), d, rows + j * stride, 1.0f);
  }
  void load_panels(const KvHead& head, word* copy, int64_t W, const word** panels) const {
    for (int64_t x = (valid.lo - j0) / kPanelTokens; j0 + x * kPanelTokens < valid.hi; ++x)
      panels[x] = key_panel<kDot>(head, j0 + x * kPanelTokens, valid, copy + x * kPanelTokens * W, row_copies);
  }
  void load_k(const KvHead& head) {
    for (int64_t x = 0; x < keys * stride_k; ++x) dk[x] = 0.0f;
    if (valid.lo >= valid.hi) return;
    load_panels(head, k_copy, W_k, k_panels);
    if (!kDot && p.k.dtype == DType::f32 && p.k.stride_token == p.d_k) {
      k_steps = (const word*)head.row(valid.lo) - (valid.lo - j0) * p.d_k;
      stride_k_steps = p.d_k;
    } else {
      pack_rows<kDot>(head, j0, keys, valid, k_step_copy, stride_k);
      k_steps = k_step_copy;
      stride_k_steps = stride_k;
    }
  }

  // Adds what block x of the queries of a head contributes.
  void take_queries(int64_t h, int64_t x) {
    const int64_t i0 = x * plan.block_q, rows = min_of(plan.block_q, entry.s_q - i0);
    if (rows <= 0) return;
    const KeyRange seen = {keys_of_query(p, entry, i0).lo, keys_of_query(p, entry, i0 + rows - 1).hi};
    if (seen.lo >= valid.hi || seen.hi <= valid.lo || seen.lo >= seen.hi) return;
    for (int64_t r = 0; r < rows; ++r) facts[r] = facts_of(h, i0 + r);
    const QueryTile q = query_tile<kDot>(p.q, entry, h, i0, rows, p.d_k, q_copy, q_pairs);
    const QueryTile dout = query_tile<kDot>(bp.dout, entry, h, i0, rows, p.d_v, dout_copy, dout_pairs);

    const KeyRange all = {facts[0].own.lo, facts[rows - 1].own.hi};
    for (int64_t r = 0; r < rows; r += kQkRows) differentiate(h, i0, r, min_of(kQkRows, rows - r), all, q, dout);
    add_columns(p_steps, rows, all, dout, p.d_v, dv, stride_v);
    add_columns(ds_steps, rows, all, q, p.d_k, dk, stride_k);

    for (int64_t i = 0; i < rows * stride_k; ++i) dq[i] = 0.0f;
    for (int64_t r = 0; r < rows; r += kPvRows) {
      const int64_t few = min_of(kPvRows, rows - r);
      const KeyRange keys_of_few = whole_steps({facts[r].own.lo, facts[r + few - 1].own.hi});
      const word* ds =
          kDot ? (const word*)(ds16 + r * kStride + keys_of_few.lo) : (const word*)(dp + r * kStride + keys_of_few.lo);
      if (keys_of_few.lo < keys_of_few.hi)
        accumulate_rows<kDot, Rows<kDot, kStride>, Words>(few, ds, k_steps + keys_of_few.lo / kStep * stride_k_steps,
                                                          stride_k_steps, (keys_of_few.hi - keys_of_few.lo) / kStep,
                                                          p.d_k, dq + r * stride_k, stride_k);
    }
    const int64_t first = seen.lo / plan.block_k, last = (seen.hi - 1) / plan.block_k;
    int32_t* ready = work.ready + (entry.b * p.heads.n_q + h) * plan.query_blocks + x;
    if (block > first) work.wait(ready, int32_t(block - first));
    for (int64_t r = 0; r < rows; ++r) add_dq(h, i0 + r, dq + r * stride_k, block == first, block == last);
    __atomic_store_n(ready, int32_t(block - first + 1), __ATOMIC_RELEASE);
  }

  static constexpr int64_t kStep = kDot ? 2 : 1;  // keys or rows that a word holds
  static KeyRange whole_steps(KeyRange range) { return {range.lo / kStep * kStep, round_up(range.hi, kStep)}; }

  RowFacts facts_of(int64_t h, int64_t i) const {
    const KeyRange seen = keys_of_query(p, entry, i);
    const int64_t hi = max_of(valid.lo, min_of(valid.hi, seen.hi)), at = lse_of(p, entry, h, i);
    const float lse = ((const float*)p.lse)[at];
    // Without a finite score all probabilities are 0.
    return {{min_of(hi, max_of(valid.lo, seen.lo)) - j0, hi - j0}, lse == -kInf ? kInf : lse, work.delta[at]};
  }

  // Computes P and dS of the rows [r0, r0 + count), of which some see keys of `tile`.
  void differentiate(int64_t h, int64_t i0, int64_t r0, int64_t count, KeyRange tile, const QueryTile& q,
                     const QueryTile& dout) {
    const KeyRange seen = {facts[r0].own.lo, facts[r0 + count - 1].own.hi};
    // add_columns takes neighbouring columns together, also those at the edge that no row sees.
    const KeyRange all = whole_steps({max_of(tile.lo, seen.lo - kPvRows), min_of(tile.hi, seen.hi + kPvRows)});
    float *s_rows = kDot ? s : s + r0 * kStride, *dp_rows = kDot ? dp : dp + r0 * kStride;
    for (int64_t x = seen.lo / kPanelTokens; seen.lo < seen.hi && x * kPanelTokens < seen.hi; ++x) {
      score_rows<kDot, kStride>(count, q.rows + r0 * q.stride, q.stride, k_panels[x], W_k, s_rows + x * kPanelTokens);
      score_rows<kDot, kStride>(count, dout.rows + r0 * dout.stride, dout.stride, v_panels[x], W_v,
                                dp_rows + x * kPanelTokens);
    }
    for (int64_t r = 0; r < count; ++r) {
      const RowFacts& row = facts[r0 + r];
      if (p.dropout.threshold > 0) {
        const int64_t begin = j0 + all.lo, row_id = entry.b * p.heads.n_q + h;
        draw_bits(p.dropout, row_id, i0 + r0 + r, begin, j0 + all.hi, bits);
        for (int64_t j = all.lo; j < all.hi; ++j)
          keep[j] = bits[j - all.lo + begin % kKeysPerDraw] < p.dropout.threshold ? 0.0f : factors.keep_scale;
      }
      row_gradients<kDot>(p, factors, row, all, keep, s_rows + r * kStride, dp_rows + r * kStride);
    }
#if defined(__AVX512BF16__)
    if (!kDot) return;
    for (int64_t r = 0; r < count; r += 2) {
      const bool odd = r + 1 < count;
      float *s0 = s + r * kStride, *dp0 = dp + r * kStride, *s1 = s0 + kStride, *dp1 = dp0 + kStride;
      for (int64_t j = all.lo / VL * VL; !odd && j < round_up(all.hi, VL); ++j) s1[j] = dp1[j] = 0.0f;
      store_pairs(s0, s1, all, p_steps + (r0 + r) / 2 * kStride);
      store_pairs(dp0, dp1, all, ds_steps + (r0 + r) / 2 * kStride);
      for (int64_t j = all.lo / VL * VL; j < all.hi; j += VL) {
        vstore_bf16(ds16 + (r0 + r) * kStride + j, vload(dp0 + j));
        if (odd) vstore_bf16(ds16 + (r0 + r + 1) * kStride + j, vload(dp1 + j));
      }
    }
#endif
  }

  // gradient[j] += sum over the rows r that see key j of steps[r][j] * tile[r].
  void add_columns(const word* steps, int64_t rows, KeyRange all, const QueryTile& tile, int64_t d, float* gradient,
                   int64_t stride) const {
    int64_t begin = 0, end = 0;
    for (int64_t j = all.lo; j < all.hi; j += kPvRows) {
      const int64_t few = min_of(kPvRows, all.hi - j);
      while (begin < rows && facts[begin].own.hi <= j) ++begin;
      while (end < rows && facts[end].own.lo < j + few) ++end;
      const int64_t from = begin / kStep, to = (end + kStep - 1) / kStep;
      if (from < to)
        accumulate_rows<kDot, Columns, Words>(few, steps + from * kStride + j, tile.steps + from * tile.stride_step,
                                              tile.stride_step, to - from, d, gradient + j * stride, stride);
    }
  }

  // The sum over key blocks lives in dq itself where that is fp32.
  void add_dq(int64_t h, int64_t i, const float* row, bool first, bool last) const {
    const int64_t at = row_of(bp.dq, entry, h, i), d = p.d_k;
    float* sum = bp.dq.dtype == DType::f32 ? (float*)bp.dq.data + at : work.dq + at;
    int64_t x = 0;
    for (; x + VL <= d; x += VL) vstore(sum + x, first ? vload(row + x) : vadd(vload(sum + x), vload(row + x)));
    for (; x < d; ++x) sum[x] = first ? row[x] : sum[x] + row[x];
    if (last && bp.dq.dtype != DType::f32) store_row(bp.dq, at, d, sum, 1.0f);
  }
};

// ---- before the items -----------------------------------------------------------------------------------------------

template <class E>
float dot(const void* a_row, const void* b_row, int64_t d) {
  const auto *a = (const typename E::T*)a_row, *b = (const typename E::T*)b_row;
  vf sums = vset(0.0f);
  int64_t x = 0;
  for (; x + VL <= d; x += VL) sums = vfma(E::load(a + x), E::load(b + x), sums);
  float sum = vsum(sums);
  for (; x < d; ++x) sum += E::get(a[x]) * E::get(b[x]);
  return sum;
}
float dot(const void* a, const void* b, DType dtype, int64_t d) {
  return dtype == DType::f32 ? dot<F32>(a, b, d) : dtype == DType::bf16 ? dot<BF16>(a, b, d) : dot<F16>(a, b, d);
}

}  // namespace

namespace DIFFQKV_ISA {

void flash_attention_backward_rows(const FlashAttentionBackwardParams& bp, const FlashAttentionBackwardPlan& plan,
                                   const FlashAttentionBackwardWorkspace& work, int64_t item) {
  const AttentionParams& p = bp.forward;
  const int64_t h = item % p.heads.n_q;
  const Entry entry = entry_of(p, item / p.heads.n_q);
  const float sink = p.sinks ? ((const float*)p.sinks)[h] : -kInf;
  double dsink = 0.0;
  for (int64_t i = 0; i < entry.s_q; ++i) {
    const int64_t at = lse_of(p, entry, h, i);
    float delta = dot(row_at(bp.dout, entry, h, i), row_at(p.out, entry, h, i), p.out.dtype, p.d_v);
    if (bp.dlse != nullptr) delta -= ((const float*)bp.dlse)[at];
    work.delta[at] = delta;
    const float lse = ((const float*)p.lse)[at];
    if (sink > -kInf) dsink -= double(exp2_of((sink - lse) * kLog2e<float>)) * delta;
  }
  work.dsinks[item] = dsink;
  // Blocks of queries that see no key have no item to write their dq.
  for (int64_t i0 = 0; i0 < entry.s_q; i0 += plan.block_q) {
    const int64_t i1 = min_of(entry.s_q, i0 + plan.block_q);
    if (keys_of_query(p, entry, i0).lo < keys_of_query(p, entry, i1 - 1).hi) continue;
    const float zeros[kMaxHeadDim] = {};
    for (int64_t i = i0; i < i1; ++i) store_row(bp.dq, row_of(bp.dq, entry, h, i), p.d_k, zeros, 1.0f);
  }
}

void flash_attention_backward_block(const FlashAttentionBackwardParams& bp, const FlashAttentionBackwardPlan& plan,
                                    const FlashAttentionBackwardWorkspace& work, int64_t item, void* scratch) {
#if defined(__AVX512BF16__)
  if (bp.forward.q.dtype == DType::bf16) return KeyBlock<true>(bp, plan, work, item, scratch).run();
#endif
  KeyBlock<false>(bp, plan, work, item, scratch).run();
}

}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
