// The gradients of attention against a textbook computation in double, without torch; and the random numbers of
// dropout.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu/attention.h"
#include "cpu/flash_attention_backward.h"
#include "cpu/kernels/dropout.h"
#include "support/catch.h"
#include "support/dense_views.h"
#include "support/on_threads.h"

using namespace diffqkv;

namespace {

struct Case {
  HeadGroups heads;
  int64_t batch, s_q, s_k, d_k, d_v;
  int64_t left = -1, right = -1;
  double softcap = 0.0, dropout_p = 0.0;
  bool sinks = false;
};

using Numbers = std::vector<float>;

struct Problem {
  Case c;
  Numbers q, k, v, out, lse, sinks, dout, dlse, dq, dk, dv, dsinks;
  const int32_t *start = nullptr, *end = nullptr;

  explicit Problem(const Case& shape) : c(shape) {
    std::mt19937 random(99);
    std::normal_distribution<float> normal;
    const auto fill = [&](Numbers& x, int64_t n) {
      x.resize(n);
      for (float& value : x) value = normal(random);
    };
    const int64_t rows = c.batch * c.heads.n_q * c.s_q;
    fill(q, rows * c.d_k);
    fill(k, c.batch * c.heads.n_k * c.s_k * c.d_k);
    fill(v, c.batch * c.heads.n_v * c.s_k * c.d_v);
    fill(dout, rows * c.d_v);
    fill(dlse, rows);
    if (c.sinks) fill(sinks, c.heads.n_q);
    out.resize(rows * c.d_v), lse.resize(rows), dsinks.resize(sinks.size());
  }

  AttentionParams params() {
    AttentionParams p;
    p.heads = c.heads;
    p.batch = c.batch, p.s_q = c.s_q, p.s_k = c.s_k, p.d_k = c.d_k, p.d_v = c.d_v;
    p.q = dense_rows(q, c.heads.n_q, c.s_q, c.d_k);
    p.out = dense_rows(out, c.heads.n_q, c.s_q, c.d_v);
    p.k = dense_keys(k, c.heads.n_k, c.heads.k_per_group(), c.s_k, c.d_k);
    p.v = dense_keys(v, c.heads.n_v, c.heads.v_per_group(), c.s_k, c.d_v);
    p.lse = lse.data();
    p.kv_start = start, p.kv_end = end;
    p.paging.page_size = c.s_k;
    p.softmax_scale = 0.3;
    p.softcap = c.softcap;
    p.window_left = c.left, p.window_right = c.right;
    p.sinks = c.sinks ? sinks.data() : nullptr;
    p.dropout.threshold = uint32_t(c.dropout_p * 65536);
    p.dropout.seed = 0x123456789abcdefull;
    return p;
  }

  void run(int64_t threads) {
    const auto poison = [](Numbers& x, size_t n) { x.assign(n, std::numeric_limits<float>::quiet_NaN()); };
    poison(dq, q.size()), poison(dk, k.size()), poison(dv, v.size());
    FlashAttentionBackwardParams bp;
    bp.forward = params();
    AttentionPlan plan = plan_attention(bp.forward, c.s_k, threads);
    plan.threads = threads;
    std::vector<char> workspace(cpu::attention_workspace(plan));
    cpu::attention(bp.forward, plan, workspace.data(), on_threads);

    bp.dout = dense_rows(dout, c.heads.n_q, c.s_q, c.d_v);
    bp.dlse = dlse.data();
    bp.dq = dense_rows(dq, c.heads.n_q, c.s_q, c.d_k);
    bp.dk = dense_rows(dk, c.heads.n_k, c.s_k, c.d_k);
    bp.dv = dense_rows(dv, c.heads.n_v, c.s_k, c.d_v);
    bp.dsinks = c.sinks ? dsinks.data() : nullptr;
    FlashAttentionBackwardPlan backward = plan_flash_attention_backward(bp.forward, threads);
    backward.threads = threads;  // also where the planner would not start a second one
    workspace.assign(cpu::flash_attention_backward_workspace(bp, backward), char(0xff));
    cpu::flash_attention_backward(bp, backward, workspace.data(), on_threads);
  }

