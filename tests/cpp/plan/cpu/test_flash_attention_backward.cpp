#include "plan/cpu/flash_attention_backward.h"
#include "support/catch.h"
#include "support/causal_params.h"

using namespace diffqkv;

TEST_CASE("flash_attention_backward: workspace bounded by tiles and threads, and by no product of lengths") {
  for (const int64_t d : {8, 64, 128, 256})
    for (const int64_t s : {17, 512, 100000}) {
      CAPTURE(d, s);
      const FlashAttentionBackwardPlan plan = plan_flash_attention_backward(causal_params({32, 4, 16}, 2, s, s, d), 2);
      REQUIRE(plan.scratch_bytes <= 2 << 20);
      REQUIRE(plan.dq_floats == 0);
      REQUIRE(plan.key_blocks * plan.block_k >= s);
      REQUIRE(plan.items == 2 * 4 * plan.key_blocks);
      REQUIRE(plan_flash_attention_backward(causal_params({32, 4, 16}, 2, s, s, d, DType::bf16), 2).dq_floats ==
              2 * 32 * s * d);
    }
}

TEST_CASE("flash_attention_backward: tiles depend on the dimensions alone") {
  const auto of = [](int64_t s, int64_t threads) {
    return plan_flash_attention_backward(causal_params({32, 4, 16}, 1, s, s, 64), threads);
  };
  for (const int64_t threads : {1, 2, 64}) {
    REQUIRE(of(100, threads).block_k == of(5000, 1).block_k);
    REQUIRE(of(100, threads).block_q == of(5000, 1).block_q);
  }
}
