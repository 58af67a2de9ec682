#include <cmath>
#include <vector>

#include "support/caller.h"
#include "support/catch.h"

using namespace diffqkv;

TEST_CASE("rotary_embedding rotates the first dimensions of every row and copies the others") {
  constexpr int64_t b = 2, t = 130, heads = 3;
  for (const auto& [d, d_rot] : {std::pair<int64_t, int64_t>{64, 64}, {40, 24}, {7, 6}, {5, 0}, {256, 200}}) {
    std::vector<float> x(b * t * heads * (d + 3), NAN), angles(2 * t * d_rot), out(b * t * heads * d);
    RotaryEmbeddingParams p;
    p.batch = b, p.tokens = t, p.heads = heads, p.d = d, p.d_rot = d_rot;
    p.x = {x.data(), t * heads * (d + 3), t * (d + 3), d + 3, DType::f32};  // [b, heads, t, d + 3]
    const auto at = [&, d = d](int64_t i, int64_t token, int64_t head) -> float* {
      return &x[size_t(((i * heads + head) * t + token) * (d + 3))];
    };
    for (int64_t i = 0; i < b * heads * t; ++i)
      for (int64_t c = 0; c < d; ++c) x[i * (d + 3) + c] = std::sin(float(i * d + c));
    for (int64_t i = 0; i < 2 * t * d_rot; ++i) angles[i] = std::cos(float(3 * i));
    p.cos = angles.data(), p.sin = angles.data() + t * d_rot;
    p.rope_stride_token = d_rot;
    p.out = out.data();
    for (const int64_t threads : {1, 4}) {
      std::fill(out.begin(), out.end(), NAN);
      run_serially(p, threads);
      for (int64_t row = 0; row < b * t * heads; ++row) {
        const int64_t token = row / heads % t, half = d_rot / 2;
        const float *in = at(row / heads / t, token, row % heads), *cos = &angles[token * d_rot];
        const float* sin = cos + t * d_rot;
        for (int64_t c = 0; c < d; ++c) {
          CAPTURE(d, d_rot, row, c);
          if (c >= d_rot) {
            REQUIRE(out[row * d + c] == in[c]);
            continue;
          }
          const double other = c < half ? -double(in[c + half]) : double(in[c - half]);
          REQUIRE(std::abs(out[row * d + c] - (double(in[c]) * cos[c] + other * sin[c])) <= 3e-7);
        }
      }
    }
  }
}
