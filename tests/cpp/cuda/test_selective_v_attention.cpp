// selective_v_attention on the emulated GPU against a stable sort in float64: sets, ties, forced rows, tails, the
// guarantee, and that no plan and no schedule changes a bit.
#include <array>
#include <cstring>
#include <set>

#include "attention_problem.h"
#include "cuda/selective_v_attention/launch_order.cuh"
#include "far.h"

using namespace diffqkv;
using namespace diffqkv::device;

namespace {

struct Options {
  int64_t top_k = 1, keep_first = 0, keep_last = 0;
  Tail tail = Tail::drop;
  float max_error = -1.0f;
  bool bound = true, v_stats = false;
  double scale = 0.0;  // 0: of the problem
};

// Plans for one shape that differ in everything that a plan may choose.
DeviceFacts small_chunks() { return {.multiprocessors = 1 << 20}; }
DeviceFacts large_chunks() { return {.multiprocessors = 1}; }
DeviceFacts little_shared(DeviceFacts facts) {
  facts.shared_per_block = 99 * 1024,
  facts.shared_per_multiprocessor = 2 * (kSelectiveVAttentionGatherBytes + 1024 + 64);
  return facts;
}
// The fewest multiprocessors that make chunks of so many tokens.
DeviceFacts facts_for(const SelectiveVAttentionParams& sp, int32_t chunk_tokens) {
  DeviceFacts facts = large_chunks();
  while (plan_cuda_selective_v_attention(sp, facts).chunk_tokens > chunk_tokens) ++facts.multiprocessors;
  REQUIRE(plan_cuda_selective_v_attention(sp, facts).chunk_tokens == chunk_tokens);
  return facts;
}

template <class E>
struct Selection {
  AttentionProblem<E>& problem;
  Options options;
  SelectiveVAttentionParams sp;
  CudaSelectiveVAttentionPlan plan;
  std::vector<float> kept, bound, stats;
  std::vector<int64_t> indices;
  std::vector<int32_t> used;

  Selection(AttentionProblem<E>& the_problem, const Options& the_options) : problem(the_problem), options(the_options) {
    const AttentionCase& c = problem.c;
    const size_t rows = size_t(c.batch * c.heads.n_q * c.s_q);
    kept.assign(rows, -1.0f), bound.assign(rows, -1.0f), used.assign(rows, -1);
    indices.assign(rows * size_t(options.top_k), -7);
    sp.attention = problem.params();
    if (options.scale != 0.0) sp.attention.softmax_scale = options.scale;
    sp.top_k = options.top_k, sp.keep_first = options.keep_first, sp.keep_last = options.keep_last;
    sp.tail = options.tail, sp.max_error = options.max_error, sp.want_bound = options.bound || options.max_error >= 0;
    sp.kept_mass = kept.data(), sp.error_bound = bound.data(), sp.rows_used = used.data();
    sp.indices = indices.data(), sp.indices_per_row = options.top_k;
    if (options.v_stats) {
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t head = 0; head < c.heads.n_v; ++head) {
          const std::vector<double> exact = v_stats(b, head);
          for (const double x : exact) stats.push_back(float(x));
        }
      sp.v_stats = stats.data();
    }
  }

  // Everything that it writes.
  std::vector<char> bits() const {
    std::vector<char> all;
    const auto add = [&](const auto& x) {
      const char* at = reinterpret_cast<const char*>(x.data());
      all.insert(all.end(), at, at + x.size() * sizeof(x[0]));
    };
    add(problem.out.e), add(problem.lse), add(kept), add(bound), add(used), add(indices);
    return all;
  }

