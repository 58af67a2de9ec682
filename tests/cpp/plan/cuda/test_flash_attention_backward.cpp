#include "plan/cost.h"
#include "plan/cuda/flash_attention_backward_tiles.h"
#include "support/catch.h"

using namespace diffqkv;

namespace {

FlashAttentionBackwardParams params(HeadGroups heads, int64_t batch, int64_t s, int64_t d_k = 64, int64_t d_v = 64,
                                    DType dtype = DType::bf16) {
  FlashAttentionBackwardParams bp;
  AttentionParams& p = bp.forward;
  p.heads = heads, p.batch = batch, p.s_q = p.s_k = s, p.d_k = d_k, p.d_v = d_v, p.window_right = 0;
  p.q = {nullptr, heads.n_q * s * d_k, s * d_k, d_k, dtype},
  p.out = bp.dout = {nullptr, heads.n_q * s * d_v, s * d_v, d_v, dtype};
  p.k.stride_page = heads.n_k * s * d_k, p.k.stride_head = s * d_k, p.k.stride_token = d_k, p.k.dtype = dtype;
  p.v.stride_page = heads.n_v * s * d_v, p.v.stride_head = s * d_v, p.v.stride_token = d_v, p.v.dtype = dtype;
  p.k.stride_group = heads.k_per_group() * p.k.stride_head, p.v.stride_group = heads.v_per_group() * p.v.stride_head;
  return bp;
}
CudaFlashAttentionBackwardPlan plan_of(const FlashAttentionBackwardParams& p,
                                       const DeviceFacts& facts = DeviceFacts::h200()) {
  return plan_cuda_flash_attention_backward(p, facts);
}
const HeadGroups kSigma{32, 4, 16};

}  // namespace

TEST_CASE("flash_attention_backward on CUDA: the smallest variant that holds both dimensions") {
  const auto dims = [](int64_t d_k, int64_t d_v) {
    const FlashAttentionBackwardVariant& v =
        kFlashAttentionBackwardVariants[plan_of(params(kSigma, 1, 128, d_k, d_v)).variant];
    return std::pair<int32_t, int32_t>(v.d_k, v.d_v);
  };
  REQUIRE(dims(64, 64) == std::pair(64, 64));
  REQUIRE(dims(32, 64) == std::pair(32, 64));
  REQUIRE(dims(8, 8) == std::pair(32, 64));
  REQUIRE(dims(40, 56) == std::pair(64, 64));
  REQUIRE(dims(64, 128) == std::pair(64, 128));
  REQUIRE(dims(128, 24) == std::pair(128, 128));
  REQUIRE(dims(8, 256) == std::pair(256, 256));
  REQUIRE(plan_of(params(kSigma, 1, 128, 64, 64, DType::f32)).variant == -1);
  REQUIRE(plan_of(params(kSigma, 1, 128, 64, 64, DType::f64)).variant == -1);
}

TEST_CASE("flash_attention_backward on CUDA: every variant fits every device, with two stages where there is room") {
  for (const FlashAttentionBackwardVariant& v : kFlashAttentionBackwardVariants)
    for (const DeviceFacts& facts :
         {DeviceFacts::h200(), DeviceFacts::h100(), DeviceFacts::a100(), DeviceFacts::rtx4090()}) {
      const CudaFlashAttentionBackwardPlan plan = plan_of(params(kSigma, 2, 512, v.d_k, v.d_v), facts);
      CAPTURE(v.d_k, v.d_v, facts.shared_per_block);
      REQUIRE(kFlashAttentionBackwardVariants[plan.variant].d_k == v.d_k);
      REQUIRE(plan.key_shared_bytes == key_shared_bytes(v, plan.key_stages));
      REQUIRE(plan.query_shared_bytes == query_shared_bytes(v, plan.query_stages));
      REQUIRE(plan.key_shared_bytes <= facts.shared_per_block);
      REQUIRE(plan.query_shared_bytes <= facts.shared_per_block);
      if (facts.capability != 89) REQUIRE(plan.key_stages + plan.query_stages == 4);
    }
}

TEST_CASE("flash_attention_backward on CUDA: a long sequence needs no slots, and two floats to a query and head") {
  const CudaFlashAttentionBackwardPlan plan = plan_of(params(kSigma, 1, 16384));
  REQUIRE(plan.chunks == 1);
  REQUIRE(plan.chunk_heads == 8);
  REQUIRE(plan.key_blocks == 4 * 16384 / 128);
  REQUIRE(plan.query_blocks == 32 * 16384 / 128);
  REQUIRE(plan.k_sum_blocks == 0);
  REQUIRE(plan.v_sum_blocks == 0);
  REQUIRE(plan.workspace_bytes == 8 * 32 * 16384);
  REQUIRE(plan.flops == attention_backward_flops(params(kSigma, 1, 16384).forward));
}

