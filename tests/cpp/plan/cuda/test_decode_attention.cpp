// How decode_attention is cut into blocks on a GPU.
#include "plan/cuda/decode_attention.h"
#include "plan/cuda/tile_stride.h"
#include "support/catch.h"

using namespace diffqkv;

namespace {

AttentionParams params(HeadGroups heads, int64_t capacity, int64_t d_k, int64_t d_v, int64_t s_q = 1,
                       int64_t batch = 1) {
  AttentionParams p;
  p.heads = heads;
  p.batch = batch, p.s_q = s_q, p.s_k = capacity, p.d_k = d_k, p.d_v = d_v;
  p.q.dtype = DType::bf16;
  return p;
}
constexpr HeadGroups kSigma{32, 4, 16};

}  // namespace

TEST_CASE(
    "decode_attention on CUDA: a sequence of Sigma's gives each multiprocessor a block, up to splits of 1024 tokens") {
  for (const auto& [capacity, tokens] :
       {std::pair{1024, 128}, {4096, 128}, {8192, 256}, {16384, 512}, {32768, 1024}, {131072, 1024}}) {
    const CudaDecodeAttentionPlan plan =
        plan_cuda_decode_attention(params(kSigma, capacity, 64, 64), DeviceFacts::h200());
    CAPTURE(capacity);
    CHECK(plan.split_tokens == tokens);
    CHECK(plan.splits == capacity / tokens);
    CHECK(plan.chunks == 1);
    CHECK(plan.blocks == 4 * plan.splits);
    // What splitting costs: partial results written and read, beside the cache.
    CHECK(2.0 * 4.0 * double(plan.workspace_floats) <= 0.055 * plan.bytes);
  }
}

TEST_CASE("decode_attention on CUDA: splits depend on the capacity, never on the batch") {
  for (const int64_t capacity : {1, 100, 5000, 40000})
    for (const int64_t batch : {1, 7, 64}) {
      const CudaDecodeAttentionPlan one =
          plan_cuda_decode_attention(params(kSigma, capacity, 128, 128), DeviceFacts::h200());
      const CudaDecodeAttentionPlan many =
          plan_cuda_decode_attention(params(kSigma, capacity, 128, 128, 1, batch), DeviceFacts::h200());
      CHECK(one.split_tokens == many.split_tokens);
      CHECK(one.splits == many.splits);
      CHECK(many.blocks == batch * one.blocks);
      CHECK(many.tickets == batch * 4);
    }
}

TEST_CASE(
    "decode_attention on CUDA: a block alone on its multiprocessor keeps more tiles under way, of the same size") {
  const CudaDecodeAttentionPlan alone = plan_cuda_decode_attention(params(kSigma, 32768, 64, 64), DeviceFacts::h200());
  const CudaDecodeAttentionPlan many =
      plan_cuda_decode_attention(params(kSigma, 32768, 64, 64, 1, 8), DeviceFacts::h200());
  CHECK(alone.blocks <= DeviceFacts::h200().multiprocessors);
  CHECK(alone.stages == 4);
  CHECK(many.stages == 2);
  CHECK(2 * (many.shared_bytes + 1024) <= DeviceFacts::h200().shared_per_multiprocessor);
  CHECK(alone.tile_tokens == many.tile_tokens);  // which the bits depend on
}

TEST_CASE("decode_attention on CUDA: planning comes to an end for a device without shared memory") {
  DeviceFacts none = DeviceFacts::a100();
  none.shared_per_block = none.shared_per_multiprocessor = 1;
  const CudaDecodeAttentionPlan plan = plan_cuda_decode_attention(params(kSigma, 4096, 64, 64), none);
  CHECK(plan.blocks > 0);
  CHECK(plan.shared_bytes > none.shared_per_block);  // which the launch refuses
}

TEST_CASE("decode_attention on CUDA: every shape fits the device: shared memory, registers, tiles inside their split") {
  for (const DeviceFacts& facts : {DeviceFacts::h200(), DeviceFacts::a100(), DeviceFacts::rtx4090()})
    for (const HeadGroups heads :
         {kSigma, HeadGroups{32, 16, 4}, HeadGroups{12, 4, 6}, HeadGroups{8, 8, 8}, HeadGroups{64, 1, 1},
          HeadGroups{64, 64, 1}, HeadGroups{64, 1, 64}, HeadGroups{5, 1, 5}})
      for (const auto& [d_k, d_v] :
           {std::pair{64, 64}, {32, 64}, {128, 128}, {64, 128}, {40, 56}, {8, 256}, {256, 8}, {256, 256}})
        for (int64_t s_q = 1; s_q <= kMaxDecodeAttentionQueries; ++s_q) {
          const CudaDecodeAttentionPlan plan = plan_cuda_decode_attention(params(heads, 3000, d_k, d_v, s_q), facts);
          const DecodeAttentionSize size = plan.large ? kLargeDecodeAttention : kSmallDecodeAttention;
          CAPTURE(heads.n_q, heads.n_k, heads.n_v, d_k, d_v, s_q, facts.capability);
          REQUIRE(plan.shared_bytes <= facts.shared_per_block);
          REQUIRE(plan.stages >= 2);
          REQUIRE(plan.stages <= 4);
          REQUIRE(plan.split_tokens % plan.tile_tokens == 0);
          REQUIRE(plan.column_tiles <= size.tiles);
          REQUIRE(plan.chunks * plan.heads_per_chunk >= heads.q_per_group());
          REQUIRE((plan.chunks - 1) * plan.heads_per_chunk < heads.q_per_group());
          REQUIRE(plan.partial_floats % 4 == 0);
          // Every (V head, 16 dimensions, tile) has an accumulator.
          for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
            const DecodeAttentionChunk c =
                DecodeAttentionChunk::of(heads, heads.groups() - 1, plan.heads_per_chunk, chunk);
            REQUIRE(c.q_heads * s_q <= plan.column_tiles * kDecodeAttentionColumns);
            REQUIRE((c.v_heads * ((d_v + 15) / 16) + kDecodeAttentionWarps - 1) / kDecodeAttentionWarps *
                        plan.tiles_per_v_head <=
                    size.jobs);
            REQUIRE(c.k_heads * ((d_k + 15) / 16 * 16) <= plan.k_stride);
            REQUIRE(c.v_heads * ((d_v + 15) / 16 * 16) <= plan.v_stride);
          }
        }
}

TEST_CASE("rows of every width lie in different banks, eight at a time") {
  for (int width = kPiece; width <= 4096; width += kPiece) {
    const int stride = tile_stride(width);
    REQUIRE((stride >= width && stride <= width + kPiece));
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) banks |= 1u << (row * stride / kPiece % 8);
    REQUIRE(banks == 0xff);
  }
}

TEST_CASE("decode_attention on CUDA: bulk copies are for the GPUs whose code has them, and for aligned rows") {
  AttentionParams p = params(kSigma, 4096, 64, 64);
  CHECK(plan_cuda_decode_attention(p, DeviceFacts::h200()).bulk);
  CHECK(!plan_cuda_decode_attention(p, DeviceFacts::a100()).bulk);
  DeviceFacts newer = DeviceFacts::h200();
  newer.capability = 100;
  CHECK(!plan_cuda_decode_attention(p, newer).bulk);
  p.k.stride_token = 68;
  CHECK(!plan_cuda_decode_attention(p, DeviceFacts::h200()).aligned);
  CHECK(!plan_cuda_decode_attention(p, DeviceFacts::h200()).bulk);
}
