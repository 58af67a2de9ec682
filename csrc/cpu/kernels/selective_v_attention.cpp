// selective_v_attention (the paper's Table 3): all scores, softmax over all of them, then only the V rows of the best
// ones. Three kinds of items: scores of a range of keys for the rows of a group, which leave each row's best candidates
// and the mass of every split; sum and largest norm of a V head's rows, where the caller does not keep them; selection
// and fetch for a few query rows of one V head.
#include "params/selective_v_attention.h"

#include "cpu/kernels/group_split.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/top_k.h"
#include "cpu/kernels/v_stats.h"

namespace diffqkv {
namespace {

// ---- scores and candidates ------------------------------------------------------------------------------------------

// The maximum and sum of exponentials of the columns `own` of a row of scores, which it may change.
inline RowState mass_of(float* s, KeyRange own, float c) {
  const int64_t first = own.lo / VL * VL, last = round_up(own.hi, VL);
  const float maximum = masked_maximum(s, own, first, last, -kInf);
  const vf vc = vset(c), shift = vset(shift_of(s, first, last, maximum, c));
  vf sum0 = vset(0.0f), sum1 = sum0;
  int64_t j = first;
  for (; j + 2 * VL <= last; j += 2 * VL) {
    sum0 = vadd(sum0, vexp2(vfma(vload(s + j), vc, shift)));
    sum1 = vadd(sum1, vexp2(vfma(vload(s + j + VL), vc, shift)));
  }
  if (j < last) sum0 = vadd(sum0, vexp2(vfma(vload(s + j), vc, shift)));
  const float sum = vsum(vadd(sum0, sum1));
  return {maximum, sum, sum};
}

template <bool kDot>
void score(const SelectiveVAttentionParams& sp, const SelectiveVAttentionPlan& plan,
           const SelectiveVAttentionWorkspace& work, int64_t item, void* memory) {
  const AttentionParams& p = sp.attention;
  const int64_t chunk = item % plan.chunks, group = item / plan.chunks % plan.dense.groups;
  const int64_t b = item / plan.chunks / plan.dense.groups, chunk_tokens = plan.chunk_splits * kSplitTokens;
  Scratch scratch(memory);
  const GroupSplit<kDot> part(p, b, group, {chunk * chunk_tokens, (chunk + 1) * chunk_tokens}, scratch);
  Candidates* best = scratch.take<Candidates>(part.rows);
  bool* nan = scratch.take<bool>(part.rows);
  for (int64_t r = 0; r < part.rows; ++r) {
    best[r] = {scratch.take<float>(plan.candidate_room), scratch.take<uint32_t>(plan.candidate_room), 0, -kInf};
    nan[r] = false;
  }
  const float c = exp2_scale(p);
  const int64_t row0 = (b * p.heads.n_q + part.h0) * p.s_q;
  const int64_t end_split = min_of((chunk + 1) * plan.chunk_splits, plan.dense.splits);
  for (int64_t split = chunk * plan.chunk_splits; split < end_split; ++split) {
    const int64_t t0 = split * kSplitTokens;
    const KeyRange keys = {max_of(part.range.lo, t0), min_of(part.range.hi, t0 + kSplitTokens)};
    if (keys.lo < keys.hi) part.score(t0, keys);
    for (int64_t r = 0; r < part.rows; ++r) {
      float* mass = work.mass + ((row0 + r) * plan.dense.splits + split) * 2;
      mass[0] = kEmptyRow.max;
      mass[1] = kEmptyRow.sum;
      const KeyRange own = part.columns_of(r, t0, keys);
      if (own.lo >= own.hi) continue;
      float* s = part.s + r * kSplitTokens;
      if (best[r].count + kSplitTokens + VL > plan.candidate_room) keep_best(best[r], plan.candidates);
      nan[r] |= append_candidates(best[r], s, own.lo, own.hi, uint32_t(t0));
      if (plan.forced > 0) {
        const ForcedKeys forced(sp, keys_of_query(p, part.entry, part.query(r)));
        for (int64_t j = own.lo; j < own.hi; ++j)
          if (forced.has(t0 + j)) work.forced[(row0 + r) * plan.forced + forced.place(t0 + j)] = s[j];
      }
      const RowState state = mass_of(s, own, c);
      mass[0] = state.max;
      mass[1] = state.sum;
    }
  }
  for (int64_t r = 0; r < part.rows; ++r) {
    keep_best(best[r], plan.candidates);
    const int64_t list = (row0 + r) * plan.chunks + chunk;
    work.counts[list] = nan[r] ? -1 : int32_t(best[r].count);
    __builtin_memcpy(work.scores + list * plan.candidates, best[r].score, best[r].count * sizeof(float));
    __builtin_memcpy(work.indices + list * plan.candidates, best[r].index, best[r].count * sizeof(uint32_t));
  }
}

template <class E>
void v_stats(const SelectiveVAttentionParams& sp, const SelectiveVAttentionWorkspace& work, int64_t batch_v_head) {
  const AttentionParams& p = sp.attention;
  const int64_t b = batch_v_head / p.heads.n_v, head = batch_v_head % p.heads.n_v;
  float* stats = work.v_stats + batch_v_head * (p.d_v + 1);
  for (int64_t x = 0; x <= p.d_v; ++x) stats[x] = 0.0f;
  const KeyRange keys = entry_of(p, b).keys;
  for (int64_t t = keys.lo; t < keys.hi; ++t) {
    const KvSlot slot = kv_page(p.paging, b, t);
    const auto* head_rows = head_at<const typename E::T>(p.v, slot.page, head, p.heads.v_per_group());
    add_to_stats<E>(head_rows + slot.token * p.v.stride_token, p.d_v, stats);
  }
}

// ---- selection ------------------------------------------------------------------------------------------------------

// One query row on its way from candidates to a result.
template <class E>
struct SelectedRow {
  using T = typename E::T;
  const SelectiveVAttentionParams& sp;
  const SelectiveVAttentionPlan& plan;
  const SelectiveVAttentionWorkspace& work;
  const AttentionParams& p = sp.attention;
  Candidates best;
  float* weight;
  const T** value;

