#include <algorithm>
#include <stdexcept>

#include "catch.h"
#include "core/cpu_isa.h"
#include "diffqkv/attention_plan.h"

using namespace diffqkv;

TEST_CASE("decode of one token splits the keys, prefill does not") {
  const HeadGroups sigma{32, 4, 16};
  const AttentionPlan decode = plan_attention(sigma, 1, 1, 8192, 64, 64, DType::f32, true, 2);
  REQUIRE(decode.kernel == AttentionKernel::split);
  REQUIRE(decode.rows == 8);
  REQUIRE(decode.splits == 8192 / kSplitTokens);
  REQUIRE(decode.items == 4 * decode.splits);
  REQUIRE(decode.partial_floats == decode.items * decode.rows * (64 + kPartialHeader));
  REQUIRE(decode.bytes == Approx(4.0 * (8192 * 1280 + 32 * 128)));
  REQUIRE(plan_attention(sigma, 1, 2048, 2048, 64, 64, DType::f32, true, 2).kernel == AttentionKernel::block);
}

TEST_CASE("a short sequence needs no merge and one thread") {
  const AttentionPlan plan = plan_attention({32, 4, 16}, 1, 1, 16, 64, 64, DType::f32, true, 64);
  REQUIRE(plan.splits == 1);
  REQUIRE(plan.partial_floats == 0);
  REQUIRE(plan.threads == 1);
}

TEST_CASE("the number of threads never changes the ranges that are merged") {
  for (const int64_t threads : {1, 2, 7, 64}) {
    const AttentionPlan plan = plan_attention({32, 4, 16}, 3, 2, 5000, 64, 64, DType::bf16, true, threads);
    REQUIRE(plan.splits == (5000 + kSplitTokens - 1) / kSplitTokens);
    REQUIRE(plan.threads <= threads);
  }
}

TEST_CASE("scratch of a prefill item stays within 2 MiB at any shape") {
  for (const int64_t n_k : {1, 4, 32})
    for (const int64_t d : {8, 64, 128, 256})
      for (const int64_t s_q : {17, 512, 100000}) {
        const AttentionPlan plan = plan_attention({32, n_k, 16}, 2, s_q, s_q, d, d, DType::f32, true, 2);
        CAPTURE(n_k, d, s_q);
        REQUIRE(plan.scratch_bytes <= 2 << 20);
        REQUIRE(plan.partial_floats == 0);
      }
}

TEST_CASE("every (batch, group, head chunk, block) is an item, enough of them for the threads") {
  const AttentionPlan plan = plan_attention({32, 4, 16}, 1, 512, 512, 64, 64, DType::f32, true, 16);
  const int64_t blocks = (512 + plan.block_q - 1) / plan.block_q;
  REQUIRE(plan.items == 4 * plan.head_chunks * blocks);
  REQUIRE(plan.head_chunks * plan.heads_per_item >= 8);
  REQUIRE(plan.items >= 64);
}

namespace {
SelectiveVParams selective(int64_t batch, int64_t top_k) {
  SelectiveVParams params;
  params.attention.heads = {32, 4, 16};
  params.attention.batch = batch;
  params.attention.s_q = 1;
  params.attention.d_k = params.attention.d_v = 64;
  params.top_k = top_k;
  return params;
}
}  // namespace

TEST_CASE("selective V: chunks cover the splits, and no more of them than the threads need") {
  for (const int64_t threads : {1, 2, 16})
    for (const int64_t keys : {1, 513, 8192, 131072}) {
      const SelectivePlan plan = plan_selective(selective(3, 100), keys, threads);
      CAPTURE(threads, keys);
      REQUIRE(plan.chunks * plan.chunk_splits >= plan.dense.splits);
      REQUIRE((plan.chunks - 1) * plan.chunk_splits < plan.dense.splits);
      REQUIRE(plan.items == 3 * 4 * plan.chunks);
      REQUIRE(plan.items <= std::max<int64_t>(12, 4 * threads + 12));
    }
  REQUIRE(plan_selective(selective(1, 100), 131072, 16).items >= 16);
}

TEST_CASE("selective V: scratch does not grow with the length, once it exceeds what is selected") {
  const auto scratch = [](int64_t keys) { return plan_selective(selective(1, 100), keys, 2).scratch_bytes; };
  REQUIRE(scratch(1 << 20) == scratch(1 << 14));
}

TEST_CASE("selective V: a guarantee keeps more candidates, but never more than there are keys") {
  SelectiveVParams params = selective(1, 100);
  REQUIRE(plan_selective(params, 8192, 2).candidates == 100);
  REQUIRE(plan_selective(params, 60, 2).candidates == 60);
  params.max_error = 0.1f;
  REQUIRE(plan_selective(params, 8192, 2).candidates == 100 * kMaxAdded);
  REQUIRE(plan_selective(params, 150, 2).candidates == 150);
}

TEST_CASE("an unknown or unsupported CPU level is refused by name") {
  REQUIRE_THROWS_AS(choose_cpu_isa("sse9"), std::runtime_error);
  REQUIRE(choose_cpu_isa("") == supported_cpu_isas().back());
  REQUIRE(choose_cpu_isa(nullptr) == supported_cpu_isas().back());
  for (const CpuIsa isa : supported_cpu_isas()) REQUIRE(choose_cpu_isa(name_of(isa)) == isa);
}
