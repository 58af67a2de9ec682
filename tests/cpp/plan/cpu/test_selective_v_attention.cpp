#include <algorithm>

#include "cpu/selective_v_attention.h"
#include "params/selective_v_attention.h"
#include "plan/cpu/selective_v_attention.h"
#include "support/catch.h"

using namespace diffqkv;

namespace {
SelectiveVAttentionParams selective(int64_t batch, int64_t top_k) {
  SelectiveVAttentionParams params;
  params.attention.heads = {32, 4, 16};
  params.attention.batch = batch;
  params.attention.s_q = 1;
  params.attention.d_k = params.attention.d_v = 64;
  params.top_k = top_k;
  return params;
}
}  // namespace

TEST_CASE("selective_v_attention: chunks cover the splits, and no more of them than the threads need") {
  for (const int64_t threads : {1, 2, 16})
    for (const int64_t keys : {1, 513, 8192, 131072}) {
      const SelectiveVAttentionPlan plan = plan_selective_v_attention(selective(3, 100), keys, threads);
      CAPTURE(threads, keys);
      REQUIRE(plan.chunks * plan.chunk_splits >= plan.dense.splits);
      REQUIRE((plan.chunks - 1) * plan.chunk_splits < plan.dense.splits);
      REQUIRE(plan.items == 3 * 4 * plan.chunks);
      REQUIRE(plan.items <= std::max<int64_t>(12, 4 * threads + 12));
    }
  REQUIRE(plan_selective_v_attention(selective(1, 100), 131072, 16).items >= 16);
}

TEST_CASE("selective_v_attention: scratch does not grow with the length, once it exceeds what is selected") {
  const auto scratch = [](int64_t keys) {
    return plan_selective_v_attention(selective(1, 100), keys, 2).scratch_bytes;
  };
  REQUIRE(scratch(1 << 20) == scratch(1 << 14));
}

TEST_CASE("selective_v_attention: more rows than there are keys ask for no more memory") {
  for (const float max_error : {-1.0f, 0.5f}) {
    SelectiveVAttentionParams all = selective(1, 5000), more = selective(1, INT64_MAX);
    all.max_error = more.max_error = max_error;
    all.keep_first = all.keep_last = 5000, more.keep_first = more.keep_last = INT64_MAX;
    const SelectiveVAttentionPlan plan = plan_selective_v_attention(more, 5000, 2),
                                  want = plan_selective_v_attention(all, 5000, 2);
    REQUIRE(plan.scratch_bytes == want.scratch_bytes);
    REQUIRE(cpu::selective_v_attention_workspace(more, plan) == cpu::selective_v_attention_workspace(all, want));
  }
}

TEST_CASE("selective_v_attention: a guarantee keeps more candidates, but never more than there are keys") {
  SelectiveVAttentionParams params = selective(1, 100);
  REQUIRE(plan_selective_v_attention(params, 8192, 2).candidates == 100);
  REQUIRE(plan_selective_v_attention(params, 60, 2).candidates == 60);
  params.max_error = 0.1f;
  REQUIRE(plan_selective_v_attention(params, 8192, 2).candidates == 100 * kMaxAdded);
  REQUIRE(plan_selective_v_attention(params, 150, 2).candidates == 150);
}
