// The result of a query row: its softmax from the statistics of all quanta, the best of all chunks' candidates, and the
// sum of their V rows. A block takes a row, and sums everything in an order that only the row's keys decide.
#pragma once
#include "cuda/selective_v_attention/cache_rows.cuh"
#include "cuda/selective_v_attention/params.cuh"
#include "cuda/warp.cuh"

namespace diffqkv::device::selective_v_attention {

struct GatherShared {
  uint32_t digits[kSelectiveVAttentionThreads];
  float q[kMaxHeadDim];
  float stats[kMaxHeadDim + 4];  // of the V head: sum of its rows, for tail mean of those seen; largest norm
  float weights[kSelectiveVAttentionThreads];  // of the keys that a row computed densely takes at a time
  float sums[kSelectiveVAttentionWarps][kMaxHeadDim];
  float reduce[kSelectiveVAttentionWarps];
  int chosen[kSelectiveVAttentionWarps], listed[kSelectiveVAttentionWarps];
};
static_assert(sizeof(GatherShared) <= kSelectiveVAttentionGatherBytes);

template <class E>
struct SelectedRow {
  using T = typename E::T;
  using Lanes = RowLanes<E>;
  using P = Piece<E>;
  static constexpr int kThreads = kSelectiveVAttentionThreads, kAtOnce = 4 / Lanes::kPieces;

  const Params& params;
  const SelectiveVAttentionParams& sp;
  const AttentionParams& p;
  const CudaSelectiveVAttentionPlan& plan;
  GatherShared& shared;

  int64_t row, head, query, v_head, out_row;  // row: of this launch
  Entry entry;
  KeyRange keys;
  int n, top_k;    // keys that the row sees, and how many best ones it wants
  bool dense;      // all keys of the entry are wanted
  bool nan;        // a score is NaN, and so is the row; there is no order to select by
  float max, sum;  // of the softmax over all keys
  float base;      // max, 0 where that is -inf
  float radius;    // largest distance of a V row that is not read from what stands for it, before the fetch

  const uint64_t* candidates;  // of all chunks, by ascending token, with zeros between
  int candidate_count;

  // The rows to read are forced keys, listed ones, forced ones again.
  ForcedKeys forced;
  const float* forced_scores;
  uint32_t* list_tokens;
  float* list_weights;
  int listed, used;
  float kept;  // sum of their weights

  DIFFQKV_DEVICE SelectedRow(const Params& the_params, char* memory)
      : params(the_params),
        sp(params.sp),
        p(sp.attention),
        plan(params.plan),
        shared(*reinterpret_cast<GatherShared*>(memory)),
        row(block_x()),
        head(row / params.queries % p.heads.n_q),
        query(params.first_query + row % params.queries),
        v_head(p.heads.v_head(head)),
        entry(entry_of(p, params.first_entry + row / params.queries / p.heads.n_q)),
        keys(keys_of_query(p, entry, query)),
        n(int(keys.hi - keys.lo)),
        top_k(int(min_of(sp.top_k, n))),
        dense(sp.top_k >= entry.keys.hi - entry.keys.lo),
        radius(0.0f),
        forced(sp, keys),
        forced_scores(params.forced(row)) {
    out_row = lse_of(p, entry, head, query);
    char* list = params.list(row);
    char* next = memory + kSelectiveVAttentionGatherBytes;
    if (plan.keys_in_shared) next += int64_t(plan.chunks) * plan.candidates * 8;
    if (plan.list_in_shared) list = next;
    list_tokens = reinterpret_cast<uint32_t*>(list);
    list_weights = reinterpret_cast<float*>(list_tokens + plan.wanted);

    const int64_t first = keys.lo / plan.chunk_tokens, end = n > 0 ? (keys.hi - 1) / plan.chunk_tokens + 1 : first;
    candidates = params.keys(row) + first * plan.candidates;
    candidate_count = int(end - first) * plan.candidates;
    if (plan.keys_in_shared) {
      auto* copy = reinterpret_cast<uint64_t*>(memory + kSelectiveVAttentionGatherBytes);
      for (int i = 2 * thread(); i < candidate_count; i += 2 * kThreads) copy_async(copy + i, candidates + i, true);
      candidates = copy;
    }
    copy_commit();
  }

  DIFFQKV_DEVICE float block_sum(float x) const {
    x = warp_sum(x);
    if (lane() == 0) shared.reduce[warp()] = x;
    sync_block();
    x = 0.0f;
    DIFFQKV_UNROLL
    for (int w = 0; w < kSelectiveVAttentionWarps; ++w) x += shared.reduce[w];
    sync_block();
    return x;
  }
  DIFFQKV_DEVICE float block_max(float x) const {
    x = warp_max(x);
    if (lane() == 0) shared.reduce[warp()] = x;
    sync_block();
    DIFFQKV_UNROLL
    for (int w = 0; w < kSelectiveVAttentionWarps; ++w) x = shared.reduce[w] > x ? shared.reduce[w] : x;
    sync_block();
    return x;
  }

