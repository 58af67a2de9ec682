#include "plan/cost.h"
#include "support/catch.h"
#include "support/causal_params.h"

using namespace diffqkv;

TEST_CASE("FLOPs count the pairs that a window lets through") {
  const auto pairs = [](const AttentionParams& p) {
    return attention_cost(p, p.s_k).flops / (2.0 * p.heads.n_q * (p.d_k + p.d_v));
  };
  for (const int64_t s_q : {1, 5, 40})
    for (const int64_t s_k : {0, 3, 17, 40})
      for (const int64_t left : {-1, 0, 4, 100})
        for (const int64_t right : {-1, 0, 2, 100}) {
          AttentionParams p = causal_params({4, 2, 2}, 1, s_q, s_k, 16);
          p.window_left = left, p.window_right = right;
          int64_t visible = 0;
          for (int64_t i = 0; i < s_q; ++i)
            for (int64_t j = 0; j < s_k; ++j) {
              const int64_t from_query = j - (i + s_k - s_q);
              visible += (left < 0 || from_query >= -left) && (right < 0 || from_query <= right);
            }
          CAPTURE(s_q, s_k, left, right);
          REQUIRE(pairs(p) == Approx(double(visible)));
        }
}