  void run(const DeviceFacts& facts = small_chunks(), emulator::Schedule schedule = emulator::Schedule::forward,
           int64_t workspace_bytes = kSelectiveVAttentionWorkspaceBytes) {
    plan = plan_cuda_selective_v_attention(sp, facts, workspace_bytes);
    const std::align_val_t alignment{256};
    const auto release = [=](void* p) { ::operator delete(p, alignment); };
    const std::unique_ptr<void, decltype(release)> workspace(
        ::operator new(size_t(std::max<int64_t>(plan.workspace_bytes, 1)), alignment), release);
    std::memset(workspace.get(), 0xff, size_t(plan.workspace_bytes));
    std::fill(problem.out.e.begin(), problem.out.e.end(), E::put(std::numeric_limits<float>::quiet_NaN()));
    const int error = selective_v_attention::launch_all<E>(
        sp, plan, workspace.get(),
        [&]<class Kernel>(const selective_v_attention::Params& params, int64_t blocks, int64_t shared_bytes) -> int {
          const emulator::Counts counts = emulate<Kernel>(params, {blocks}, shared_bytes, schedule);
          REQUIRE(counts.matrix_wavefronts == counts.matrix_rows);
          return 0;
        });
    REQUIRE(error == 0);
  }

  KeyRange keys(int64_t b, int64_t query) const {
    const AttentionParams& p = sp.attention;
    return keys_of_query(p, entry_of(p, b), query);
  }
  double v_at(int64_t b, int64_t head, int64_t token, int64_t x) const {
    const int64_t per = problem.c.heads.v_per_group();
    return problem.v
        .wide[size_t(kv_row(problem.v_view, head / per, head % per, kv_page(problem.paging, b, token)) + x)];
  }
  std::vector<double> v_stats(int64_t b, int64_t head) const {
    const AttentionCase& c = problem.c;
    std::vector<double> exact(size_t(c.d_v + 1), 0.0);
    const KeyRange all = entry_of(sp.attention, b).keys;
    for (int64_t t = all.lo; t < all.hi; ++t) {
      double square = 0.0;
      for (int64_t x = 0; x < c.d_v; ++x) {
        const double value = v_at(b, head, t, x);
        exact[size_t(x)] += value, square += value * value;
      }
      exact.back() = std::max(exact.back(), std::sqrt(square));
    }
    return exact;
  }