TEST_CASE("flash_attention_backward on CUDA: few blocks share the heads of a group, so that dV stays whole") {
  const CudaFlashAttentionBackwardPlan plan = plan_of(params(kSigma, 1, 2048));
  REQUIRE(plan.chunk_heads == 2);
  REQUIRE(plan.chunks == 4);
  REQUIRE(plan.k_slots == 4);
  REQUIRE(plan.v_slots == 1);
  REQUIRE(plan.key_blocks == 4 * 4 * 16);
  REQUIRE(plan.partial_k == 8 * 32 * 2048);
  REQUIRE(plan.workspace_bytes == plan.partial_k + 4 * 4 * 4 * 2048 * 64);
  REQUIRE(plan.k_sum_blocks * kSlotSumThreads * kSlotSumWidth == 4 * 2048 * 64);
  REQUIRE(plan.v_sum_blocks == 0);
}

TEST_CASE("flash_attention_backward on CUDA: sums have one order, whatever the batch and what is packed with it") {
  for (const HeadGroups heads : {kSigma, HeadGroups{32, 4, 4}, HeadGroups{12, 4, 6}})
    for (const int64_t s : {1, 100, 700, 2048, 5000}) {
      const CudaFlashAttentionBackwardPlan one = plan_of(params(heads, 1, s)), many = plan_of(params(heads, 7, s));
      CAPTURE(heads.n_q, heads.n_k, heads.n_v, s);
      REQUIRE(one.chunk_heads == many.chunk_heads);
      REQUIRE(one.chunks == many.chunks);
      REQUIRE(one.k_slots == many.k_slots);
      REQUIRE(one.v_slots == many.v_slots);
      REQUIRE(7 * one.key_blocks == many.key_blocks);
      REQUIRE(one.chunks <= 4);
      FlashAttentionBackwardParams packed = params(heads, 7, s);
      const int32_t cu_seqlens[8] = {};
      packed.forward.cu_seqlens_q = packed.forward.cu_seqlens_k = cu_seqlens;
      REQUIRE(plan_of(packed).chunk_heads == heads.q_per_group());
      REQUIRE(plan_of(packed).chunks == 1);
    }
}

TEST_CASE("flash_attention_backward on CUDA: chunks hold each q head once, slots all chunks of a head") {
  for (const HeadGroups heads : {kSigma, HeadGroups{32, 16, 4}, HeadGroups{12, 4, 6}, HeadGroups{12, 6, 4},
                                 HeadGroups{8, 8, 8}, HeadGroups{31, 1, 1}, HeadGroups{8, 1, 8}, HeadGroups{24, 3, 2}})
    for (int multiprocessors = 1; multiprocessors < 200; multiprocessors = multiprocessors * 3 / 2 + 1) {
      DeviceFacts facts = DeviceFacts::h200();
      facts.multiprocessors = multiprocessors;
      const CudaFlashAttentionBackwardPlan plan = plan_of(params(heads, 1, 300), facts);
      CAPTURE(heads.n_q, heads.n_k, heads.n_v, multiprocessors, plan.chunk_heads);
      REQUIRE(plan.chunk_heads >= 1);
      REQUIRE(plan.chunks * plan.chunk_heads >= heads.q_per_group());
      REQUIRE((plan.chunks - 1) * plan.chunk_heads < heads.q_per_group());
      for (int64_t q = 0; q < heads.q_per_group(); ++q) {
        REQUIRE(q / plan.chunk_heads - q / heads.q_per_k() * heads.q_per_k() / plan.chunk_heads < plan.k_slots);
        REQUIRE(q / plan.chunk_heads - q / heads.q_per_v() * heads.q_per_v() / plan.chunk_heads < plan.v_slots);
      }
      REQUIRE(plan.k_slots <= plan.chunks);
      REQUIRE(plan.v_slots <= plan.chunks);
    }
}

TEST_CASE(
    "flash_attention_backward on CUDA: softcap and dropout take the kernels with features, unaligned rows are seen") {
  FlashAttentionBackwardParams p = params(kSigma, 1, 256);
  REQUIRE(!plan_of(p).features);
  REQUIRE(plan_of(p).aligned);
  p.forward.softcap = 1.0;
  REQUIRE(plan_of(p).features);
  p.forward.softcap = 0.0, p.forward.dropout.threshold = 1;
  REQUIRE(plan_of(p).features);
  for (int64_t* stride : {&p.dout.stride_token, &p.forward.q.stride_batch, &p.forward.k.stride_group,
                          &p.forward.v.stride_token, &p.forward.out.stride_head}) {
    *stride += 4;
    REQUIRE(!plan_of(p).aligned);
    *stride -= 4;
  }
}

TEST_CASE("flash_attention_backward on CUDA: nothing to do is no blocks") {
  const CudaFlashAttentionBackwardPlan empty = plan_of(params(kSigma, 0, 256));
  REQUIRE(empty.row_blocks + empty.key_blocks + empty.query_blocks + empty.workspace_bytes == 0);
  FlashAttentionBackwardParams no_queries = params(kSigma, 1, 256);
  no_queries.forward.s_q = 0;
  REQUIRE(plan_of(no_queries).query_blocks == 0);
  REQUIRE(plan_of(no_queries).key_blocks > 0);  // zeros to write
}
