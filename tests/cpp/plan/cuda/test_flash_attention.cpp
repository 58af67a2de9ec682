#include "plan/cuda/flash_attention.h"
#include "support/catch.h"

using namespace diffqkv;

namespace {

const DeviceFacts kDevices[] = {DeviceFacts::a100(), DeviceFacts::h100(), DeviceFacts::h200(), DeviceFacts::rtx4090()};

AttentionParams params(int64_t d_k, int64_t d_v, DType dtype = DType::bf16) {
  AttentionParams p;
  p.heads = {32, 4, 16};
  p.batch = 2, p.s_q = 1000, p.s_k = 3000, p.d_k = d_k, p.d_v = d_v;
  p.q.dtype = p.k.dtype = p.v.dtype = p.out.dtype = dtype;
  p.window_right = 0;
  return p;
}

}  // namespace

TEST_CASE("flash_attention on CUDA: takes the smallest variant that holds the dimensions") {
  const auto variant = [](int64_t d_k, int64_t d_v) {
    return kFlashAttentionVariants[plan_cuda_flash_attention(params(d_k, d_v), DeviceFacts::h100()).variant];
  };
  const auto is = [](const FlashAttentionVariant& v, int d_k, int d_v) { return v.d_k == d_k && v.d_v == d_v; };
  CHECK(is(variant(8, 8), 32, 64));
  CHECK(is(variant(32, 64), 32, 64));
  CHECK(is(variant(40, 32), 64, 64));
  CHECK(is(variant(64, 64), 64, 64));
  CHECK(is(variant(32, 128), 64, 128));
  CHECK(is(variant(64, 72), 64, 128));
  CHECK(is(variant(128, 8), 128, 128));
  CHECK(is(variant(72, 128), 128, 128));
  CHECK(is(variant(136, 8), 256, 256));
  CHECK(is(variant(8, 256), 256, 256));
  for (int64_t d_k = 8; d_k <= kMaxHeadDim; d_k += 8)
    for (int64_t d_v = 8; d_v <= kMaxHeadDim; d_v += 8) REQUIRE(variant(d_k, d_v).holds(d_k, d_v));
}

TEST_CASE("flash_attention on CUDA: fits every device, and a second stage costs no block") {
  for (const DeviceFacts& facts : kDevices)
    for (const FlashAttentionVariant& v : kFlashAttentionVariants) {
      const CudaFlashAttentionPlan plan = plan_cuda_flash_attention(params(v.d_k, v.d_v), facts);
      CAPTURE(facts.capability, v.d_k, v.d_v, plan.shared_bytes);
      REQUIRE(plan.shared_bytes <= facts.shared_per_block);
      REQUIRE(plan.block_m == v.block_m());
      REQUIRE(plan.block_n == v.block_n);
      REQUIRE(plan.threads == 128);
      if (facts.capability != 89) REQUIRE(2 * (plan.shared_bytes + 1024) <= facts.shared_per_multiprocessor);
    }
  const auto stages = [](int64_t d_k, int64_t d_v, const DeviceFacts& facts) {
    return plan_cuda_flash_attention(params(d_k, d_v), facts).stages;
  };
  CHECK(stages(64, 64, DeviceFacts::a100()) == 2);
  CHECK(stages(64, 128, DeviceFacts::a100()) == 2);
  CHECK(stages(128, 128, DeviceFacts::a100()) == 1);
  CHECK(stages(128, 128, DeviceFacts::h100()) == 2);
  CHECK(stages(64, 64, DeviceFacts::rtx4090()) == 1);
}

TEST_CASE(
    "flash_attention on CUDA: bits follow from the dimensions: tiles of keys are the same for every shape and device") {
  for (const DeviceFacts& facts : kDevices) {
    AttentionParams p = params(64, 128);
    for (const int64_t s_q : {1, 17, 5000})
      for (const int64_t batch : {1, 64}) {
        p.s_q = s_q, p.batch = batch;
        REQUIRE(plan_cuda_flash_attention(p, facts).block_n == 64);
      }
  }
}

TEST_CASE("flash_attention on CUDA: blocks, features, alignment, cost") {
  AttentionParams p = params(64, 64);
  CudaFlashAttentionPlan plan = plan_cuda_flash_attention(p, DeviceFacts::h100());
  CHECK(plan.query_blocks == 8);
  CHECK(plan.blocks == 2 * 8 * 32);
  CHECK(!plan.features);
  CHECK(plan.aligned);
  CHECK(plan.out_aligned);
  CHECK(plan.flops == Approx(2.0 * 2 * 32 * 1000 * 2500.5 * 128));
  CHECK(plan.bytes == Approx(2.0 * 2 * (3000 * 20 * 64 + 1000 * 32 * 128)));
  p.v.stride_token = 12, p.out.stride_head = 3;
  plan = plan_cuda_flash_attention(p, DeviceFacts::h100());
  CHECK(!plan.aligned);
  CHECK(!plan.out_aligned);
  p.softcap = 30.0;
  CHECK(plan_cuda_flash_attention(p, DeviceFacts::h100()).features);
  p.softcap = 0.0, p.dropout.threshold = 1;
  CHECK(plan_cuda_flash_attention(p, DeviceFacts::h100()).features);
  p.s_q = 0;
  CHECK(plan_cuda_flash_attention(p, DeviceFacts::h100()).blocks == 0);
  p.s_q = 1, p.batch = 100000;  // more than the other dimensions of a grid hold
  CHECK(plan_cuda_flash_attention(p, DeviceFacts::h100()).blocks == 3200000);
}

TEST_CASE("flash_attention on CUDA: fp32 and fp64 take the plain kernel, which fits every device") {
  for (const DType dtype : {DType::f32, DType::f64})
    for (const DeviceFacts& facts : kDevices) {
      const CudaFlashAttentionPlan plan = plan_cuda_flash_attention(params(256, 256, dtype), facts);
      CHECK(plan.variant == -1);
      CHECK(plan.shared_bytes <= facts.shared_per_block);
      CHECK(plan.blocks == 2 * 125 * 32);
    }
}