  DIFFQKV_DEVICE void softmax() {
    const int64_t first = keys.lo / kSelectiveVAttentionQuantum,
                  end = n > 0 ? (keys.hi - 1) / kSelectiveVAttentionQuantum + 1 : first;
    const float* mass = params.mass(row);
    float most = -__builtin_inff(), total = 0.0f;
    bool unordered = false;
    for (int64_t i = first + thread(); i < end; i += kThreads) {
      most = mass[2 * i] > most ? mass[2 * i] : most;
      unordered |= mass[2 * i] != mass[2 * i];
    }
    nan = any_in_block(unordered);
    max = block_max(most);
    base = max > -__builtin_inff() ? max : 0.0f;
    for (int64_t i = first + thread(); i < end; i += kThreads)
      if (mass[2 * i + 1] != 0.0f) total = fma(mass[2 * i + 1], exp2((mass[2 * i] - max) * plan.exp2_scale), total);
    sum = block_sum(total);
    if (nan) max = sum = __builtin_nanf("");
  }
  DIFFQKV_DEVICE float weight_of(float score) const { return exp2((score - base) * plan.exp2_scale); }

  // Finds the k-th largest candidate by its digits of 8 bits from the top; or a lower one with as many above it.
  DIFFQKV_DEVICE uint64_t kth(int k) const {
    static_assert(kThreads == 256);
    uint64_t prefix = 0;
    for (int bit = 56;; bit -= 8) {
      shared.digits[thread()] = 0;
      sync_block();
      for (int i = thread(); i < candidate_count; i += kThreads) {
        const uint64_t key = candidates[i];
        if (bit == 56 || (key ^ prefix) >> (bit + 8) == 0) atomic_add(&shared.digits[key >> bit & 255], 1);
      }
      sync_block();
      int own = 0;
      DIFFQKV_UNROLL
      for (int i = 0; i < 8; ++i) own += int(shared.digits[8 * lane() + i]);
      int reached = own;  // by the digits of this lane and those above
      DIFFQKV_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        const int higher = shuffle(reached, lane() + step);
        if (lane() + step < 32) reached += higher;
      }
      const int at = count_ones(ballot(reached >= k)) - 1;
      int above = shuffle(reached - own, at), digit = 8 * at + 7;
      for (; above + int(shared.digits[digit]) < k; --digit) above += int(shared.digits[digit]);
      k -= above;
      prefix |= uint64_t(digit) << bit;
      const bool all = int(shared.digits[digit]) == k;
      sync_block();
      if (all || bit == 0) return prefix;
    }
  }

  // Lists what is read with the k best; `report`: they are the result's indices.
  DIFFQKV_DEVICE void choose(int k, bool report) {
    const uint64_t least = k < n ? kth(k) : 1;
    const int segment = (candidate_count + kThreads - 1) / kThreads * 32, first = warp() * segment;
    const int end = first + segment < candidate_count ? first + segment : candidate_count;
    const auto is_listed = [&](uint64_t key) { return key >= least && !forced.has(token_of(key)); };
    int chosen = 0, own = 0;
    for (int i = first; i < end; i += 32) {
      const uint64_t key = i + lane() < end ? candidates[i + lane()] : 0;
      chosen += count_ones(ballot(key >= least));
      own += count_ones(ballot(is_listed(key)));
    }
    if (lane() == 0) shared.chosen[warp()] = chosen, shared.listed[warp()] = own;
    sync_block();
    chosen = own = listed = 0;
    DIFFQKV_UNROLL
    for (int w = 0; w < kSelectiveVAttentionWarps; ++w) {
      chosen += w < warp() ? shared.chosen[w] : 0;
      own += w < warp() ? shared.listed[w] : 0;
      listed += shared.listed[w];
    }
    int64_t* indices = sp.indices + out_row * sp.indices_per_row;
    report = report && sp.indices != nullptr;
    for (int i = first; i < end; i += 32) {
      const uint64_t key = i + lane() < end ? candidates[i + lane()] : 0;
      const uint32_t all = ballot(key >= least), mine = ballot(is_listed(key));
      if (report && key >= least) indices[chosen + count_ones(all & lanes_below())] = token_of(key);
      if (is_listed(key)) {
        const int to = own + count_ones(mine & lanes_below());
        list_tokens[to] = token_of(key);
        list_weights[to] = weight_of(score_of(key));
      }
      chosen += count_ones(all);
      own += count_ones(mine);
    }
    sync_block();
    used = listed + int(forced.first_end - forced.first + forced.last_end - forced.last_begin);
    float total = 0.0f;
    for (int i = thread(); i < used; i += kThreads) total += at(i).weight;
    kept = block_sum(total);
  }
  struct Used {
    uint32_t token;
    float weight;
  };
  DIFFQKV_DEVICE Used at(int i) const {
    const int before = int(forced.first_end - forced.first), j = i - before;
    if (j >= 0 && j < listed) return {list_tokens[j], list_weights[j]};
    const int64_t key = j < 0 ? forced.first + i : forced.last_begin + j - listed;
    return {uint32_t(key), weight_of(forced_scores[forced.place(key)])};
  }