  int64_t row, b, h, query, v_head, n, top_k, count;
  Entry entry;
  KeyRange keys;
  RowState state;
  float kept;
  const float* stats;     // of the V head, or null
  const float* seen_sum;  // tail mean: sum of the V rows that the query sees
  alignas(64) float own_sum[kMaxHeadDim + VL];

  SelectedRow(const SelectiveVAttentionParams& params, const SelectiveVAttentionPlan& selective,
              const SelectiveVAttentionWorkspace& shared, Scratch& scratch)
      : sp(params), plan(selective), work(shared) {
    best.score = scratch.take<float>(plan.listed_room);
    best.index = scratch.take<uint32_t>(plan.listed_room);
    weight = scratch.take<float>(plan.used_room);
    value = scratch.take<const T*>(plan.used_room);
  }

  // Finds the rows to fetch and their weights, and starts to fetch them. Returns false where the row is complete
  // without.
  bool select(int64_t which) {
    row = which;
    query = row % p.s_q;
    h = row / p.s_q % p.heads.n_q;
    b = row / p.s_q / p.heads.n_q;
    v_head = p.heads.v_head(h);
    entry = entry_of(p, b);
    keys = keys_of_query(p, entry, query);
    n = keys.hi - keys.lo;
    top_k = min_of(sp.top_k, n);
    work.computed_densely[row] = 0;
    if (sp.top_k >= entry.keys.hi - entry.keys.lo) {  // the dense kernel has written out and lse
      report([&](int64_t i) { return keys.lo + i; });
      dense_stats();
      return false;
    }
    stats = sp.v_stats ? sp.v_stats : work.v_stats;
    if (stats) stats += (b * p.heads.n_v + v_head) * (p.d_v + 1);
    if (sp.tail == Tail::mean) sum_what_is_seen();
    state = kEmptyRow;
    for (int64_t split = 0; split < plan.dense.splits; ++split) {
      const float* mass = work.mass + (row * plan.dense.splits + split) * 2;
      if (mass[1] != 0.0f) merge(state, {mass[0], mass[1], mass[1]}, exp2_scale(p));
    }
    bool nan = false;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) nan |= work.counts[row * plan.chunks + chunk] < 0;
    if (nan) {  // makes its row NaN, as in a dense softmax; there is no order to select by
      state = {__builtin_nanf(""), __builtin_nanf(""), __builtin_nanf("")};
      for (int64_t i = 0; i < top_k; ++i) best.index[i] = uint32_t(keys.lo + i), best.score[i] = 0.0f;
      best.count = top_k;
    } else {
      list_best(top_k);
    }
    report([&](int64_t i) { return int64_t(best.index[i]); });
    if (!nan) add_forced();
    weigh();
    if (sp.max_error >= 0.0f && !nan && guaranteed() > sp.max_error && !add_rows()) {
      work.computed_densely[row] = 1;
      dense_stats();
      return false;
    }
    for (int64_t i = 0; i < best.count; ++i) {
      value[i] = v_row(best.index[i]);
      for (int64_t x = 0; x < p.d_v; x += 64 / int64_t(sizeof(T))) __builtin_prefetch(value[i] + x);
    }
    return true;
  }