  // One row by the definition.
  struct Row {
    std::vector<double> scores, weights;  // by visible key; weights: of the softmax
    std::vector<int64_t> order, best, chosen;
    double lse, kept;
    std::vector<double> dense, out;
    double bound;
  };
  Row row(int64_t b, int64_t h, int64_t query) const {
    const AttentionCase& c = problem.c;
    const double scale = sp.attention.softmax_scale;
    const KeyRange seen = keys(b, query);
    const int64_t n = seen.hi - seen.lo, k_head = c.heads.k_head(h), v_head = c.heads.v_head(h);
    Row r;
    for (int64_t t = seen.lo; t < seen.hi; ++t) {
      const int64_t per = c.heads.k_per_group();
      const int64_t at = kv_row(problem.k_view, k_head / per, k_head % per, kv_page(problem.paging, b, t));
      double s = 0.0;
      for (int64_t x = 0; x < c.d_k; ++x)
        s += problem.k.wide[size_t(at + x)] * problem.q.wide[size_t(q_offset(b, h, query) + x)];
      r.scores.push_back(scale < 0 ? -s : s);
    }
    r.order.resize(size_t(n));
    std::iota(r.order.begin(), r.order.end(), 0);
    std::stable_sort(r.order.begin(), r.order.end(),
                     [&](int64_t i, int64_t j) { return r.scores[size_t(i)] > r.scores[size_t(j)]; });
    const double most = n > 0 ? r.scores[size_t(r.order[0])] : 0.0;
    double sum = 0.0;
    for (const double s : r.scores)
      r.weights.push_back(std::exp((s - most) * std::abs(scale))), sum += r.weights.back();
    for (double& w : r.weights) w /= sum;
    r.lse = n > 0 ? std::log(sum) + most * std::abs(scale) : -std::numeric_limits<double>::infinity();

    std::set<int64_t> chosen(r.order.begin(), r.order.begin() + std::min(n, options.top_k));
    r.best.assign(chosen.begin(), chosen.end());
    for (int64_t i = 0; i < n; ++i)
      if (i < options.keep_first || i >= n - options.keep_last) chosen.insert(i);
    std::vector<double> mean(size_t(c.d_v), 0.0);  // of the V rows that the query sees
    double mean_norm = 0.0;
    for (int64_t x = 0; x < c.d_v; ++x) {
      for (int64_t t = seen.lo; t < seen.hi; ++t) mean[size_t(x)] += v_at(b, v_head, t, x) / double(n);
      mean_norm += mean[size_t(x)] * mean[size_t(x)];
    }
    const double radius = v_stats(b, v_head).back() + (options.tail == Tail::mean ? std::sqrt(mean_norm) : 0.0);
    const auto mass = [&] {
      double m = 0.0;
      for (const int64_t i : chosen) m += r.weights[size_t(i)];
      return m;
    };
    if (options.max_error >= 0) {
      const auto enough = [&] {
        return int64_t(chosen.size()) == n ||
               (1.0 - mass()) * radius * (options.tail == Tail::renorm ? 2 : 1) <= options.max_error;
      };
      for (int64_t k = options.top_k; !enough() && k < std::min(n, 4 * options.top_k); ++k)
        chosen.insert(r.order[size_t(k)]);
      for (int64_t i = 0; !enough() && i < n; ++i) chosen.insert(i);
    }
    r.chosen.assign(chosen.begin(), chosen.end());
    const bool all_used = int64_t(r.chosen.size()) == n;
    r.kept = n == 0 ? 0.0 : all_used ? 1.0 : mass();
    r.out.assign(size_t(c.d_v), 0.0), r.dense = r.out;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t x = 0; x < c.d_v; ++x) {
        const double part = r.weights[size_t(i)] * v_at(b, v_head, seen.lo + i, x);
        r.dense[size_t(x)] += part;
        if (chosen.count(i)) r.out[size_t(x)] += part;
      }
    r.bound = n == 0 || all_used ? 0.0 : (1.0 - r.kept) * radius;
    if (n > 0 && !all_used) {
      double norm = 0.0;
      for (int64_t x = 0; x < c.d_v; ++x) {
        double& o = r.out[size_t(x)];
        if (options.tail == Tail::renorm) o /= r.kept;
        if (options.tail == Tail::mean) o += (1.0 - r.kept) * mean[size_t(x)];
        norm += o * o;
      }
      if (options.tail == Tail::renorm) r.bound = (1.0 - r.kept) * (radius + std::sqrt(norm));
    }
    return r;
  }
  int64_t q_offset(int64_t b, int64_t h, int64_t query) const {
    const TokenView& view = problem.q_view;
    return b * view.stride_batch + h * view.stride_head + query * view.stride_token;
  }

  // exact: scores have no rounding, so that sets must be equal. Else only scores within rounding may change places.
  void check(bool exact) {
    const AttentionCase& c = problem.c;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads.n_q; ++h)
        for (int64_t query = 0; query < c.s_q; ++query) check_row(b, h, query, exact);
    problem.check(problem.out, AttentionProblem<E>::kTolerance, "out");
  }
  void check_row(int64_t b, int64_t h, int64_t query, bool exact) {
    const AttentionCase& c = problem.c;
    const size_t at = size_t((b * c.heads.n_q + h) * c.s_q + query);
    const Row want = row(b, h, query);
    const KeyRange seen = keys(b, query);
    CAPTURE(b, h, query, seen.lo, seen.hi);
    for (int64_t x = 0; x < c.d_v; ++x) {
      const TokenView& view = problem.out_view;
      problem.out.wide[size_t(b * view.stride_batch + h * view.stride_head + query * view.stride_token + x)] =
          want.out[size_t(x)];
    }
    std::vector<int64_t> got(indices.begin() + int64_t(at) * options.top_k,
                             indices.begin() + int64_t(at + 1) * options.top_k);
    REQUIRE(std::count(got.begin() + int64_t(want.best.size()), got.end(), -1) ==
            options.top_k - int64_t(want.best.size()));
    got.resize(want.best.size());
    REQUIRE(std::is_sorted(got.begin(), got.end()));
    REQUIRE(std::set<int64_t>(got.begin(), got.end()).size() == got.size());
    double least_chosen = std::numeric_limits<double>::infinity(), best_left = -least_chosen;
    std::set<int64_t> mine;
    for (const int64_t t : got) {
      REQUIRE(t >= seen.lo);
      REQUIRE(t < seen.hi);
      mine.insert(t - seen.lo);
      least_chosen = std::min(least_chosen, want.scores[size_t(t - seen.lo)]);
    }
    for (int64_t i = 0; i < int64_t(want.scores.size()); ++i)
      if (!mine.count(i)) best_left = std::max(best_left, want.scores[size_t(i)]);
    REQUIRE(least_chosen >= best_left - (exact || std::isinf(best_left) ? 0.0 : 1e-4));
    if (exact)
      REQUIRE(std::equal(got.begin(), got.end(), want.best.begin(),
                         [&](int64_t x, int64_t y) { return x == y + seen.lo; }));
    if (exact || options.max_error < 0) REQUIRE(used[at] == int32_t(want.chosen.size()));
    if (std::isinf(want.lse)) {
      REQUIRE(problem.lse[at] == float(want.lse));
    } else {
      REQUIRE(std::abs(problem.lse[at] - want.lse) <= 2e-5 * std::max(1.0, std::abs(want.lse)));
    }
    REQUIRE(std::abs(kept[at] - want.kept) <= 2e-5);
    if (sp.want_bound)
      REQUIRE(std::abs(bound[at] - want.bound) <= 1e-3 * (1.0 + want.bound));
    else
      REQUIRE(std::isinf(bound[at]));
  }
};