  // Compares all gradients with the definition.
  void check() {
    std::vector<double> wanted_q(q.size()), wanted_k(k.size()), wanted_v(v.size()), wanted_sinks(sinks.size());
    const Dropout dropout = params().dropout;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads.n_q; ++h)
        for (int64_t i = 0; i < c.s_q; ++i) {
          const int64_t row = (b * c.heads.n_q + h) * c.s_q + i;
          const int64_t k0 = (b * c.heads.n_k + c.heads.k_head(h)) * c.s_k * c.d_k;
          const int64_t v0 = (b * c.heads.n_v + c.heads.v_head(h)) * c.s_k * c.d_v;
          std::vector<double> p(c.s_k, 0.0), slope(c.s_k), dp(c.s_k, 0.0), kept(c.s_k, 1.0);
          double sum = c.sinks ? std::exp(double(sinks[h])) : 0.0, mean = 0.0;
          for (int64_t j = 0; j < c.s_k; ++j) {
            const int64_t from_query = j - (i + c.s_k - c.s_q);
            if ((c.left >= 0 && from_query < -c.left) || (c.right >= 0 && from_query > c.right)) continue;
            double s = 0.0;
            for (int64_t x = 0; x < c.d_k; ++x) s += double(q[row * c.d_k + x]) * k[k0 + j * c.d_k + x];
            s *= 0.3, slope[j] = 0.3;
            if (c.softcap > 0) {
              const double t = std::tanh(s / c.softcap);
              s = c.softcap * t, slope[j] *= 1.0 - t * t;
            }
            p[j] = std::exp(s), sum += p[j];
            if (dropout.threshold > 0) {
              uint16_t bits[kDraws * kKeysPerDraw];
              draw_bits(dropout, b * c.heads.n_q + h, i, j, j + 1, bits);
              kept[j] = bits[j % kKeysPerDraw] < dropout.threshold ? 0.0 : dropout.keep_scale();
            }
            for (int64_t x = 0; x < c.d_v; ++x)
              dp[j] += kept[j] * double(dout[row * c.d_v + x]) * v[v0 + j * c.d_v + x];
          }
          if (sum == 0.0) continue;
          for (int64_t j = 0; j < c.s_k; ++j) p[j] /= sum, mean += p[j] * dp[j];
          if (c.sinks) wanted_sinks[h] += std::exp(double(sinks[h])) / sum * (dlse[row] - mean);
          for (int64_t j = 0; j < c.s_k; ++j) {
            const double ds = p[j] == 0.0 ? 0.0 : p[j] * (dp[j] - mean + dlse[row]) * slope[j];
            for (int64_t x = 0; x < c.d_k; ++x) {
              wanted_q[row * c.d_k + x] += ds * k[k0 + j * c.d_k + x];
              wanted_k[k0 + j * c.d_k + x] += ds * q[row * c.d_k + x];
            }
            for (int64_t x = 0; x < c.d_v; ++x) wanted_v[v0 + j * c.d_v + x] += p[j] * kept[j] * dout[row * c.d_v + x];
          }
        }
    const auto compare = [](const Numbers& got, const std::vector<double>& want) {
      for (size_t i = 0; i < want.size(); ++i) REQUIRE(std::abs(got[i] - want[i]) < 3e-5 * (1.0 + std::abs(want[i])));
    };
    compare(dq, wanted_q), compare(dk, wanted_k), compare(dv, wanted_v), compare(dsinks, wanted_sinks);
  }
};

const Case kCases[] = {
    {{32, 4, 16}, 1, 70, 70, 64, 64, -1, 0},
    {{12, 4, 6}, 2, 97, 300, 40, 56, -1, 0},
    {{12, 6, 4}, 2, 50, 33, 32, 64},
    {{8, 8, 1}, 1, 113, 203, 8, 24, 5, 3},
    {{4, 2, 4}, 2, 130, 259, 16, 16, 31, 0, 3.0},
    {{6, 3, 2}, 2, 61, 77, 24, 8, -1, -1, 0.0, 0.25},
    {{6, 1, 3}, 1, 64, 520, 64, 128, 300, 0, 5.0, 0.1, true},
    {{5, 1, 5}, 1, 3, 9, 8, 256, -1, 0, 0.0, 0.0, true},
    {{4, 2, 4}, 2, 20, 0, 16, 16},
};

}  // namespace