  void fetch() {
    alignas(64) float o[kMaxHeadDim + 4 * VL];
    int64_t x = 0;
    for (; x + 4 * VL <= p.d_v; x += 4 * VL) weighted_sum<4>(x, o + x, VL);
    for (; x < p.d_v; x += VL) weighted_sum<1>(x, o + x, int(min_of(VL, p.d_v - x)));

    const float mass = kept_mass(), rest = unread_mass();
    if (state.sum > 0.0f && best.count < n) {  // false for NaN
      if (sp.tail == Tail::renorm) state.norm = kept;
      const float factor = mass < 1.0f ? (1.0f - mass) * state.sum / float(n) : 0.0f;
      if (sp.tail == Tail::mean)
        for (int64_t i = 0; i < p.d_v; ++i) o[i] += factor * seen_sum[i];
    }
    store_result(p, entry, h, query, o, state);
    sp.kept_mass[row] = mass;
    sp.rows_used[row] = int32_t(best.count);
    if (!sp.want_bound) {
      sp.error_bound[row] = kInf;
    } else if (state.sum == 0.0f || rest == 0.0f) {
      sp.error_bound[row] = 0.0f;
    } else {
      float square = 0.0f;
      for (int64_t i = 0; i < p.d_v; ++i) square += o[i] * o[i];
      sp.error_bound[row] = rest * (sp.tail == Tail::renorm ? stats[p.d_v] + __builtin_sqrtf(square) / kept : radius());
    }
  }

 private:
  const T* v_row(int64_t token) const {
    const KvSlot slot = kv_page(p.paging, b, token);
    return head_at<const T>(p.v, slot.page, v_head, p.heads.v_per_group()) + slot.token * p.v.stride_token;
  }
  // The row's indices, from its top_k best tokens in ascending order.
  template <class Token>
  void report(const Token& token) const {
    if (sp.indices == nullptr) return;
    int64_t* indices = sp.indices + row * sp.indices_per_row;
    for (int64_t i = 0; i < top_k; ++i) indices[i] = token(i);
    for (int64_t i = top_k; i < sp.indices_per_row; ++i) indices[i] = -1;
  }
  // stats sum up all keys of the entry: this takes away the rows after the query, fewer than s_q.
  void sum_what_is_seen() {
    seen_sum = stats;
    if (keys.hi == entry.keys.hi) return;
    seen_sum = own_sum;
    for (int64_t x = 0; x < p.d_v; ++x) own_sum[x] = stats[x];
    for (int64_t t = keys.hi; t < entry.keys.hi; ++t) {
      const T* v = v_row(t);
      for (int64_t x = 0; x < p.d_v; x += VL)
        vstore(own_sum + x, vsub(vload(own_sum + x), E::load_first(v + x, int(min_of(VL, p.d_v - x)))));
    }
  }
  void dense_stats() {
    sp.kept_mass[row] = n > 0 ? 1.0f : 0.0f;
    sp.rows_used[row] = int32_t(n);
    sp.error_bound[row] = sp.want_bound ? 0.0f : kInf;
  }