// Small integers: every dot product is exact in every precision, and ties abound.
template <class E>
void round_scores(AttentionProblem<E>& problem) {
  for (auto* x : {&problem.q, &problem.k})
    for (size_t i = 0; i < x->e.size(); ++i)
      if (!std::isnan(x->wide[i])) x->set(int64_t(i), float(std::clamp(std::round(x->wide[i]), -2.0, 2.0)));
}

AttentionCase cache(HeadGroups heads, int64_t batch, int64_t s_q, int64_t s_k, int64_t d_k, int64_t d_v,
                    int64_t page_size = 0, bool padded = true, int64_t gap = 0) {
  AttentionCase c;
  c.heads = heads, c.batch = batch, c.s_q = s_q, c.s_k = s_k, c.d_k = d_k, c.d_v = d_v;
  c.causal = c.cached = true, c.page_size = page_size, c.padded = padded, c.gap = gap;
  return c;
}

template <class E>
void run_and_check(const AttentionCase& c, const Options& options, const DeviceFacts& facts = small_chunks(),
                   emulator::Schedule schedule = emulator::Schedule::shuffled) {
  std::string text;
  capture_text(c, text);
  CAPTURE(text, options.top_k, options.keep_first, options.keep_last, int(options.tail), options.v_stats);
  AttentionProblem<E> problem(c);
  round_scores(problem);
  Selection<E> selection(problem, options);
  selection.run(facts, schedule);
  selection.check(true);
}

constexpr Tail kTails[] = {Tail::drop, Tail::renorm, Tail::mean};

// One K head of one query whose scores are the steps given; q is 1 in the first dimension.
template <class Steps>
AttentionProblem<F32> with_scores(int64_t keys, Steps steps, bool padded = false) {
  AttentionProblem<F32> problem(cache({2, 1, 1}, 1, 1, keys, 8, 16, 0, padded));
  for (size_t i = 0; i < problem.q.e.size(); ++i) problem.q.set(int64_t(i), i % 8 == 0 ? 1.0f : 0.0f);
  for (int64_t t = 0; t < keys; ++t)
    if (!std::isnan(problem.k.wide[size_t(t * 8)])) problem.k.set(t * 8, steps(t));
  return problem;
}

}  // namespace

