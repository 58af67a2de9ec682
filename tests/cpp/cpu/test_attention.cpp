// The CPU attention kernels against a textbook computation in double, without torch.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu/attention.h"
#include "cpu/selective_v_attention.h"
#include "params/key_range.h"
#include "params/layout.h"
#include "support/catch.h"
#include "support/dense_views.h"
#include "support/kv_element.h"
#include "support/on_threads.h"

using namespace diffqkv;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Case {
  HeadGroups heads;
  int64_t batch, s_q, s_k, d_k, d_v;
  bool causal;
};

// fp32 tensors of a case, K and V as [batch, heads, tokens, dim].
struct Problem {
  Case shape;
  std::vector<float> q, k, v, out, lse;
  std::vector<int32_t> start, end;

  explicit Problem(const Case& c) : shape(c) {
    std::mt19937 random(1234);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int64_t n) {
      x.resize(n);
      for (float& value : x) value = normal(random);
    };
    fill(q, c.batch * c.heads.n_q * c.s_q * c.d_k);
    fill(k, c.batch * c.heads.n_k * c.s_k * c.d_k);
    fill(v, c.batch * c.heads.n_v * c.s_k * c.d_v);
    out.assign(c.batch * c.heads.n_q * c.s_q * c.d_v, kNan);
    lse.assign(c.batch * c.heads.n_q * c.s_q, kNan);
    for (int64_t b = 0; b < c.batch; ++b) {
      start.push_back(int32_t(std::min<int64_t>(b * 3, c.s_k)));
      end.push_back(int32_t(std::max<int64_t>(0, c.s_k - b * 5)));
    }
  }

  AttentionParams params() {
    const Case& c = shape;
    AttentionParams p;
    p.heads = c.heads;
    p.batch = c.batch, p.s_q = c.s_q, p.s_k = c.s_k, p.d_k = c.d_k, p.d_v = c.d_v;
    p.q = dense_rows(q, c.heads.n_q, c.s_q, c.d_k);
    p.out = dense_rows(out, c.heads.n_q, c.s_q, c.d_v);
    p.k = dense_keys(k, c.heads.n_k, c.heads.k_per_group(), c.s_k, c.d_k);
    p.v = dense_keys(v, c.heads.n_v, c.heads.v_per_group(), c.s_k, c.d_v);
    p.lse = lse.data();
    p.kv_start = start.data(), p.kv_end = end.data();
    p.paging.page_size = c.s_k;
    p.softmax_scale = 1.0 / std::sqrt(double(c.d_k));
    p.window_right = c.causal ? 0 : -1;
    return p;
  }

  // Compares out and lse with the definition.
  void check() const {
    const Case& c = shape;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads.n_q; ++h)
        for (int64_t i = 0; i < c.s_q; ++i) {
          const float* query = &q[((b * c.heads.n_q + h) * c.s_q + i) * c.d_k];
          const float* keys = &k[(b * c.heads.n_k + c.heads.k_head(h)) * c.s_k * c.d_k];
          const float* values = &v[(b * c.heads.n_v + c.heads.v_head(h)) * c.s_k * c.d_v];
          std::vector<double> score(c.s_k, -kInfinity), wanted(c.d_v, 0.0);
          double sum = 0.0;
          for (int64_t j = start[b]; j < end[b]; ++j) {
            if (c.causal && j > i + c.s_k - c.s_q) continue;
            score[j] = 0.0;
            for (int64_t x = 0; x < c.d_k; ++x) score[j] += double(query[x]) * keys[j * c.d_k + x];
            score[j] /= std::sqrt(double(c.d_k));
            sum += std::exp(score[j]);
          }
          for (int64_t j = 0; j < c.s_k; ++j)
            if (score[j] > -kInfinity)
              for (int64_t x = 0; x < c.d_v; ++x) wanted[x] += std::exp(score[j]) / sum * values[j * c.d_v + x];
          const int64_t row = (b * c.heads.n_q + h) * c.s_q + i;
          CAPTURE(b, h, i);
          if (sum == 0.0)
            REQUIRE(lse[row] == -std::numeric_limits<float>::infinity());
          else
            REQUIRE(std::abs(lse[row] - std::log(sum)) < 1e-5);
          for (int64_t x = 0; x < c.d_v; ++x) REQUIRE(std::abs(out[row * c.d_v + x] - wanted[x]) < 5e-6);
        }
  }
};

