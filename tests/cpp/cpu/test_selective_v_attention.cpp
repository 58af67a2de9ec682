// selective_v_attention against a full sort, without torch: sets, ties, forced rows, chunks, and the guarantee.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/selective_v_attention.h"
#include "support/catch.h"
#include "support/on_threads.h"

using namespace diffqkv;

namespace {

constexpr int64_t kDim = 16;
const HeadGroups kHeads{6, 1, 3};

// One sequence of `keys` keys. Elements are small integers: dot products are exact, and many tie.
struct Sequence {
  int64_t keys, s_q;
  std::vector<float> q, k, v, out, lse, kept, bound;
  std::vector<int64_t> indices;
  std::vector<int32_t> used;
  SelectiveVAttentionParams params;

  Sequence(int64_t n, int64_t queries, int64_t top_k) : keys(n), s_q(queries) {
    std::mt19937 random(7);
    const auto fill = [&](std::vector<float>& x, int64_t size) {
      x.resize(size);
      for (float& value : x) value = float(int(random() % 5) - 2);
    };
    fill(q, kHeads.n_q * s_q * kDim);
    fill(k, kHeads.n_k * keys * kDim);
    fill(v, kHeads.n_v * keys * kDim);
    const int64_t rows = kHeads.n_q * s_q;
    out.assign(rows * kDim, std::numeric_limits<float>::quiet_NaN());
    lse.resize(rows), kept.resize(rows), bound.resize(rows), used.resize(rows);
    indices.assign(rows * top_k, -7);
    AttentionParams& p = params.attention;
    p.heads = kHeads;
    p.batch = 1, p.s_q = s_q, p.s_k = keys, p.d_k = kDim, p.d_v = kDim;
    p.q = {q.data(), 0, s_q * kDim, kDim};
    p.out = {out.data(), 0, s_q * kDim, kDim};
    p.k = {.data = k.data(), .stride_head = keys * kDim, .stride_token = kDim};
    p.v = {.data = v.data(), .stride_head = keys * kDim, .stride_token = kDim};
    p.lse = lse.data();
    p.paging.page_size = keys;
    p.softmax_scale = 0.25f;
    p.window_right = 0;
    params.top_k = params.indices_per_row = top_k;
    params.want_bound = true;
    params.kept_mass = kept.data(), params.indices = indices.data();
    params.rows_used = used.data(), params.error_bound = bound.data();
  }

  void run(int64_t threads) {
    const SelectiveVAttentionPlan plan = plan_selective_v_attention(params, keys, threads);
    std::vector<char> workspace(cpu::selective_v_attention_workspace(params, plan));
    cpu::selective_v_attention(params, plan, workspace.data(), on_threads);
  }

  std::vector<double> scores(int64_t row) const {
    const int64_t visible = keys - s_q + row % s_q + 1;
    std::vector<double> s(visible, 0.0);
    for (int64_t t = 0; t < visible; ++t)
      for (int64_t x = 0; x < kDim; ++x) s[t] += double(q[row * kDim + x]) * k[t * kDim + x];
    return s;
  }
  std::vector<int64_t> best(const std::vector<double>& s, int64_t count) const {
    std::vector<int64_t> order(s.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return s[a] > s[b]; });
    order.resize(std::min<int64_t>(count, order.size()));
    std::sort(order.begin(), order.end());
    return order;
  }
  // Sum of the chosen rows of V, weighted by the softmax over all scores.
  std::vector<double> weighted(int64_t row, const std::vector<double>& s, const std::vector<int64_t>& chosen) const {
    double all = 0;
    for (const double x : s) all += std::exp(0.25 * x);
    std::vector<double> sum(kDim, 0.0);
    const int64_t head = kHeads.v_head(row / s_q);
    for (const int64_t t : chosen)
      for (int64_t x = 0; x < kDim; ++x) sum[x] += std::exp(0.25 * s[t]) / all * v[(head * keys + t) * kDim + x];
    return sum;
  }
};

}  // namespace

TEST_CASE("selective_v_attention chooses what a stable sort chooses, and sums it") {
  const int64_t keys = GENERATE(1, 37, 300, 2100, 6000), top_k = GENERATE(1, 40, 1500);
  for (const int64_t threads : {1, 3})
    for (const int64_t s_q : {1, 3}) {
      if (s_q > keys) continue;
      Sequence sequence(keys, s_q, top_k);
      sequence.params.keep_first = 2, sequence.params.keep_last = 9;
      sequence.run(threads);
      CAPTURE(keys, top_k, threads, s_q);
      for (int64_t row = 0; row < kHeads.n_q * s_q; ++row) {
        const std::vector<double> s = sequence.scores(row);
        const std::vector<int64_t> best = sequence.best(s, top_k);
        std::vector<int64_t> got(sequence.indices.begin() + row * top_k, sequence.indices.begin() + (row + 1) * top_k);
        REQUIRE(std::count(got.begin() + best.size(), got.end(), -1) == top_k - int64_t(best.size()));
        got.resize(best.size());
        REQUIRE(got == best);

        std::vector<int64_t> chosen = best;
        for (int64_t t = 0; t < int64_t(s.size()); ++t)
          if ((t < 2 || t >= int64_t(s.size()) - 9) && !std::binary_search(best.begin(), best.end(), t))
            chosen.push_back(t);
        if (top_k >= keys) chosen = sequence.best(s, keys);
        REQUIRE(sequence.used[row] == int64_t(chosen.size()));
        const std::vector<double> want = sequence.weighted(row, s, chosen);
        for (int64_t x = 0; x < kDim; ++x)
          REQUIRE(sequence.out[row * kDim + x] == Approx(want[x]).margin(1e-5).epsilon(1e-5));
      }
    }
}