TEST_CASE("emulated selective_v_attention: any head map") {
  int turn = 0;
  for (const HeadGroups heads :
       {HeadGroups{32, 4, 16}, {32, 16, 4}, {12, 4, 6}, {12, 6, 4}, {8, 8, 8}, {8, 1, 1}, {8, 1, 8}, {5, 1, 5}}) {
    const Options options{.top_k = 20, .tail = kTails[turn % 3], .v_stats = turn % 2 == 0};
    const auto c = cache(heads, 3, 1 + turn % 2, 130, 32, 24, turn % 3 == 0 ? 32 : 0);
    if (turn % 3 == 0) run_and_check<F32>(c, options);
    if (turn % 3 == 1) run_and_check<F16>(c, options);
    if (turn % 3 == 2) run_and_check<BF16>(c, options);
    ++turn;
  }
}

TEST_CASE("emulated selective_v_attention: any dimensions, aligned or not") {
  for (const auto& [d_k, d_v] : {std::array<int64_t, 2>{64, 64},
                                 {32, 64},
                                 {128, 128},
                                 {64, 128},
                                 {40, 56},
                                 {8, 256},
                                 {256, 8},
                                 {128, 24},
                                 {72, 200}})
    for (const int64_t gap : {0, 8, 3}) {
      const Options options{.top_k = 9, .keep_last = 1, .tail = Tail::mean};
      const auto c = cache({4, 2, 1}, 1, 1, 70, d_k, d_v, 16, true, gap);
      gap == 8 ? run_and_check<F32>(c, options) : run_and_check<BF16>(c, options);
      if (gap == 3) run_and_check<F32>(c, options);
    }
}

TEST_CASE("emulated selective_v_attention: any length, more or fewer keys than top_k") {
  int turn = 0;
  for (const int64_t s_k : {1, 31, 33, 203, 600})
    for (const int64_t top_k : {1, 7, 100, 10000}) {
      const int64_t s_q = turn % 4 == 0 ? 3 : turn % 4 == 1 ? 40 : 1;
      const Options options{.top_k = top_k, .tail = kTails[turn % 3], .v_stats = turn % 2 == 0};
      const auto c = cache({2, 1, 2}, 3, s_q, s_k, 16, 16, turn % 3 == 0 ? 5 : 0);
      ++turn % 2 == 0 ? run_and_check<F16>(c, options) : run_and_check<F32>(c, options);
    }
}

TEST_CASE("emulated selective_v_attention: forced rows, which may overlap each other and the best") {
  for (const auto& [first, last] : {std::array<int64_t, 2>{3, 0}, {0, 3}, {5, 40}, {100, 100}, {1 << 30, 1}})
    for (const Tail tail : kTails) {
      const Options options{.top_k = 6, .keep_first = first, .keep_last = last, .tail = tail};
      run_and_check<BF16>(cache({4, 2, 4}, 2, 2, 600, 16, 16), options);
    }
}

TEST_CASE("emulated selective_v_attention: sorted, equal and huge scores") {
  const auto check = [](auto steps, double scale) {
    for (const int64_t top_k : {1, 50, 1400}) {
      auto problem = with_scores(3000, steps);
      Selection<F32> selection(problem, {.top_k = top_k, .scale = scale});
      for (const int32_t chunk : {512, 1024}) {
        selection.run(facts_for(selection.sp, chunk));
        CAPTURE(top_k, chunk, scale);
        selection.check(true);
      }
    }
  };
  for (const double scale : {1e-3, -1e-3}) {
    check([](int64_t) { return 1.0f; }, scale);
    check([](int64_t) { return 0.0f; }, scale);
    check([](int64_t t) { return t % 3 == 0 ? -0.0f : 0.0f; }, scale);
    check([](int64_t t) { return float(t); }, scale);
    check([](int64_t t) { return float(-t); }, scale);
    check([](int64_t t) { return float(t / 100); }, scale);
  }
  check([](int64_t t) { return t % 700 == 5 ? 3e38f : t % 2 == 0 ? -3e38f : float(t) * 1e-30f; }, 1e-36);
  check([](int64_t t) { return t % 900 == 0 ? 1.0f : 1.0f + float(t % 7) * 0x1p-23f; }, 1.0);
  for (const float size : {0x1p10f, 0x1p40f, 0x1p90f})
    for (const double scale : {0.7, -0.7}) check([=](int64_t t) { return float((t * 37) % 251) * size; }, scale);
}