void run(const AttentionParams& p, int64_t threads) {
  AttentionPlan plan = plan_attention(p, p.s_k, threads);
  plan.threads = threads;  // also where the planner would not start a second one
  std::vector<char> workspace(cpu::attention_workspace(plan));
  cpu::attention(p, plan, workspace.data(), on_threads);
}

const Case kCases[] = {
    {{32, 4, 16}, 1, 1, 1200, 64, 64, true}, {{32, 4, 16}, 2, 130, 130, 64, 64, true},
    {{12, 4, 6}, 2, 3, 70, 40, 56, true},    {{12, 6, 4}, 2, 40, 77, 32, 64, false},
    {{5, 1, 5}, 3, 17, 9, 8, 256, true},     {{8, 8, 1}, 1, 2, 33, 128, 24, true},
    {{2, 1, 1}, 1, 25, 600, 64, 128, true},  {{4, 2, 4}, 2, 20, 0, 16, 16, false},
};

}  // namespace

TEST_CASE("attention equals its definition, on one thread and on three to the last bit") {
  for (const Case& c : kCases) {
    CAPTURE(c.heads.n_q, c.heads.n_k, c.heads.n_v, c.batch, c.s_q, c.s_k, c.d_k, c.d_v, c.causal);
    Problem problem(c);
    run(problem.params(), 1);
    problem.check();
    const std::vector<float> alone = problem.out;
    problem.out.assign(problem.out.size(), kNan);
    run(problem.params(), 3);
    REQUIRE(problem.out == alone);
  }
}

TEST_CASE("pages of panels, shuffled, with poison in unused slots give the same result") {
  constexpr int64_t kPage = 64;
  for (const Case& c : kCases) {
    if (c.s_k == 0) continue;
    CAPTURE(c.heads.n_q, c.heads.n_k, c.heads.n_v, c.s_q, c.s_k);
    Problem problem(c);
    const int64_t blocks = (c.s_k + kPage - 1) / kPage, pages = blocks * c.batch;
    std::vector<float> k(pages * c.heads.n_k * kPage * c.d_k, kNan), v(pages * c.heads.n_v * kPage * c.d_v, kNan);
    std::vector<int32_t> table(pages);
    for (int64_t i = 0; i < pages; ++i) table[i] = int32_t((i * 7 + 3) % pages);
    // A multiple of 7 would not be a permutation.
    if (pages % 7 == 0)
      for (int64_t i = 0; i < pages; ++i) table[i] = int32_t(pages - 1 - i);

    AttentionParams p = problem.params();
    p.s_k = blocks * kPage;
    const std::vector<int32_t> length(c.batch, int32_t(c.s_k));
    p.length = length.data();
    p.paging = {table.data(), blocks, kPage};
    p.k = {.data = k.data(),
           .stride_page = c.heads.n_k * kPage * c.d_k,
           .stride_group = c.heads.k_per_group() * kPage * c.d_k,
           .stride_head = kPage * c.d_k,
           .stride_panel = kPanelTokens * c.d_k,
           .layout = KLayout::panels};
    p.v = {.data = v.data(),
           .stride_page = c.heads.n_v * kPage * c.d_v,
           .stride_group = c.heads.v_per_group() * kPage * c.d_v,
           .stride_head = kPage * c.d_v,
           .stride_token = c.d_v};
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t t = problem.start[b]; t < problem.end[b]; ++t) {
        const KvSlot slot = kv_page(p.paging, b, t);
        for (int64_t h = 0; h < c.heads.n_k; ++h)
          for (int64_t x = 0; x < c.d_k; ++x)
            k[kv_element(p.k, h / c.heads.k_per_group(), h % c.heads.k_per_group(), slot, x)] =
                problem.k[((b * c.heads.n_k + h) * c.s_k + t) * c.d_k + x];
        for (int64_t h = 0; h < c.heads.n_v; ++h)
          for (int64_t x = 0; x < c.d_v; ++x)
            v[kv_element(p.v, h / c.heads.v_per_group(), h % c.heads.v_per_group(), slot, x)] =
                problem.v[((b * c.heads.n_v + h) * c.s_k + t) * c.d_v + x];
      }
    run(p, 2);
    problem.check();
  }
}

