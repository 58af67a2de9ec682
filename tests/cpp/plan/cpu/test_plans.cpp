#include <algorithm>
#include <stdexcept>

#include "cpu/isa.h"
#include "cpu/run.h"
#include "plan/cpu/attention.h"
#include "support/catch.h"

using namespace diffqkv;

namespace {
AttentionParams causal_params(HeadGroups heads, int64_t batch, int64_t s_q, int64_t s_k, int64_t d,
                              DType dtype = DType::f32) {
  AttentionParams p;
  p.heads = heads;
  p.batch = batch, p.s_q = s_q, p.s_k = s_k, p.d_k = p.d_v = d;
  p.q.dtype = dtype;
  p.window_right = 0;
  return p;
}
AttentionPlan plan_of(const AttentionParams& p, int64_t threads) { return plan_attention(p, p.s_k, threads); }
}  // namespace

TEST_CASE("decode of one token splits the keys, prefill does not") {
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

TEST_CASE("scratch of a prefill item stays within 2 MiB at any shape") {
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

TEST_CASE("FLOPs count the pairs that a window lets through") {
  const auto pairs = [](AttentionParams p) { return plan_of(p, 2).flops / (2.0 * p.heads.n_q * (p.d_k + p.d_v)); };
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

TEST_CASE("the backward pass: workspace bounded by tiles and threads, and by no product of lengths") {
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

TEST_CASE("the backward pass: tiles depend on the dimensions alone") {
  const auto of = [](int64_t s, int64_t threads) {
    return plan_flash_attention_backward(causal_params({32, 4, 16}, 1, s, s, 64), threads);
  };
  for (const int64_t threads : {1, 2, 64}) {
    REQUIRE(of(100, threads).block_k == of(5000, 1).block_k);
    REQUIRE(of(100, threads).block_q == of(5000, 1).block_q);
  }
}

TEST_CASE("selective V: chunks cover the splits, and no more of them than the threads need") {
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

TEST_CASE("selective V: scratch does not grow with the length, once it exceeds what is selected") {
  const auto scratch = [](int64_t keys) {
    return plan_selective_v_attention(selective(1, 100), keys, 2).scratch_bytes;
  };
  REQUIRE(scratch(1 << 20) == scratch(1 << 14));
}

TEST_CASE("selective V: more rows than there are keys ask for no more memory") {
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

TEST_CASE("selective V: a guarantee keeps more candidates, but never more than there are keys") {
  SelectiveVAttentionParams params = selective(1, 100);
  REQUIRE(plan_selective_v_attention(params, 8192, 2).candidates == 100);
  REQUIRE(plan_selective_v_attention(params, 60, 2).candidates == 60);
  params.max_error = 0.1f;
  REQUIRE(plan_selective_v_attention(params, 8192, 2).candidates == 100 * kMaxAdded);
  REQUIRE(plan_selective_v_attention(params, 150, 2).candidates == 150);
}

TEST_CASE("an unknown or unsupported CPU level is refused by name") {
  REQUIRE_THROWS_AS(choose_cpu_isa("sse9"), std::runtime_error);
  REQUIRE(choose_cpu_isa("") == supported_cpu_isas().back());
  REQUIRE(choose_cpu_isa(nullptr) == supported_cpu_isas().back());
  for (const CpuIsa isa : supported_cpu_isas()) REQUIRE(choose_cpu_isa(name_of(isa)) == isa);
}