TEST_CASE("emulated selective_v_attention: scores of -inf, and with nothing else") {
  const float inf = std::numeric_limits<float>::infinity();
  for (const int64_t top_k : {5, 100, 2000}) {
    auto some = with_scores(1500, [&](int64_t t) { return t % 40 == 7 ? 1.0f : -inf; });
    Selection<F32> selection(some, {.top_k = top_k});
    selection.run();
    CAPTURE(top_k);
    selection.check_row(0, 1, 0, true);
    auto none = with_scores(1500, [&](int64_t) { return -inf; });
    Selection<F32> empty(none, {.top_k = top_k});
    empty.run();
    for (int64_t i = 0; i < top_k; ++i) REQUIRE(empty.indices[size_t(i)] == (i < 1500 ? i : -1));
    REQUIRE(none.lse[0] == -inf);
    REQUIRE(none.out.e[3] == 0.0f);
    REQUIRE(empty.bound[0] == 0.0f);
    REQUIRE(empty.kept[0] == (top_k < 1500 ? 0.0f : 1.0f));
  }
}

TEST_CASE("emulated selective_v_attention: a NaN among its scores makes a row NaN, and no other") {
  for (const int64_t top_k : {10, 5000}) {
    AttentionProblem<BF16> problem(cache({8, 2, 4}, 1, 1, 1300, 16, 16, 32, false));
    round_scores(problem);
    const KvSlot slot = kv_page(problem.paging, 0, 1111);
    problem.k.set(kv_row(problem.k_view, 1, 0, slot) + 3, std::nanf(""));  // K head 1
    Selection<BF16> selection(problem, {.top_k = top_k, .keep_last = 2, .tail = Tail::mean});
    selection.run();
    for (int64_t h = 0; h < 4; ++h) selection.check_row(0, h, 0, true);
    for (int64_t h = 4; h < 8; ++h) {
      CAPTURE(top_k, h);
      const size_t row = size_t(h);
      REQUIRE(std::isnan(problem.lse[row]));
      for (int64_t x = 0; x < 16; ++x) REQUIRE(std::isnan(BF16::get(problem.out.e[row * 16 + size_t(x)])));
      REQUIRE(selection.used[row] == int32_t(std::min<int64_t>(top_k, 1300)));
      if (top_k == 10) REQUIRE(std::isnan(selection.kept[row]));
      if (top_k == 10) REQUIRE(std::isnan(selection.bound[row]));
      if (top_k > 10) REQUIRE(selection.kept[row] == 1.0f);
      for (int64_t i = 0; i < std::min<int64_t>(top_k, 1300); ++i)
        REQUIRE(selection.indices[row * size_t(top_k) + size_t(i)] == i);
    }
  }
}