TEST_CASE("ranges of keys lie within the keys and never run backwards") {
  AttentionParams p;
  p.s_q = 4, p.s_k = 9;
  for (const int32_t start : {INT32_MIN, -1, 0, 5, 9, 10, INT32_MAX})
    for (const int32_t end : {INT32_MIN, -1, 0, 5, 9, 10, INT32_MAX})
      for (const int64_t window : {-1, 0, 2, 1000}) {
        p.kv_start = &start, p.kv_end = &end;
        p.window_left = window, p.window_right = (window + 1) / 2;
        const Entry entry = entry_of(p, 0);
        CAPTURE(start, end, window);
        REQUIRE((0 <= entry.keys.lo && entry.keys.lo <= entry.keys.hi && entry.keys.hi <= p.s_k));
        REQUIRE(entry.keys.hi - entry.keys.lo == std::max<int64_t>(0, std::min<int64_t>(end, 9) - std::max(start, 0)));
        KeyRange last = {0, 0};
        for (int64_t i = 0; i < p.s_q; ++i) {
          const KeyRange keys = keys_of_query(p, entry, i);
          REQUIRE((entry.keys.lo <= keys.lo && keys.lo <= keys.hi && keys.hi <= entry.keys.hi));
          REQUIRE((last.lo <= keys.lo && last.hi <= keys.hi));
          last = keys;
        }
      }
  REQUIRE(KeyRange{37, 40}.first_tile(32) == 32);
  REQUIRE(KeyRange{37, 37}.first_tile(32) == 37);
}

TEST_CASE("entries without keys read nothing, wherever they end, and get zeros") {
  // Neither K nor V nor a table of blocks is there to be read.
  for (const int64_t s_q : {1, 17, 130})
    for (const bool panels : {false, true})
      for (const bool sinks : {false, true}) {
        const HeadGroups heads{4, 1, 2};
        const std::vector<int32_t> start{5, 64, 0, 41, INT32_MAX}, length{5, 64, 0, 40, 33};
        const int64_t batch = int64_t(start.size()), rows = batch * heads.n_q * s_q;
        std::vector<float> q(rows * 8, 1.0f), out(rows * 8, kNan), lse(rows, kNan), sink(heads.n_q, 2.0f);
        std::vector<float> kept(rows), bound(rows);
        std::vector<int64_t> indices(rows * 3);
        std::vector<int32_t> used(rows), table(batch * 2, INT32_MAX);
        SelectiveVAttentionParams sp;
        AttentionParams& p = sp.attention;
        p.heads = heads;
        p.batch = batch, p.s_q = s_q, p.s_k = 64, p.d_k = 8, p.d_v = 8;
        p.q = dense_rows(q, heads.n_q, s_q, 8), p.out = dense_rows(out, heads.n_q, s_q, 8);
        if (panels) p.k.layout = KLayout::panels;
        p.k.stride_page = p.v.stride_page = 1 << 20;
        p.lse = lse.data();
        p.kv_start = start.data(), p.kv_end = p.length = length.data();
        p.paging = {table.data(), 2, 32};
        p.window_right = 0;
        p.sinks = sinks ? sink.data() : nullptr;
        const auto check = [&](float nothing) {
          CAPTURE(s_q, panels, sinks);
          for (const float x : out) REQUIRE(x == 0.0f);
          for (const float x : lse) REQUIRE(x == nothing);
        };
        run(p, 2);
        check(sinks ? 2.0f : -std::numeric_limits<float>::infinity());
        if (sinks) continue;  // of which selective V has none
        out.assign(out.size(), kNan), lse.assign(lse.size(), kNan);
        sp.top_k = sp.indices_per_row = 3, sp.keep_first = sp.keep_last = 2, sp.tail = Tail::mean, sp.want_bound = true;
        sp.kept_mass = kept.data(), sp.indices = indices.data();
        sp.rows_used = used.data(), sp.error_bound = bound.data();
        const SelectiveVAttentionPlan plan = plan_selective_v_attention(sp, p.s_k, 2);
        std::vector<char> workspace(cpu::selective_v_attention_workspace(sp, plan));
        cpu::selective_v_attention(sp, plan, workspace.data(), on_threads);
        check(-std::numeric_limits<float>::infinity());
        for (const int64_t index : indices) REQUIRE(index == -1);
        for (int64_t row = 0; row < rows; ++row) REQUIRE((kept[row] == 0.0f && used[row] == 0));
      }
}

