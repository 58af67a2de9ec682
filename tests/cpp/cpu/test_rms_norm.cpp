#include <cmath>
#include <vector>

#include "support/caller.h"
#include "support/catch.h"

using namespace diffqkv;

namespace {

double exact_scale(const float* x, int64_t d, double eps) {
  double sum = 0;
  for (int64_t i = 0; i < d; ++i) sum += double(x[i]) * x[i];
  return 1.0 / std::sqrt(sum / double(d) + eps);
}

}  // namespace

TEST_CASE("rms_norm equals its definition in rows of any length and stride, on any number of threads") {
  for (const int64_t d : {1, 3, 16, 17, 511, 513, 1024, 2049, 40000}) {
    const int64_t rows = d > 4000 ? 3 : 23, stride = d + 5;
    std::vector<float> x(rows * stride, NAN), weight(d), out(rows * d), again(rows * d);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < d; ++i) x[r * stride + i] = std::sin(float(i + 31 * r)) * float(r + 1);
    for (int64_t i = 0; i < d; ++i) weight[i] = 1.0f + 0.5f * std::cos(float(i));
    RmsNormParams p;
    p.rows = rows, p.d = d, p.stride = stride, p.eps = 1e-5f;
    p.x = x.data(), p.weight = weight.data(), p.out = out.data();
    run_serially(p, 1);
    for (int64_t r = 0; r < rows; ++r) {
      const double scale = exact_scale(&x[r * stride], d, 1e-5);
      for (int64_t i = 0; i < d; ++i) {
        CAPTURE(d, r, i);
        const double want = weight[i] * (x[r * stride + i] * scale);
        REQUIRE(std::abs(out[r * d + i] - want) <= 1e-6 * std::abs(want));
      }
    }
    p.out = again.data();
    run_serially(p, 5);
    REQUIRE(again == out);
    p.rows = 1, p.x = &x[(rows - 1) * stride];  // a row alone
    run_serially(p, 1);
    for (int64_t i = 0; i < d; ++i) REQUIRE(again[i] == out[(rows - 1) * d + i]);
  }
}

TEST_CASE("the error of rms_norm does not grow with the row") {
  constexpr int64_t d = 1 << 22;
  std::vector<float> x(d, 1.1f), weight(d, 1.0f), out(d);
  RmsNormParams p;
  p.rows = 1, p.d = p.stride = d;
  p.x = x.data(), p.weight = weight.data(), p.out = out.data();
  run_serially(p, 1);
  REQUIRE(std::abs(out[d - 1] - 1.0) <= 1e-6);
}

TEST_CASE("rms_norm of infinities, NaN and rows of zeros is what torch has") {
  constexpr int64_t d = 20;
  std::vector<float> x(4 * d, 0.0f), weight(d, 2.0f), out(4 * d);
  for (int64_t i = 0; i < 2 * d; ++i) x[i] = 1.0f;
  x[3] = HUGE_VALF, x[d + 7] = NAN;
  for (int64_t i = 2 * d; i < 3 * d; ++i) x[i] = 1e30f;  // squares that overflow
  RmsNormParams p;
  p.rows = 4, p.d = p.stride = d, p.eps = 1e-6f;
  p.x = x.data(), p.weight = weight.data(), p.out = out.data();
  run_serially(p, 1);
  for (int64_t i = 0; i < d; ++i) {
    CAPTURE(i);
    REQUIRE((i == 3 ? std::isnan(out[i]) : out[i] == 0.0f));
    REQUIRE(std::isnan(out[d + i]));
    REQUIRE((out[2 * d + i] == 0.0f && out[3 * d + i] == 0.0f));
  }
}