TEST_CASE("emulated selective_v_attention: many keys, the same bits by any plan and schedule") {
  for (const int64_t top_k : {30, 1800}) {
    AttentionProblem<BF16> problem(cache({6, 1, 3}, 2, 2, 4500, 32, 24, top_k == 30 ? 64 : 0));
    round_scores(problem);
    Selection<BF16> selection(problem, {.top_k = top_k, .keep_first = 4, .keep_last = 600, .tail = Tail::mean});
    const DeviceFacts small = facts_for(selection.sp, 512);
    selection.run(small);
    selection.check(true);
    const std::vector<char> bits = selection.bits();
    const auto same = [&](const DeviceFacts& facts, emulator::Schedule schedule, int64_t workspace_bytes) {
      selection.run(facts, schedule, workspace_bytes);
      return selection.bits() == bits;
    };
    REQUIRE(same(facts_for(selection.sp, 2048), emulator::Schedule::reverse, kSelectiveVAttentionWorkspaceBytes));
    REQUIRE(selection.plan.chunks == 3);
    REQUIRE(same(little_shared(facts_for(selection.sp, 1024)), emulator::Schedule::shuffled,
                 kSelectiveVAttentionWorkspaceBytes));
    REQUIRE_FALSE(selection.plan.keys_in_shared);
    REQUIRE_FALSE(selection.plan.list_in_shared);
    if (top_k > 30) continue;
    REQUIRE(same(small, emulator::Schedule::reverse, 1));  // a query at a time
    REQUIRE(selection.plan.queries == 1);
    REQUIRE(selection.plan.entries == 1);
  }
}

TEST_CASE("emulated selective_v_attention: an entry does not depend on the others") {
  for (const int64_t page_size : {0, 16}) {
    AttentionProblem<F16> problem(cache({8, 2, 4}, 3, 2, 1100, 16, 16, page_size));
    Selection<F16> selection(problem, {.top_k = 25, .keep_last = 3, .tail = Tail::renorm});
    selection.run(facts_for(selection.sp, 1024));
    const std::vector<char> bits = selection.bits();
    const SelectiveVAttentionParams whole = selection.sp;
    std::fill(problem.lse.begin(), problem.lse.end(), -1.0f);
    std::fill(selection.indices.begin(), selection.indices.end(), -7);
    const auto out = problem.out.e;
    auto together = out;
    std::fill(together.begin(), together.end(), F16::put(std::numeric_limits<float>::quiet_NaN()));
    for (int64_t b = 0; b < 3; ++b) {
      SelectiveVAttentionParams& sp = selection.sp;
      AttentionParams& p = sp.attention;
      const int64_t rows = p.heads.n_q * p.s_q, tokens = page_size > 0 ? 0 : b;
      p.batch = 1;
      p.q.data = static_cast<uint16_t*>(p.q.data) + b * p.q.stride_batch;
      p.out.data = static_cast<uint16_t*>(p.out.data) + b * p.out.stride_batch;
      p.k.data = static_cast<uint16_t*>(p.k.data) + tokens * p.k.stride_page;
      p.v.data = static_cast<uint16_t*>(p.v.data) + tokens * p.v.stride_page;
      p.lse = static_cast<float*>(p.lse) + b * rows;
      p.kv_start += b, p.kv_end += b, p.length += b;
      if (page_size > 0) p.paging.block_table += b * p.paging.stride;
      sp.kept_mass += b * rows, sp.rows_used += b * rows, sp.error_bound += b * rows, sp.indices += b * rows * sp.top_k;
      selection.run(small_chunks(), emulator::Schedule::shuffled);
      for (size_t i = 0; i < together.size(); ++i)
        if (!std::isnan(F16::get(problem.out.e[i]))) together[i] = problem.out.e[i];
      sp = whole;
    }
    problem.out.e = together;
    REQUIRE(selection.bits() == bits);
  }
}

TEST_CASE("emulated selective_v_attention: scores with a rounding") {
  AttentionProblem<BF16> low(cache({8, 2, 4}, 2, 1, 1200, 64, 64, 16));
  Selection<BF16> selection(low, {.top_k = 60, .tail = Tail::mean});
  selection.run(facts_for(selection.sp, 1024));
  selection.check(false);
  AttentionProblem<F32> full(cache({4, 2, 2}, 2, 1, 700, 64, 64));
  Selection<F32> exact(full, {.top_k = 60, .tail = Tail::renorm});
  exact.run();
  exact.check(false);
}

