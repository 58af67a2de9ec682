#include <cmath>
#include <vector>

#include "cuda/swiglu/swiglu.cuh"
#include "support/catch.h"

using namespace diffqkv;
using namespace diffqkv::device;

namespace {

template <class E>
void check(double tolerance, bool aligned) {
  using T = typename E::T;
  const int64_t n = 5003, blocks = 3;
  std::vector<T> gate, up, dout, out(n), dgate(n), dup(n);
  for (int64_t i = 0; i < n; ++i) {
    gate.push_back(E::put(float(i % 401 - 200) * (i % 3 == 0 ? 1.0f : 0.05f)));
    up.push_back(E::put(std::sin(float(i))));
    dout.push_back(E::put(std::cos(float(i))));
  }
  SwigluBackwardParams bp;
  bp.forward = {.gate = gate.data(), .up = up.data(), .out = out.data(), .numel = n};
  bp.dout = dout.data(), bp.dgate = dgate.data(), bp.dup = dup.data();
  emulate<Swiglu<E, false>>({bp, aligned}, {blocks}, 0, emulator::Schedule::forward);
  emulate<Swiglu<E, true>>({bp, aligned}, {blocks}, 0, emulator::Schedule::reverse);
  for (int64_t i = 0; i < n; ++i) {
    const double x = E::get(gate[i]), s = 1.0 / (1.0 + std::exp(-x)), u = E::get(up[i]), d = E::get(dout[i]);
    const double limit = tolerance * std::max(1.0, std::abs(x));
    CAPTURE(i, x);
    REQUIRE(std::abs(E::get(out[i]) - x * s * u) <= limit);
    REQUIRE(std::abs(E::get(dup[i]) - x * s * d) <= limit);
    REQUIRE(std::abs(E::get(dgate[i]) - d * u * (s + x * s * (1.0 - s))) <= 2 * limit);
  }
}

}  // namespace

TEST_CASE("emulated swiglu and its gradient equal their definitions") {
  for (const bool aligned : {true, false}) {
    check<F32>(2e-6, aligned);
    check<F16>(1e-3, aligned);
    check<BF16>(8e-3, aligned);
  }
}

TEST_CASE("emulated swiglu of huge gates is 0, or NaN where torch has NaN") {
  const int64_t n = 6;
  const std::vector<float> gate = {-1e3f, -1e37f, -3.4e38f, 3.4e38f, -HUGE_VALF, NAN}, up(n, 1.0f), dout(n, 2.0f);
  std::vector<float> out(n), dgate(n), dup(n);
  SwigluBackwardParams bp;
  bp.forward = {.gate = gate.data(), .up = up.data(), .out = out.data(), .numel = n};
  bp.dout = dout.data(), bp.dgate = dgate.data(), bp.dup = dup.data();
  emulate<Swiglu<F32, false>>({bp, false}, {1}, 0, emulator::Schedule::forward);
  emulate<Swiglu<F32, true>>({bp, false}, {1}, 0, emulator::Schedule::forward);
  for (int i = 0; i < 3; ++i) REQUIRE((out[i] == 0.0f && dgate[i] == 0.0f && dup[i] == 0.0f));
  REQUIRE((out[3] == 3.4e38f && dgate[3] == 2.0f && dup[3] == HUGE_VALF));
  for (int i = 4; i < n; ++i) REQUIRE((std::isnan(out[i]) && std::isnan(dup[i]) && std::isnan(dgate[i])));
}
