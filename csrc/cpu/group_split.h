// All query rows of one KV group over one range of its keys: what decode and selective V have in common. Rows are
// (q head of the group, query); those of a K head are neighbours, and so are those of a V head.
#pragma once
#include "cpu/attention_tile.h"

namespace diffqkv {
namespace {

template <bool kDot>
struct GroupSplit {
  const AttentionParams& p;
  int64_t b, group, h0, rows;  // h0: the group's first q head
  int64_t W;                   // words of a q row
  KeyRange entry, range;       // keys of the batch entry; those of the tokens given that any row sees
  word *q, *panel;
  float *row_copies, *s;
  RowState* state;

  GroupSplit(const AttentionParams& params, int64_t batch_entry, int64_t kv_group, KeyRange tokens, Scratch& scratch)
      : p(params),
        b(batch_entry),
        group(kv_group),
        h0(group * p.heads.q_per_group()),
        rows(p.heads.q_per_group() * p.s_q),
        W(kDot ? p.d_k / 2 : p.d_k) {
    q = scratch.take<word>(rows * W);
    panel = scratch.take<word>(kPanelTokens * W);
    row_copies = scratch.take<float>(kPanelTokens * p.d_k);
    s = scratch.take<float>(rows * kSplitTokens);
    state = scratch.take<RowState>(rows);

    entry = keys_of_entry(p, b);
    const KeyRange newest = keys_of_query(p, b, entry, p.s_q - 1);
    range = {max_of(newest.lo, tokens.lo), min_of(newest.hi, tokens.hi)};
    for (int64_t r = 0; r < rows; ++r) {
      state[r] = kEmptyRow;
      copy_query<kDot>(query_row(p, b, q_head(r), query(r)), p.q.dtype, p.d_k, p.softmax_scale < 0, q + r * W);
    }
  }

  int64_t q_head(int64_t row) const { return h0 + row / p.s_q; }
  int64_t query(int64_t row) const { return row % p.s_q; }

  // Scores of all rows with the keys of a split that starts at t0, into s.
  void score(int64_t t0, KeyRange keys) const {
    const int64_t rows_k = p.heads.q_per_k() * p.s_q;
    for (int64_t k = 0; k < p.heads.k_per_group(); ++k)
      for (int64_t t = keys.lo / kPanelTokens * kPanelTokens; t < keys.hi; t += kPanelTokens)
        score_rows<kDot, kSplitTokens>(
            rows_k, q + k * rows_k * W, W,
            key_panel<kDot>(p, b, group * p.heads.k_per_group() + k, t, keys, panel, row_copies), W,
            s + k * rows_k * kSplitTokens + (t - t0));
  }
  // The columns of a split that a row sees; hi <= lo: none.
  KeyRange columns_of(int64_t row, int64_t t0, KeyRange keys) const {
    const KeyRange seen = keys_of_query(p, b, entry, query(row));
    return {max_of(keys.lo, seen.lo) - t0, min_of(keys.hi, seen.hi) - t0};
  }
};

}  // namespace
}  // namespace diffqkv