TEST_CASE("emulated selective_v_attention: max_error is kept, by as few rows as it takes or by all of them") {
  for (const float max_error : {0.0f, 0.05f, 0.4f, 1.5f, 1e6f})
    for (const Tail tail : kTails)
      for (const bool v_stats : {false, true}) {
        AttentionProblem<F32> problem(cache({4, 2, 2}, 2, 2, 700, 16, 16, 32));
        round_scores(problem);
        Selection<F32> selection(
            problem,
            {.top_k = 40, .keep_first = 1, .tail = tail, .max_error = max_error, .v_stats = v_stats, .scale = 0.4});
        selection.run(facts_for(selection.sp, v_stats ? 512 : 1024));
        const AttentionCase& c = problem.c;
        for (int64_t b = 0; b < c.batch; ++b)
          for (int64_t h = 0; h < c.heads.n_q; ++h)
            for (int64_t query = 0; query < c.s_q; ++query) {
              const auto want = selection.row(b, h, query);
              const size_t at = size_t((b * c.heads.n_q + h) * c.s_q + query);
              const int64_t first = b * problem.out_view.stride_batch + h * problem.out_view.stride_head +
                                    query * problem.out_view.stride_token;
              double square = 0.0;
              for (int64_t x = 0; x < c.d_v; ++x)
                square += std::pow(problem.out.e[size_t(first + x)] - want.dense[size_t(x)], 2);
              CAPTURE(max_error, int(tail), v_stats, b, h, query, want.chosen.size(), selection.used[at]);
              REQUIRE(std::sqrt(square) <= selection.bound[at] + 2e-5);
              REQUIRE(selection.bound[at] <= max_error);
              // The allowance for rounding may take a row more, or tip over to all of them.
              const int64_t n = int64_t(want.scores.size()), used = selection.used[at];
              REQUIRE(used >= int64_t(want.chosen.size()));
              REQUIRE((used <= int64_t(want.chosen.size()) + 1 || (used == n && want.chosen.size() >= 159)));
              REQUIRE(selection.kept[at] >= want.kept - 2e-5);
              for (size_t i = 0; i < want.best.size(); ++i)
                REQUIRE(selection.indices[at * 40 + i] == want.best[i] + selection.keys(b, query).lo);
            }
      }
}

TEST_CASE(
    "emulated selective_v_attention: without a bound asked for, none is computed and V is read by its rows alone") {
  AttentionProblem<BF16> problem(cache({4, 1, 2}, 1, 1, 900, 16, 16));
  round_scores(problem);
  Selection<BF16> selection(problem, {.top_k = 12, .bound = false});
  const auto r = selection.row(0, 0, 0), s = selection.row(0, 1, 0);
  std::set<int64_t> read(r.chosen.begin(), r.chosen.end());
  read.insert(s.chosen.begin(), s.chosen.end());
  const auto wide = problem.v.wide;
  for (int64_t t = 0; t < problem.end[0]; ++t)  // poison of V head 0, which the q heads 0 and 1 read
    for (int64_t x = 0; x < 16 && !read.count(t); ++x)
      problem.v.set(kv_row(problem.v_view, 0, 0, kv_page(problem.paging, 0, t)) + x, std::nanf(""));
  selection.run();
  REQUIRE(selection.plan.parts == 0);
  problem.v.wide = wide;
  selection.check(true);
  std::fill(selection.indices.begin(), selection.indices.end(), -7);
  selection.sp.indices = nullptr;
  selection.run();
  REQUIRE(std::count(selection.indices.begin(), selection.indices.end(), -7) == 4 * 12);
}

TEST_CASE("emulated selective_v_attention: offsets beyond 2^31 elements") {
  for (const Apart apart : {Apart::rows, Apart::blocks})
    for (const bool v_stats : {false, true}) {
      AttentionProblem<BF16> problem(cache({8, 2, 4}, 2, 2, 300, 16, 16, 32));
      round_scores(problem);
      Selection<BF16> selection(problem, {.top_k = 20, .keep_last = 3, .tail = Tail::mean, .v_stats = v_stats});
      Far far(apart);
      far.move(selection.sp.attention, problem);
      selection.run();
      far.bring_back();
      selection.check(true);
    }
}