TEST_CASE("of huge scores two that are equal share the weight, tiles and splits apart") {
  // Scores are size for keys 5 and 1000, and half of it for the others.
  for (const float size : {1e3f, 1e5f, 1e8f, 1e10f, 1e30f})
    for (const int64_t s_q : {1, 20, 130})
      for (const double softcap : {0.0, 1e7}) {
        const Case c{{2, 1, 2}, 1, s_q, 1200, 8, 8, false};
        Problem problem(c);
        for (size_t i = 0; i < problem.q.size(); ++i) problem.q[i] = 1.0f + float(i / 8 % 7) / 3.0f;
        for (size_t i = 0; i < problem.k.size(); ++i)
          problem.k[i] = (i / 8 == 5 || i / 8 == 1000 ? 1.0f : 0.5f) * (1.0f + float(i % 8) / 7.0f) * size;
        AttentionParams p = problem.params();
        p.softcap = softcap;
        run(p, 2);
        for (int64_t row = 0; row < 2 * s_q; ++row) {
          double score = 0.0;
          for (int64_t x = 0; x < 8; ++x) score += double(problem.q[row * 8 + x]) * problem.k[5 * 8 + x];
          score *= p.softmax_scale;
          // Where the cap makes all alike there is nothing to tell here.
          if (softcap > 0) score = softcap * std::tanh(score / softcap);
          if (softcap > 0 && size > 1e6f) break;
          CAPTURE(size, s_q, softcap, row);
          const double want = score + std::log(2.0);
          REQUIRE(std::abs(problem.lse[row] - want) < 4e-7 * want);
          for (int64_t x = 0; x < 8; ++x) {
            const float* v = &problem.v[row / s_q * 1200 * 8];
            REQUIRE(problem.out[row * 8 + x] == Approx((v[5 * 8 + x] + v[1000 * 8 + x]) / 2).margin(1e-6));
          }
        }
      }
}

TEST_CASE("top_k below the length keeps the best rows; ties go to the lower index") {
  // One head, scores 3, 1, 3, 2, 3: the two best are keys 0 and 2.
  std::vector<float> q(8, 0.0f), k(5 * 8, 0.0f), v(5 * 8, 0.0f), out(8), lse(1), kept(1), bound(1);
  std::vector<int64_t> indices(2);
  std::vector<int32_t> used(1);
  q[0] = 1.0f;
  const float score[] = {3, 1, 3, 2, 3};
  for (int j = 0; j < 5; ++j) k[j * 8] = score[j], v[j * 8 + j] = 1.0f;

  SelectiveVAttentionParams sp;
  AttentionParams& p = sp.attention;
  p.heads = {1, 1, 1};
  p.batch = 1, p.s_q = 1, p.s_k = 5, p.d_k = 8, p.d_v = 8;
  p.q = {q.data(), 8, 8, 8};
  p.out = {out.data(), 8, 8, 8};
  p.k = {.data = k.data(), .stride_page = 40, .stride_group = 40, .stride_head = 40, .stride_token = 8};
  p.v = {.data = v.data(), .stride_page = 40, .stride_group = 40, .stride_head = 40, .stride_token = 8};
  p.lse = lse.data();
  p.paging.page_size = 5;
  p.softmax_scale = 1.0f;
  p.window_right = 0;
  sp.top_k = sp.indices_per_row = 2;
  sp.want_bound = true;
  sp.kept_mass = kept.data(), sp.indices = indices.data(), sp.rows_used = used.data(), sp.error_bound = bound.data();
  const SelectiveVAttentionPlan plan = plan_selective_v_attention(sp, 5, 1);
  std::vector<char> workspace(cpu::selective_v_attention_workspace(sp, plan));
  cpu::selective_v_attention(sp, plan, workspace.data(), on_threads);

  const double all = 3 * std::exp(3.0) + std::exp(2.0) + std::exp(1.0), best = std::exp(3.0) / all;
  REQUIRE(indices == std::vector<int64_t>{0, 2});
  REQUIRE(used[0] == 2);
  REQUIRE(lse[0] == Approx(std::log(all)));
  REQUIRE(kept[0] == Approx(2 * best));
  REQUIRE(out[0] == Approx(best));
  REQUIRE(out[2] == Approx(best));
  REQUIRE(out[4] == 0.0f);
  REQUIRE(bound[0] == Approx(1 - 2 * best).epsilon(1e-5));  // every V row has norm 1
}
