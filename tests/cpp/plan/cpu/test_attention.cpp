#include "plan/cpu/attention.h"
#include "support/catch.h"
#include "support/causal_params.h"

using namespace diffqkv;

namespace {
AttentionPlan plan_of(const AttentionParams& p, int64_t threads) { return plan_attention(p, p.s_k, threads); }
}  // namespace

TEST_CASE("decode_attention of one token splits the keys, flash_attention of many does not") {
  const HeadGroups sigma{32, 4, 16};
  const AttentionPlan decode = plan_of(causal_params(sigma, 1, 1, 8192, 64), 2);
  REQUIRE(decode.kernel == AttentionKernel::split);
  REQUIRE(decode.rows == 8);
  REQUIRE(decode.splits == 8192 / kSplitTokens);
  REQUIRE(decode.items == 4 * decode.splits);
  REQUIRE(decode.partial_floats == decode.items * decode.rows * (64 + kPartialHeader));
  REQUIRE(decode.bytes == Approx(4.0 * (8192 * 1280 + 32 * 128)));
  REQUIRE(plan_of(causal_params(sigma, 1, 2048, 2048, 64), 2).kernel == AttentionKernel::block);
}

TEST_CASE("a short sequence needs no merge and one thread") {
  const AttentionPlan plan = plan_of(causal_params({32, 4, 16}, 1, 1, 16, 64), 64);
  REQUIRE(plan.splits == 1);
  REQUIRE(plan.partial_floats == 0);
  REQUIRE(plan.threads == 1);
}

TEST_CASE("the number of threads never changes the ranges that are merged") {
  for (const int64_t threads : {1, 2, 7, 64}) {
    const AttentionPlan plan = plan_of(causal_params({32, 4, 16}, 3, 2, 5000, 64, DType::bf16), threads);
    REQUIRE(plan.splits == (5000 + kSplitTokens - 1) / kSplitTokens);
    REQUIRE(plan.threads <= threads);
  }
}

TEST_CASE("scratch of a flash_attention item stays within 2 MiB at any shape") {
  for (const int64_t n_k : {1, 4, 32})
    for (const int64_t d : {8, 64, 128, 256})
      for (const int64_t s_q : {0, 17, 512, 100000}) {
        const AttentionPlan plan = plan_of(causal_params({32, n_k, 16}, 2, s_q, s_q, d), 2);
        CAPTURE(n_k, d, s_q);
        REQUIRE(plan.scratch_bytes <= 2 << 20);
        REQUIRE(plan.partial_floats == 0);
      }
}

TEST_CASE("every (batch, group, head chunk, block) is an item, enough of them for the threads") {
  const AttentionPlan plan = plan_of(causal_params({32, 4, 16}, 1, 512, 512, 64), 16);
  const int64_t blocks = (512 + plan.block_q - 1) / plan.block_q;
  REQUIRE(plan.items == 4 * plan.head_chunks * blocks);
  REQUIRE(plan.head_chunks * plan.heads_per_item >= 8);
  REQUIRE(plan.items >= 64);
}
