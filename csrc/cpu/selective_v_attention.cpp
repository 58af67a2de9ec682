// Selective V (the paper's Table 3): all scores, softmax over all of them, then only the V rows of the best ones.
// Three kinds of items: scores of a range of keys for the rows of a group; sum and largest norm of a V head's rows,
// where the caller does not keep them; selection and fetch for one query row.
#include "cpu/group_split.h"
#include "cpu/kernels.h"

namespace diffqkv {
namespace {

template <bool kDot>
void score(const SelectiveVParams& sp, const AttentionPlan& plan, const SelectiveWorkspace& work, int64_t item,
           void* workspace) {
  const AttentionParams& p = sp.attention;
  Scratch scratch(workspace);
  const GroupSplit<kDot> part(p, plan, item, scratch);
  const float c = exp2_scale(p);
  const int64_t row0 = (part.b * p.heads.n_q + part.h0) * p.s_q;
  for (int64_t t0 = part.range.lo / kKeyTile * kKeyTile; t0 < part.range.hi; t0 += kKeyTile) {
    const KeyRange tile = {max_of(part.range.lo, t0), min_of(part.range.hi, t0 + kKeyTile)};
    part.score(t0, tile);
    for (int64_t r = 0; r < part.rows; ++r) {
      const auto [lo, hi] = part.columns_of(r, t0, tile);
      if (lo >= hi) continue;
      const float* row = part.s + r * kKeyTile;
      __builtin_memcpy(work.scores + (row0 + r) * work.stride + t0 + lo, row + lo, (hi - lo) * sizeof(float));
    }
    for (int64_t r = 0; r < part.rows; r += kPvRows) {
      float factor[16];
      softmax_rows<false>(
          min_of(kPvRows, part.rows - r), part.s + r * kKeyTile, nullptr,
          [&](int64_t x) { return part.columns_of(r + x, t0, tile); }, {kKeyTile, kKeyTile}, c, part.state + r, factor);
    }
  }
  for (int64_t r = 0; r < part.rows; ++r) {
    float* mass = work.mass + ((row0 + r) * plan.splits + part.split) * 2;
    mass[0] = part.state[r].max;
    mass[1] = part.state[r].sum;
  }
}

template <class E>
void v_stats(const SelectiveVParams& sp, const SelectiveWorkspace& work, int64_t batch_v_head) {
  const AttentionParams& p = sp.attention;
  const int64_t b = batch_v_head / p.heads.n_v, head = batch_v_head % p.heads.n_v;
  float* stats = work.v_stats + batch_v_head * (p.d_v + 1);
  for (int64_t x = 0; x <= p.d_v; ++x) stats[x] = 0.0f;
  const KeyRange keys = keys_of_entry(p, b);
  float row[kMaxHeadDim];
  for (int64_t t = keys.lo; t < keys.hi; ++t) {
    const KvSlot slot = kv_page(p.paging, b, t);
    row_to_float(
        head_at<const typename E::T>(p.v, slot.page, head, p.heads.v_per_group()) + slot.token * p.v.stride_token,
        p.v.dtype, p.d_v, row);
    float square = 0.0f;
    for (int64_t x = 0; x < p.d_v; ++x) {
      stats[x] += row[x];
      square += row[x] * row[x];
    }
    const float norm = __builtin_sqrtf(square);
    if (norm > stats[p.d_v] || norm != norm) stats[p.d_v] = norm;
  }
}

// ---- selection ------------------------------------------------------------------------------------------------------

// One integer per key, larger is better: score descending, then index ascending. Adding 0 makes -0 and +0 one score.
DIFFQKV_INLINE uint64_t rank_of(float score, uint32_t index) {
  uint32_t u = bits_of_float(score + 0.0f);
  u ^= uint32_t(int32_t(u) >> 31) | 0x80000000u;
  return uint64_t(u) << 32 | uint32_t(~index);
}
DIFFQKV_INLINE void swap_ranks(uint64_t& a, uint64_t& b) {
  const uint64_t t = a;
  a = b;
  b = t;
}
// Moves the k largest of n to the front, in any order.
void select_largest(uint64_t* a, int64_t n, int64_t k) {
  int64_t lo = 0, hi = n - 1;
  while (lo < hi) {
    const int64_t mid = lo + (hi - lo) / 2;  // median of three, descending
    if (a[mid] > a[lo]) swap_ranks(a[mid], a[lo]);
    if (a[hi] > a[lo]) swap_ranks(a[hi], a[lo]);
    if (a[hi] > a[mid]) swap_ranks(a[hi], a[mid]);
    const uint64_t pivot = a[mid];
    int64_t i = lo, j = hi;
    while (i <= j) {
      while (a[i] > pivot) ++i;
      while (a[j] < pivot) --j;
      if (i <= j) swap_ranks(a[i++], a[j--]);
    }
    if (k - 1 <= j)
      hi = j;
    else if (k - 1 >= i)
      lo = i;
    else
      return;
  }
}
void sort_ascending(uint32_t* a, int64_t n) {  // heapsort
  const auto sift = [&](int64_t root, int64_t end) {
    for (int64_t child; (child = 2 * root + 1) < end; root = child) {
      if (child + 1 < end && a[child + 1] > a[child]) ++child;
      if (a[root] >= a[child]) return;
      const uint32_t t = a[root];
      a[root] = a[child];
      a[child] = t;
    }
  };
  for (int64_t i = n / 2 - 1; i >= 0; --i) sift(i, n);
  for (int64_t end = n - 1; end > 0; --end) {
    const uint32_t t = a[0];
    a[0] = a[end];
    a[end] = t;
    sift(0, end);
  }
}

// The ranks of all s[0..n) with s >= threshold; nan is set if any score is NaN.
int64_t filter(const float* s, int64_t n, float threshold, uint64_t* ranks, bool& nan) {
  int64_t count = 0, i = 0;
  const vf t = vset(threshold);
  uint32_t unordered = 0;
  for (; i + VL <= n; i += VL) {
    const vf x = vload(s + i);
    unordered |= vnan_bits(x);
    for (uint32_t bits = vge_bits(x, t); bits != 0; bits &= bits - 1) {
      const int64_t j = i + __builtin_ctz(bits);
      ranks[count++] = rank_of(s[j], uint32_t(j));
    }
  }
  for (; i < n; ++i) {
    unordered |= s[i] != s[i];
    if (s[i] >= threshold) ranks[count++] = rank_of(s[i], uint32_t(i));
  }
  nan = unordered != 0;
  return count;
}

// Indices, ascending, of the k best of n scores, k < n. False if a score is NaN. ranks: room for n.
bool select_best(const float* s, int64_t n, int64_t k, uint64_t* ranks, uint32_t* best) {
  // The r-th best of a sample is below the k-th best of all, save with a probability of some 1e-4: then filter again.
  const int64_t samples = min_of(n, 1024);
  const double expected = double(k) * double(samples) / double(n);
  const int64_t r = int64_t(__builtin_ceil(expected + 3.5 * __builtin_sqrt(expected) + 4.0));
  float threshold = -kInf;
  if (r < samples) {
    for (int64_t i = 0; i < samples; ++i) ranks[i] = rank_of(s[i * n / samples], 0);
    select_largest(ranks, samples, r);
    uint64_t smallest = ranks[0];
    for (int64_t i = 1; i < r; ++i) smallest = ranks[i] < smallest ? ranks[i] : smallest;
    const uint32_t u = uint32_t(smallest >> 32);
    threshold = float_of_bits(u & 0x80000000u ? u ^ 0x80000000u : ~u);
    if (threshold != threshold) threshold = -kInf;
  }
  bool nan = false;
  int64_t count = filter(s, n, threshold, ranks, nan);
  if (nan) return false;
  if (count < k) count = filter(s, n, -kInf, ranks, nan);
  select_largest(ranks, count, k);
  for (int64_t i = 0; i < k; ++i) best[i] = ~uint32_t(ranks[i]);
  sort_ascending(best, k);
  return true;
}

// ---- fetch ----------------------------------------------------------------------------------------------------------

template <class E>
void gather(const SelectiveVParams& sp, const SelectiveWorkspace& work, int64_t row, void* workspace) {
  using T = typename E::T;
  const AttentionParams& p = sp.attention;
  const int64_t query = row % p.s_q, h = row / p.s_q % p.heads.n_q, b = row / p.s_q / p.heads.n_q;
  const KeyRange entry = keys_of_entry(p, b), keys = keys_of_query(p, b, entry, query);
  const int64_t n = keys.hi - keys.lo, k = min_of(sp.top_k, n);
  int64_t* indices = sp.indices + row * sp.top_k;
  if (sp.top_k >= entry.hi - entry.lo) {  // the dense kernel has written out and lse
    for (int64_t i = 0; i < sp.top_k; ++i) indices[i] = i < n ? keys.lo + i : -1;
    sp.kept_mass[row] = n > 0 ? 1.0f : 0.0f;
    sp.rows_used[row] = int32_t(n);
    sp.error_bound[row] = sp.want_bound ? 0.0f : kInf;
    return;
  }
  const float c = exp2_scale(p), *scores = work.scores + row * work.stride + keys.lo;
  Scratch scratch(workspace);
  uint64_t* ranks = scratch.take<uint64_t>(n);
  uint32_t* used = scratch.take<uint32_t>(n);
  float* weight = scratch.take<float>(n);

  RowState state = kEmptyRow;
  for (int64_t split = 0; split < work.splits; ++split) {
    const float* mass = work.mass + (row * work.splits + split) * 2;
    if (mass[1] != 0.0f) merge(state, {mass[0], mass[1], mass[1]}, c);
  }

  int64_t count = k;
  if (k == n) {
    for (int64_t i = 0; i < n; ++i) used[i] = uint32_t(i);
  } else if (!select_best(scores, n, k, ranks, used)) {
    // A NaN score makes its row NaN, as in a dense softmax; there is no order to select by.
    state.norm = state.sum = state.max = __builtin_nanf("");
    for (int64_t i = 0; i < k; ++i) used[i] = uint32_t(i);
  }
  for (int64_t i = 0; i < sp.top_k; ++i) indices[i] = i < k ? keys.lo + used[i] : -1;
  if (k < n && (sp.keep_first > 0 || sp.keep_last > 0)) {  // insert the forced rows that were not selected
    uint32_t* merged = (uint32_t*)ranks;
    const int64_t first_end = min_of(sp.keep_first, n), last_begin = max_of(first_end, n - sp.keep_last);
    int64_t m = 0, i = 0;
    for (int64_t j = 0; j < first_end; ++j) merged[m++] = uint32_t(j);
    for (; i < k && used[i] < last_begin; ++i)
      if (used[i] >= first_end) merged[m++] = used[i];
    for (int64_t j = last_begin; j < n; ++j) merged[m++] = uint32_t(j);
    for (int64_t j = 0; j < m; ++j) used[j] = merged[j];
    count = m;
  }

  const float shift = state.max > -kInf ? -state.max * c : 0.0f;
  float kept = 0.0f;
  for (int64_t i = 0; i < count; i += VL) {
    float x[VL], y[VL];
    for (int j = 0; j < VL; ++j) x[j] = i + j < count ? scores[used[i + j]] : -kInf;
    vstore(y, vexp2(vfma(vload(x), vset(c), vset(shift))));
    for (int j = 0; j < VL && i + j < count; ++j) {
      weight[i + j] = y[j];
      kept += y[j];
    }
  }

  float o[kMaxHeadDim + VL] = {};
  const int64_t v_head = p.heads.v_head(h), per_group = p.heads.v_per_group();
  const auto row_of = [&](int64_t i) {
    const KvSlot slot = kv_page(p.paging, b, keys.lo + used[i]);
    return head_at<const T>(p.v, slot.page, v_head, per_group) + slot.token * p.v.stride_token;
  };
  constexpr int64_t kAhead = 8;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      const char* next = (const char*)row_of(i + kAhead);
      for (int64_t x = 0; x < p.d_v * int64_t(sizeof(T)); x += 64) __builtin_prefetch(next + x);
    }
    const T* v = row_of(i);
    const vf w = vset(weight[i]);
    for (int64_t x = 0; x < p.d_v; x += VL)
      vstore(o + x, vfma(w, E::load_first(v + x, int(min_of(VL, p.d_v - x))), vload(o + x)));
  }