  // Where all rows are used the sum is the dense one, and the mass 1 whatever the rounding.
  DIFFQKV_DEVICE float kept_mass() const {
    if (sum == 0.0f) return 0.0f;
    return used == n && sum == sum ? 1.0f : kept / sum;
  }
  // An upper bound of the mass of the rows that are not read.
  DIFFQKV_DEVICE float unread_mass() const {
    const float mass = kept_mass();
    if (mass != mass) return mass;
    return used == n ? 0.0f : (mass < 1.0f ? 1.0f - mass : 0.0f) + kMassRounding;
  }
  // An upper bound of error_bound, known before the fetch.
  DIFFQKV_DEVICE float guaranteed() const {
    const float rest = unread_mass();
    return sum == 0.0f || rest == 0.0f ? 0.0f : rest * (sp.tail == Tail::renorm ? 2.0f : 1.0f) * radius;
  }

  DIFFQKV_DEVICE void load_stats(const HeadRows<T>& rows) {
    const int64_t batch_v_head = entry.b * p.heads.n_v + v_head, first = entry.keys.lo / kSelectiveVAttentionPartTokens;
    const int64_t end = (entry.keys.hi - 1) / kSelectiveVAttentionPartTokens + 1;
    for (int c = thread(); c <= p.d_v; c += kThreads) {
      float x = sp.v_stats != nullptr ? sp.v_stats[batch_v_head * (p.d_v + 1) + c] : 0.0f;
      for (int64_t i = first; sp.v_stats == nullptr && i < end; ++i) {
        const float part = params.part(batch_v_head, i)[c];
        x = c == p.d_v ? max_norm(x, part) : x + part;
      }
      // The rows after the query, fewer than s_q, do not count.
      for (int64_t t = keys.hi; sp.tail == Tail::mean && c < p.d_v && t < entry.keys.hi; ++t)
        x -= E::get(rows[uint32_t(t)][c]);
      shared.stats[c] = x;
    }
    sync_block();
    radius = shared.stats[p.d_v];
    if (sp.tail == Tail::mean) {
      const float x = thread() < p.d_v ? shared.stats[thread()] : 0.0f;
      radius += sqrt(block_sum(x * x)) / float(n);
    }
  }

  // Lists the rows of top_k, or with max_error the fewest best rows, up to `wanted`, that guarantee it. Returns false
  // where those are too few.
  DIFFQKV_DEVICE bool select() {
    const int most = plan.wanted < n ? plan.wanted : n;
    int too_few = 0, enough = most + 1;  // of which is known that they are
    for (int k = top_k;;) {
      choose(k, too_few == 0 && k == top_k);
      if (sp.max_error < 0.0f) return true;
      if (guaranteed() > sp.max_error) {
        if (k == most) return false;
        too_few = k;
      } else {
        enough = k;
        if (k == top_k) return true;
      }
      if (enough > most)
        k = most;
      else if (enough - too_few > 1)
        k = too_few + (enough - too_few) / 2;
      else if (k == enough)
        return true;
      else
        k = enough;
    }
  }