TEST_CASE("tail mean stands for the rows that a query sees, and no indices are written that nobody asked for") {
  const int64_t s_q = GENERATE(1, 4, 40), keys = GENERATE(90, 1100);
  const bool given = GENERATE(false, true);
  Sequence sequence(keys, s_q, 12);
  for (int64_t t = keys - s_q; t < keys; ++t)  // a mean that takes in later rows is far off
    for (int64_t head = 0; head < kHeads.n_v; ++head)
      for (int64_t x = 0; x < kDim; ++x) sequence.v[(head * keys + t) * kDim + x] += 100.0f * float(t - keys + 2);
  std::vector<float> stats(kHeads.n_v * (kDim + 1), 0.0f);
  for (int64_t head = 0; head < kHeads.n_v; ++head) {
    float* of_head = stats.data() + head * (kDim + 1);
    for (int64_t t = 0; t < keys; ++t) {
      double square = 0;
      for (int64_t x = 0; x < kDim; ++x) {
        const float value = sequence.v[(head * keys + t) * kDim + x];
        of_head[x] += value, square += double(value) * value;
      }
      of_head[kDim] = std::max(of_head[kDim], float(std::sqrt(square)));
    }
  }
  if (given) sequence.params.v_stats = stats.data();
  sequence.params.tail = Tail::mean;
  sequence.params.indices = nullptr;
  sequence.run(2);
  CAPTURE(s_q, keys, given);
  REQUIRE(std::count(sequence.indices.begin(), sequence.indices.end(), -7) == int64_t(sequence.indices.size()));
  for (int64_t row = 0; row < kHeads.n_q * s_q; ++row) {
    const std::vector<double> s = sequence.scores(row);
    const std::vector<int64_t> chosen = sequence.best(s, 12);
    std::vector<double> want = sequence.weighted(row, s, chosen);
    const std::vector<double> dense = sequence.weighted(row, s, sequence.best(s, keys));
    const int64_t head = kHeads.v_head(row / s_q), seen = int64_t(s.size());
    double all = 0, kept = 0, distance = 0;
    for (const double x : s) all += std::exp(0.25 * x);
    for (const int64_t t : chosen) kept += std::exp(0.25 * s[t]) / all;
    for (int64_t x = 0; x < kDim; ++x) {
      double mean = 0;
      for (int64_t t = 0; t < seen; ++t) mean += sequence.v[(head * keys + t) * kDim + x] / double(seen);
      want[x] += (1.0 - kept) * mean;
      CAPTURE(row, x);
      REQUIRE(sequence.out[row * kDim + x] == Approx(want[x]).margin(1e-3).epsilon(1e-4));
      distance += std::pow(sequence.out[row * kDim + x] - dense[x], 2);
    }
    REQUIRE(std::sqrt(distance) <= sequence.bound[row] + 1e-3);
  }
}

TEST_CASE("max_error is kept, by more rows or by all of them") {
  const int64_t keys = GENERATE(90, 3000);
  for (const float max_error : {1e-4f, 0.3f, 5.0f, 1e6f}) {
    Sequence sequence(keys, 2, 30);
    sequence.params.max_error = max_error;
    sequence.run(2);
    CAPTURE(keys, max_error);
    for (int64_t row = 0; row < kHeads.n_q * 2; ++row) {
      const std::vector<double> s = sequence.scores(row);
      const std::vector<double> dense = sequence.weighted(row, s, sequence.best(s, keys));
      double square = 0;
      for (int64_t x = 0; x < kDim; ++x) square += std::pow(sequence.out[row * kDim + x] - dense[x], 2);
      REQUIRE(std::sqrt(square) <= max_error + 1e-5);
      REQUIRE(sequence.bound[row] <= max_error);
      REQUIRE(sequence.used[row] >= 30);
      if (max_error == 1e6f) REQUIRE(sequence.used[row] == 30);
      if (max_error == 1e-4f && keys == 3000) REQUIRE(sequence.used[row] == int64_t(s.size()));
    }
  }
}