  const float all = state.sum;
  const bool empty = all == 0.0f;
  // All rows used: the dense sum, whose mass is 1 whatever the rounding.
  const float kept_mass = empty ? 0.0f : count == n && all == all ? 1.0f : kept / all;
  const float discarded = kept_mass < 1.0f ? 1.0f - kept_mass : kept_mass == kept_mass ? 0.0f : kept_mass;
  const float* stats = sp.v_stats ? sp.v_stats : work.v_stats;
  if (stats) stats += (b * p.heads.n_v + v_head) * (p.d_v + 1);
  if (sp.tail == Tail::renorm && all == all && !empty && count < n) {
    state.norm = kept;
  } else if (sp.tail == Tail::mean && !empty && count < n) {
    const float factor = discarded * all / float(entry.hi - entry.lo);
    for (int64_t x = 0; x < p.d_v; ++x) o[x] += factor * stats[x];
  }
  store_row(p, b, h, query, o, state, c);
  sp.kept_mass[row] = kept_mass;
  sp.rows_used[row] = int32_t(count);
  if (!sp.want_bound) {
    sp.error_bound[row] = kInf;
  } else if (empty || discarded == 0.0f) {
    sp.error_bound[row] = 0.0f;
  } else {
    float square = 0.0f;
    for (int64_t x = 0; x < p.d_v; ++x) {
      const float centre = sp.tail == Tail::renorm ? o[x] / kept
                           : sp.tail == Tail::mean ? stats[x] / float(entry.hi - entry.lo)
                                                   : 0.0f;
      square += centre * centre;
    }
    sp.error_bound[row] = discarded * (stats[p.d_v] + __builtin_sqrtf(square));
  }
}

}  // namespace

namespace DIFFQKV_ISA {
void selective_v_score(const SelectiveVParams& p, const AttentionPlan& plan, const SelectiveWorkspace& work,
                       int64_t item, void* scratch) {
#if defined(__AVX512BF16__)
  if (p.attention.q.dtype == DType::bf16) return score<true>(p, plan, work, item, scratch);
#endif
  score<false>(p, plan, work, item, scratch);
}
void selective_v_stats(const SelectiveVParams& p, const SelectiveWorkspace& work, int64_t batch_v_head) {
  if (p.attention.v.dtype == DType::f32) return v_stats<F32>(p, work, batch_v_head);
  v_stats<BF16>(p, work, batch_v_head);  // row_to_float tells the two half types apart
}
void selective_v_gather(const SelectiveVParams& p, const SelectiveWorkspace& work, int64_t row, void* scratch) {
  if (p.attention.v.dtype == DType::f32) return gather<F32>(p, work, row, scratch);
  if (p.attention.v.dtype == DType::bf16) return gather<BF16>(p, work, row, scratch);
  gather<F16>(p, work, row, scratch);
}
}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
