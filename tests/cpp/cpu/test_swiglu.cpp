#include <cmath>
#include <vector>

#include "support/caller.h"
#include "support/catch.h"

using namespace diffqkv;

TEST_CASE("swiglu and its gradient equal their definitions, tails and large arguments included") {
  constexpr int n = 40003;
  std::vector<float> gate(n), up(n), dout(n), out(n), dgate(n), dup(n);
  for (int i = 0; i < n; ++i) {
    gate[i] = float(i % 401 - 200) * (i % 3 == 0 ? 1.0f : 0.05f);
    up[i] = std::sin(float(i));
    dout[i] = std::cos(float(i));
  }
  SwigluBackwardParams bp;
  bp.forward = {.gate = gate.data(), .up = up.data(), .out = out.data(), .numel = n};
  bp.dout = dout.data(), bp.dgate = dgate.data(), bp.dup = dup.data();
  run_serially(bp.forward, 2);
  run_serially(bp, 2);
  for (int i = 0; i < n; ++i) {
    const double x = gate[i], s = 1.0 / (1.0 + std::exp(-x));
    CAPTURE(i, x);
    REQUIRE(std::abs(out[i] - x * s * up[i]) <= 1e-6 * std::max(1.0, std::abs(x)));
    REQUIRE(std::abs(dup[i] - x * s * dout[i]) <= 1e-6 * std::max(1.0, std::abs(x)));
    REQUIRE(std::abs(dgate[i] - dout[i] * up[i] * (s + x * s * (1.0 - s))) <= 2e-6);
  }
}

TEST_CASE("swiglu of huge gates: 0 from where the sigmoid is, NaN where torch has NaN") {
  constexpr int n = 1200;
  std::vector<float> gate(n), up(n, 1e30f), dout(n, -1e3f), out(n), dgate(n), dup(n);
  for (int i = 0; i < n; ++i)
    gate[i] = i < 600 ? -80.0f - 0.02f * float(i) : -std::pow(10.0f, 0.06f * float(i - 600) + 2);
  gate[n - 4] = -3.4e38f, gate[n - 3] = 3.4e38f, gate[n - 2] = -HUGE_VALF, gate[n - 1] = NAN;
  up[n - 3] = 1.0f, dout[n - 3] = -1.0f;
  SwigluBackwardParams bp;
  bp.forward = {.gate = gate.data(), .up = up.data(), .out = out.data(), .numel = n};
  bp.dout = dout.data(), bp.dgate = dgate.data(), bp.dup = dup.data();
  run_serially(bp.forward, 2);
  run_serially(bp, 2);
  for (int i = 0; i < n - 2; ++i) {
    const double x = gate[i], s = 1.0 / (1.0 + std::exp(-x)), silu = x * s;
    CAPTURE(i, x);
    // fp32 has no sigmoid below 2^-126; what is lost there is less than 3e-37 before the other factors.
    REQUIRE(std::abs(out[i] - silu * up[i]) <= (1e-5 * std::abs(silu) + 3e-37) * up[i]);
    REQUIRE(std::abs(dup[i] - silu * dout[i]) <= (1e-5 * std::abs(silu) + 3e-37) * 1e3);
    REQUIRE(std::abs(dgate[i] - dout[i] * up[i] * (s + silu * (1.0 - s))) <=
            (1e-5 * std::abs(s + silu) + 3e-37) * 1e3 * up[i]);
  }
  for (int i = n - 2; i < n; ++i) REQUIRE((std::isnan(out[i]) && std::isnan(dup[i]) && std::isnan(dgate[i])));
}

TEST_CASE("swiglu of rows that lie apart has the bits of rows side by side, on any number of threads") {
  for (const int64_t width : {1, 16, 37, 2000}) {
    constexpr int64_t rows = 29;
    const int64_t gate_stride = 2 * width + 3, up_stride = width + 1;
    std::vector<float> gate(rows * gate_stride, NAN), up(rows * up_stride, NAN), out(rows * width, NAN);
    std::vector<float> gate_rows, up_rows, want(rows * width);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; ++i) {
        gate_rows.push_back(gate[r * gate_stride + i] = 5 * std::sin(float(r * width + i)));
        up_rows.push_back(up[r * up_stride + i] = std::cos(float(3 * r + i)));
      }
    run_serially(
        SwigluParams{.gate = gate_rows.data(), .up = up_rows.data(), .out = want.data(), .numel = rows * width}, 1);
    for (const int64_t threads : {1, 3}) {
      SwigluParams p{.gate = gate.data(), .up = up.data(), .out = out.data(), .numel = rows * width};
      p.width = width, p.gate_stride = gate_stride, p.up_stride = up_stride;
      run_serially(p, threads);
      CAPTURE(width, threads);
      REQUIRE(out == want);
    }
  }
}