  void list_best(int64_t k) {
    best.count = 0;
    best.least = -kInf;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t list = row * plan.chunks + chunk, listed = work.counts[list];
      __builtin_memcpy(best.score + best.count, work.scores + list * plan.candidates, listed * sizeof(float));
      __builtin_memcpy(best.index + best.count, work.indices + list * plan.candidates, listed * sizeof(uint32_t));
      best.count += listed;
    }
    keep_best(best, k);
  }
  // Brings in the forced rows that are not among the best.
  void add_forced() {
    const ForcedKeys forced(sp, keys);
    const int64_t first = forced.first_end - forced.first, last = forced.last_end - forced.last_begin;
    if (first + last == 0) return;
    int64_t m = 0;
    for (int64_t i = 0; i < best.count; ++i)
      if (!forced.has(best.index[i])) {
        best.score[m] = best.score[i];
        best.index[m++] = best.index[i];
      }
    for (int64_t i = m - 1; i >= 0; --i) {
      best.score[first + i] = best.score[i];
      best.index[first + i] = best.index[i];
    }
    const float* scores = work.forced + row * plan.forced;
    for (int64_t i = 0; i < first + last; ++i) {
      const int64_t to = i < first ? i : i + m;
      best.score[to] = scores[i];
      best.index[to] = uint32_t(i < first ? forced.first + i : forced.last_begin + i - first);
    }
    best.count = m + first + last;
  }
  void weigh() {
    const int64_t end = round_up(best.count, VL);
    for (int64_t i = best.count; i < end; ++i) best.score[i] = -kInf;
    const vf c = vset(exp2_scale(p)), shift = vset(shift_of(best.score, 0, end, state.max, exp2_scale(p)));
    vf sum = vset(0.0f);
    for (int64_t i = 0; i < best.count; i += VL) {
      const vf w = vexp2(vfma(vload(best.score + i), c, shift));
      vstore(weight + i, w);
      sum = vadd(sum, w);
    }
    kept = vsum(sum);
  }
  // Where all rows are used the sum is the dense one, and the mass 1 whatever the rounding.
  float kept_mass() const {
    if (state.sum == 0.0f) return 0.0f;
    return best.count == n && state.sum == state.sum ? 1.0f : kept / state.sum;
  }
  // An upper bound of the mass of the rows that are not read.
  float unread_mass() const {
    const float mass = kept_mass();
    if (best.count == n || mass != mass) return mass == mass ? 0.0f : mass;
    return (mass < 1.0f ? 1.0f - mass : 0.0f) + kMassRounding;
  }
  // The largest distance of a V row that is not read from what stands for it, where that is known before the fetch.
  float radius() const {
    const float norm = stats[p.d_v];
    if (sp.tail != Tail::mean) return norm;
    float square = 0.0f;
    for (int64_t i = 0; i < p.d_v; ++i) square += seen_sum[i] * seen_sum[i];
    return norm + __builtin_sqrtf(square) / float(n);
  }
  // An upper bound of error_bound, known before the fetch.
  float guaranteed() const {
    const float rest = unread_mass();
    return state.sum == 0.0f || rest == 0.0f ? 0.0f : rest * (sp.tail == Tail::renorm ? 2.0f : 1.0f) * radius();
  }
  // Uses the fewest best rows that keep the guarantee, from top_k to what the candidates are good for; returns false
  // where those are too few.
  bool add_rows() {
    const auto use = [&](int64_t k) {
      list_best(k);
      add_forced();
      weigh();
      return guaranteed() <= sp.max_error;
    };
    int64_t too_few = top_k, enough = min_of(plan.candidates, n);
    if (!use(enough)) return false;
    while (enough - too_few > 1) {
      const int64_t k = too_few + (enough - too_few) / 2;
      (use(k) ? enough : too_few) = k;
    }
    return use(enough);
  }
  template <int NV>
  DIFFQKV_INLINE void weighted_sum(int64_t column, float* o, int columns) const {
    vf acc[NV];
    DIFFQKV_UNROLL
    for (int x = 0; x < NV; ++x) acc[x] = vset(0.0f);
    for (int64_t i = 0; i < best.count; ++i) {
      const vf w = vset(weight[i]);
      const T* v = value[i] + column;
      DIFFQKV_UNROLL
      for (int x = 0; x < NV; ++x) acc[x] = vfma(w, NV == 1 ? E::load_first(v, columns) : E::load(v + x * VL), acc[x]);
    }
    DIFFQKV_UNROLL
    for (int x = 0; x < NV; ++x) vstore(o + x * VL, acc[x]);
  }
};