  // o += weights of at(0), ..., at(count - 1) times their V rows, this lane's share.
  template <class At>
  DIFFQKV_DEVICE void accumulate(const Lanes& lanes, const HeadRows<T>& rows, int count, At at,
                                 float (&o)[Lanes::kColumns]) const {
    const int slots = kSelectiveVAttentionWarps * lanes.rows, slot = warp() * lanes.rows + lanes.row;
    for (int first = slot; first < count; first += slots * kAtOnce) {
      typename P::Vector v[kAtOnce][Lanes::kPieces];
      float weight[kAtOnce];
      DIFFQKV_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * slots;
        const Used one = i < count ? at(i) : Used{0, 0.0f};
        weight[j] = one.weight;
        lanes.load(i < count ? rows[one.token] : rows.head, i < count, plan.v_vectors, v[j]);
      }
      DIFFQKV_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        DIFFQKV_UNROLL
        for (int i = 0; i < Lanes::kColumns; ++i)
          o[i] = fma(weight[j], E::get(v[j][i / P::kWidth].x[i % P::kWidth]), o[i]);
      }
    }
  }

  // Adds up attention with all keys, their scores computed once more.
  DIFFQKV_DEVICE void accumulate_all(const Lanes& lanes, const HeadRows<T>& rows, float (&o)[Lanes::kColumns]) const {
    const HeadRows<T> k_rows(p.k, p.paging, entry.b, p.heads.k_head(head), p.heads.k_per_group());
    const T* q = static_cast<const T*>(p.q.data) + row_of(p.q, entry, head, query);
    if (thread() < p.d_k) shared.q[thread()] = p.softmax_scale < 0.0 ? -E::get(q[thread()]) : E::get(q[thread()]);
    sync_block();
    for (int64_t first = keys.lo; first < keys.hi; first += kThreads) {
      if (first + thread() < keys.hi) {
        const T* k = k_rows[uint32_t(first + thread())];
        float score = 0.0f;
        for (int x = 0; x < p.d_k; x += P::kWidth) {
          const auto piece = P::load(k + x, plan.k_vectors);
          DIFFQKV_UNROLL
          for (int i = 0; i < P::kWidth; ++i) score = fma(E::get(piece.x[i]), shared.q[x + i], score);
        }
        shared.weights[thread()] = weight_of(score);
      }
      sync_block();
      const auto at = [&](int i) { return Used{uint32_t(first + i), shared.weights[i]}; };
      accumulate(lanes, rows, int(min_of(kThreads, keys.hi - first)), at, o);
      sync_block();
    }
  }

  DIFFQKV_DEVICE void run() {
    int64_t* indices = sp.indices + out_row * sp.indices_per_row;
    for (int64_t i = top_k + thread(); i < sp.indices_per_row; i += kThreads) indices[i] = -1;
    softmax();
    const HeadRows<T> rows(p.v, p.paging, entry.b, v_head, p.heads.v_per_group());
    if (sp.needs_v_stats() && !dense && !nan) load_stats(rows);
    copy_wait<0>();
    sync_block();

    const Lanes lanes(int(p.d_v));
    float o[Lanes::kColumns] = {};
    bool all = dense;  // reports what dense attention would
    if (nan) {
      for (int i = thread(); sp.indices != nullptr && i < top_k; i += kThreads) indices[i] = keys.lo + i;
      used = top_k, kept = sum;
    } else if (select()) {
      accumulate(lanes, rows, used, [&](int i) { return at(i); }, o);
    } else {
      accumulate_all(lanes, rows, o);
      all = true;
    }
    if (all) used = n;
    DIFFQKV_UNROLL
    for (int i = 0; i < Lanes::kColumns; ++i) {
      o[i] = lanes.sum_of_rows(o[i]);
      if (lanes.row == 0 && lanes.has(i)) shared.sums[warp()][lanes.column(i)] = o[i];
    }
    sync_block();

    float x = 0.0f, norm = sum;
    if (thread() < p.d_v) {
      DIFFQKV_UNROLL
      for (int w = 0; w < kSelectiveVAttentionWarps; ++w) x += shared.sums[w][thread()];
    }
    const float mass = all ? (n > 0 ? 1.0f : 0.0f) : kept_mass(), rest = all ? 0.0f : unread_mass();
    if (sum > 0.0f && used < n) {  // false for NaN
      if (sp.tail == Tail::renorm) norm = kept;
      const float factor = mass < 1.0f ? (1.0f - mass) * sum / float(n) : 0.0f;
      if (sp.tail == Tail::mean && thread() < p.d_v) x = fma(factor, shared.stats[thread()], x);
    }
    const float length = sp.want_bound && sp.tail == Tail::renorm ? sqrt(block_sum(x * x)) : 0.0f;
    if (thread() < p.d_v)
      static_cast<T*>(p.out.data)[row_of(p.out, entry, head, query) + thread()] =
          E::put(norm == 0.0f ? 0.0f : x * (1.0f / norm));
    if (thread() != 0) return;
    const float top = mul(max, std::abs(static_cast<float>(p.softmax_scale)));
    static_cast<float*>(p.lse)[out_row] = sum == 0.0f ? -__builtin_inff() : top + log2(sum) * kLn2<float>;
    sp.kept_mass[out_row] = mass;
    sp.rows_used[out_row] = used;
    float bound = __builtin_inff();
    if (sp.want_bound) {
      bound = 0.0f;
      if (sum != 0.0f && rest != 0.0f) bound = rest * (radius + (sp.tail == Tail::renorm ? length / kept : 0.0f));
    }
    sp.error_bound[out_row] = bound;
  }
};

template <class E>
struct Gather {
  using Params = selective_v_attention::Params;
  static constexpr int kThreads = kSelectiveVAttentionThreads, kMinBlocks = 2;
  static DIFFQKV_DEVICE void run(const Params& params, char* shared) { SelectedRow<E>(params, shared).run(); }
};

}  // namespace diffqkv::device::selective_v_attention
