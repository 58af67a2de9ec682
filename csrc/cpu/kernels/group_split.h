// All query rows of one KV group over one range of its keys: what decode_attention and selective_v_attention have in
// common. Rows are (q head of the group, query); those of a K head are neighbours, and so are those of a V head.
#pragma once
#include "cpu/kernels/attention_tile.h"

namespace diffqkv {
namespace {

template <bool kDot>
struct GroupSplit {
  const AttentionParams& p;
  Entry entry;
  int64_t group, h0, rows;  // h0: the group's first q head
  int64_t W;                // words of a q row
  KeyRange range;           // of the tokens given, those that any row sees
  word *q, *panel;
  float *row_copies, *s;
  RowState* state;

  GroupSplit(const AttentionParams& params, int64_t batch_entry, int64_t kv_group, KeyRange tokens, Scratch& scratch)
      : p(params),
        entry(entry_of(p, batch_entry)),
        group(kv_group),
        h0(group * p.heads.q_per_group()),
        rows(p.heads.q_per_group() * entry.s_q),
        W(kDot ? p.d_k / 2 : p.d_k) {
    q = scratch.take<word>(rows * W);
    panel = scratch.take<word>(kPanelTokens * W);
    row_copies = scratch.take<float>(kPanelTokens * p.d_k);
    s = scratch.take<float>(rows * kSplitTokens);
    state = scratch.take<RowState>(rows);

    const KeyRange oldest = keys_of_query(p, entry, 0), newest = keys_of_query(p, entry, entry.s_q - 1);
    range = {max_of(oldest.lo, tokens.lo), min_of(newest.hi, tokens.hi)};
    for (int64_t r = 0; r < rows; ++r) {
      state[r] = kEmptyRow;
      copy_query<kDot>(row_at(p.q, entry, q_head(r), query(r)), p.q.dtype, p.d_k, p.softmax_scale < 0, q + r * W);
    }
  }

  int64_t q_head(int64_t row) const { return h0 + row / entry.s_q; }
  int64_t query(int64_t row) const { return row % entry.s_q; }

  // Writes the scores of all rows with the keys of a split that starts at t0 into s.
  void score(int64_t t0, KeyRange keys) const {
    const int64_t rows_k = p.heads.q_per_k() * entry.s_q;
    for (int64_t k = 0; k < p.heads.k_per_group(); ++k) {
      const KvHead head = k_head_of(p, entry.b, group * p.heads.k_per_group() + k);
      for (int64_t t = keys.lo / kPanelTokens * kPanelTokens; t < keys.hi; t += kPanelTokens)
        score_rows<kDot, kSplitTokens>(rows_k, q + k * rows_k * W, W, key_panel<kDot>(head, t, keys, panel, row_copies),
                                       W, s + k * rows_k * kSplitTokens + (t - t0));
    }
    if (p.softcap > 0) cap_scores(p, rows, s, kSplitTokens, keys.lo - t0, keys.hi - t0);
  }
  // The columns of a split that a row sees; hi <= lo: none.
  KeyRange columns_of(int64_t row, int64_t t0, KeyRange keys) const {
    const KeyRange seen = keys_of_query(p, entry, query(row));
    return {max_of(keys.lo, seen.lo) - t0, min_of(keys.hi, seen.hi) - t0};
  }
};

}  // namespace
}  // namespace diffqkv