// The query rows [item * kRowsPerFetch, ...) of a V head. V rows that several of them use are in the cache after the
// first; while one row selects, the V rows of the one before are on their way.
template <class E>
void gather(const SelectiveVAttentionParams& sp, const SelectiveVAttentionPlan& plan,
            const SelectiveVAttentionWorkspace& work, int64_t item, void* memory) {
  const AttentionParams& p = sp.attention;
  const int64_t rows = p.heads.q_per_v() * p.s_q, blocks = (rows + kRowsPerFetch - 1) / kRowsPerFetch;
  const int64_t first = item % blocks * kRowsPerFetch, end = min_of(rows, first + kRowsPerFetch);
  const int64_t row0 = item / blocks * rows;  // q heads of a V head are neighbours
  Scratch scratch(memory);
  SelectedRow<E> one(sp, plan, work, scratch), other(sp, plan, work, scratch);
  SelectedRow<E>*next = &one, *pending = nullptr;
  for (int64_t r = first; r < end; ++r) {
    if (!next->select(row0 + r)) continue;
    if (pending) pending->fetch();
    pending = next;
    next = next == &one ? &other : &one;
  }
  if (pending) pending->fetch();
}

}  // namespace

namespace DIFFQKV_ISA {
void selective_v_attention_score(const SelectiveVAttentionParams& p, const SelectiveVAttentionPlan& plan,
                                 const SelectiveVAttentionWorkspace& work, int64_t item, void* scratch) {
#if defined(__AVX512BF16__)
  if (p.attention.q.dtype == DType::bf16) return score<true>(p, plan, work, item, scratch);
#endif
  score<false>(p, plan, work, item, scratch);
}
void selective_v_attention_stats(const SelectiveVAttentionParams& p, const SelectiveVAttentionWorkspace& work,
                                 int64_t batch_v_head) {
  if (p.attention.v.dtype == DType::f32) return v_stats<F32>(p, work, batch_v_head);
  if (p.attention.v.dtype == DType::bf16) return v_stats<BF16>(p, work, batch_v_head);
  v_stats<F16>(p, work, batch_v_head);
}
void selective_v_attention_gather(const SelectiveVAttentionParams& p, const SelectiveVAttentionPlan& plan,
                                  const SelectiveVAttentionWorkspace& work, int64_t item, void* scratch) {
  if (p.attention.v.dtype == DType::f32) return gather<F32>(p, plan, work, item, scratch);
  if (p.attention.v.dtype == DType::bf16) return gather<BF16>(p, plan, work, item, scratch);
  gather<F16>(p, plan, work, item, scratch);
}
}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