TEST_CASE("flash_attention_backward: gradients equal their definition, on one thread and on three to the last bit") {
  for (const Case& c : kCases) {
    CAPTURE(c.heads.n_q, c.heads.n_k, c.heads.n_v, c.batch, c.s_q, c.s_k, c.d_k, c.d_v, c.left, c.right);
    Problem problem(c);
    problem.run(1);
    problem.check();
    const Numbers dq = problem.dq, dk = problem.dk, dv = problem.dv, dsinks = problem.dsinks;
    problem.run(3);
    REQUIRE(problem.dq == dq);
    REQUIRE(problem.dk == dk);
    REQUIRE(problem.dv == dv);
    REQUIRE(problem.dsinks == dsinks);
  }
}

TEST_CASE("entries without keys read nothing and have gradients of zero") {
  Problem problem({{4, 2, 4}, 5, 40, 300, 16, 24, 9, 3});
  const std::vector<int32_t> start{20, 400, 50, INT32_MAX, 100}, end{20, 300, 40, 300, -5};
  problem.k.assign(problem.k.size(), std::numeric_limits<float>::quiet_NaN());
  problem.v.assign(problem.v.size(), std::numeric_limits<float>::quiet_NaN());
  problem.start = start.data(), problem.end = end.data();
  problem.run(2);
  for (const Numbers* x : {&problem.out, &problem.dq, &problem.dk, &problem.dv})
    for (const float value : *x) REQUIRE(value == 0.0f);
  for (const float lse : problem.lse) REQUIRE(lse == -std::numeric_limits<float>::infinity());
}

TEST_CASE("a row whose scores are huge and far apart has one probability, of 1") {
  for (const float size : {1e3f, 1e5f, 1e8f, 1e10f, 1e30f})
    for (const bool capped : {false, true}) {
      Problem problem({{4, 2, 2}, 1, 40, 300, 16, 8, -1, -1, capped ? double(size) : 0.0});
      for (size_t i = 0; i < problem.q.size(); ++i) problem.q[i] = 1.0f + float(i / 16 % 7) / 13.0f;
      for (size_t i = 0; i < problem.k.size(); ++i)
        problem.k[i] = (i / 16 % 300 == 37 ? 0.1f : 0.05f) * (1.0f + float(i % 5) / 7.0f) * size;
      problem.run(2);
      CAPTURE(size, capped);
      for (int64_t head = 0; head < 2; ++head)
        for (int64_t x = 0; x < 8; ++x) {
          double sum = 0.0;
          for (int64_t row = head * 80; row < (head + 1) * 80; ++row) {
            sum += problem.dout[row * 8 + x];
            REQUIRE(problem.out[row * 8 + x] == problem.v[(head * 300 + 37) * 8 + x]);
          }
          for (int64_t j = 0; j < 300; ++j)
            REQUIRE(std::abs(problem.dv[(head * 300 + j) * 8 + x] - (j == 37 ? sum : 0.0)) < 1e-5);
        }
    }
}

TEST_CASE("Philox4x32-10 gives its published numbers") {
  // The known answer of a counter and key of zeros (Random123's kat_vectors).
  uint16_t bits[kDraws * kKeysPerDraw];
  draw_bits({}, 0, 0, 0, 8, bits);
  const uint32_t words[] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  for (int i = 0; i < 8; ++i) REQUIRE(bits[i] == uint16_t(words[i / 2] >> (i % 2 * 16)));
}

TEST_CASE("a key's random number does not depend on the range it is drawn in") {
  const Dropout dropout{.threshold = 1, .offset = 3, .seed = 0xfedcba9876543210ull};
  std::vector<uint16_t> all(1024 + kDraws * kKeysPerDraw), part(1024 + kDraws * kKeysPerDraw);
  draw_bits(dropout, 5, 7, 0, 1000, all.data());
  for (const int64_t begin : {1, 8, 130, 257, 999}) {
    draw_bits(dropout, 5, 7, begin, 1000, part.data());
    for (int64_t j = begin; j < 1000; ++j) REQUIRE(part[j - begin / 8 * 8] == all[j]);
  }
}
