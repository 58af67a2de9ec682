#include <cmath>
#include <vector>

#include "catch.h"
#include "diffqkv/cpu.h"

using namespace diffqkv;

namespace {
void serial(int64_t workers, void (*body)(void*, int64_t), void* context) {
  for (int64_t w = 0; w < workers; ++w) body(context, w);
}
}  // namespace

TEST_CASE("swiglu and its gradient equal their definitions, tails and large arguments included") {
  constexpr int n = 40003;
  std::vector<float> gate(n), up(n), dout(n), out(n), dgate(n), dup(n);
  for (int i = 0; i < n; ++i) {
    gate[i] = float(i % 401 - 200) * (i % 3 == 0 ? 1.0f : 0.05f);
    up[i] = std::sin(float(i));
    dout[i] = std::cos(float(i));
  }
  SwigluParams p;
  p.gate = gate.data(), p.up = up.data(), p.dout = dout.data();
  p.out = out.data(), p.dgate = dgate.data(), p.dup = dup.data();
  p.numel = n;
  cpu::swiglu(p, 2, serial);
  cpu::swiglu_backward(p, 2, serial);
  for (int i = 0; i < n; ++i) {
    const double x = gate[i], s = 1.0 / (1.0 + std::exp(-x));
    CAPTURE(i, x);
    REQUIRE(std::abs(out[i] - x * s * up[i]) <= 1e-6 * std::max(1.0, std::abs(x)));
    REQUIRE(std::abs(dup[i] - x * s * dout[i]) <= 1e-6 * std::max(1.0, std::abs(x)));
    REQUIRE(std::abs(dgate[i] - dout[i] * up[i] * (s + x * s * (1.0 - s))) <= 2e-6);
  }
}
