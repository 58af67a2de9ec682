#include <algorithm>
#include <vector>

#include "plan/cuda/selective_v_attention.h"
#include "support/catch.h"

using namespace diffqkv;

namespace {

SelectiveVAttentionParams sigma(int64_t batch, int64_t capacity, int64_t top_k, int64_t d = 64,
                                DType dtype = DType::bf16) {
  SelectiveVAttentionParams sp;
  AttentionParams& p = sp.attention;
  p.heads = {32, 4, 16};
  p.batch = batch, p.s_q = 1, p.s_k = capacity, p.d_k = p.d_v = d;
  p.q.dtype = p.k.dtype = p.v.dtype = dtype;
  p.paging.page_size = capacity;
  p.k.stride_token = p.v.stride_token = d;
  p.softmax_scale = 0.125;
  sp.top_k = top_k;
  return sp;
}
const DeviceFacts kDevices[] = {DeviceFacts::h100(), DeviceFacts::h200(), DeviceFacts::a100(), DeviceFacts::rtx4090()};

}  // namespace

TEST_CASE(
    "selective_v_attention on CUDA: chunks and quanta cover the capacity, and chunks leave all that may be wanted") {
  for (const DeviceFacts& facts : kDevices)
    for (const int64_t capacity : {1, 511, 512, 2049, 32768, 1000000})
      for (const int64_t top_k : {int64_t{1}, int64_t{99}, int64_t{4096}, int64_t{1} << 40})
        for (const float max_error : {-1.0f, 0.5f}) {
          SelectiveVAttentionParams sp = sigma(3, capacity, top_k);
          sp.max_error = max_error;
          const CudaSelectiveVAttentionPlan plan = plan_cuda_selective_v_attention(sp, facts);
          CAPTURE(capacity, top_k, max_error, facts.capability);
          const int64_t wanted = std::min(capacity, std::min(capacity, top_k) * (max_error < 0 ? 1 : 4));
          REQUIRE(plan.wanted == wanted);
          REQUIRE(int64_t{plan.chunks} * plan.chunk_tokens >= capacity);
          REQUIRE((int64_t{plan.chunks} - 1) * plan.chunk_tokens < capacity);
          REQUIRE(int64_t{plan.quanta} * kSelectiveVAttentionQuantum >= capacity);
          REQUIRE(plan.chunk_tokens % kSelectiveVAttentionQuantum == 0);
          REQUIRE(plan.candidates >= std::min<int64_t>(plan.chunk_tokens, wanted));
          REQUIRE(plan.candidates % 2 == 0);
        }
}

TEST_CASE("selective_v_attention on CUDA: chunks are as large as leave enough blocks") {
  const DeviceFacts h200 = DeviceFacts::h200();
  const auto chunk = [&](int64_t batch, int64_t capacity, DType dtype = DType::bf16) {
    return plan_cuda_selective_v_attention(sigma(batch, capacity, 100, 64, dtype), h200).chunk_tokens;
  };
  REQUIRE(chunk(1, 4096) == 512);
  REQUIRE(chunk(1, 32768) == 512);
  REQUIRE(chunk(1, 65536) == 1024);
  REQUIRE(chunk(1, 131072) == 2048);
  REQUIRE(chunk(64, 4096) == 2048);
  REQUIRE(chunk(64, 131072) == 2048);
  REQUIRE(chunk(64, 131072, DType::f32) == 1024);
}

TEST_CASE("selective_v_attention on CUDA: shared memory fits every device at every shape") {
  for (const DeviceFacts& facts : kDevices)
    for (const DType dtype : {DType::f32, DType::f16})
      for (const int64_t d : {8, 64, 104, 256})
        for (const int64_t top_k : {1, 100, 2000, 100000}) {
          const CudaSelectiveVAttentionPlan plan =
              plan_cuda_selective_v_attention(sigma(8, 100000, top_k, d, dtype), facts);
          CAPTURE(facts.capability, d, top_k);
          REQUIRE(plan.score_shared <= facts.shared_per_block);
          REQUIRE(plan.gather_shared <= facts.shared_per_block);
          REQUIRE(2 * (plan.gather_shared + 1024) <= facts.shared_per_multiprocessor);
          const int64_t keys = int64_t{8} * plan.chunks * plan.candidates;
          REQUIRE(plan.gather_shared == kSelectiveVAttentionGatherBytes + (plan.keys_in_shared ? keys : 0) +
                                            (plan.list_in_shared ? int64_t{8} * plan.wanted : 0));
        }
  // The rows of q in shared memory lie in different banks: an odd number of 16-byte pieces.
  for (int d = 8; d <= 256; d += 8)
    for (const int bytes : {2, 4}) {
      REQUIRE(selective_v_attention_q_bytes(d, bytes) / 16 % 2 == 1);
      REQUIRE(selective_v_attention_q_bytes(d, bytes) >= (d + 31) / 32 * 32 * bytes);
    }
}

TEST_CASE("selective_v_attention on CUDA: the workspace is bounded, by more launches") {
  for (const int64_t batch : {1, 64, 1000})
    for (const int64_t s_q : {1, 16, 5000})
      for (const int64_t top_k : {100, 100000}) {
        SelectiveVAttentionParams sp = sigma(batch, 131072, top_k);
        sp.attention.s_q = s_q;
        sp.keep_last = 64;
        const CudaSelectiveVAttentionPlan plan = plan_cuda_selective_v_attention(sp, DeviceFacts::h200());
        CAPTURE(batch, s_q, top_k);
        REQUIRE_FALSE(plan.empty());
        REQUIRE((plan.queries == s_q || plan.entries == 1));
        const bool one = plan.queries == 1 && plan.entries == 1;
        REQUIRE(plan.workspace_bytes <= (one ? int64_t{1} << 40 : kSelectiveVAttentionWorkspaceBytes + 2048));
        const int64_t rows = plan.entries * plan.queries * 32;
        REQUIRE(plan.keys_at >= rows * plan.quanta * 8);
        REQUIRE(plan.forced_at >= plan.keys_at + rows * plan.chunks * plan.candidates * 8);
        REQUIRE(plan.list_at >= plan.forced_at + rows * 64 * 4);
        REQUIRE(plan.workspace_bytes >= plan.list_at + (plan.list_in_shared ? 0 : rows * plan.wanted * 8));
        for (const int64_t at : {plan.keys_at, plan.forced_at, plan.list_at, plan.parts_at}) REQUIRE(at % 256 == 0);
      }
  // Sigma's decode needs one launch of each kernel, and little memory.
  REQUIRE(plan_cuda_selective_v_attention(sigma(64, 131072, 100), DeviceFacts::h200()).entries == 64);
  REQUIRE(plan_cuda_selective_v_attention(sigma(1, 32768, 100), DeviceFacts::h200()).workspace_bytes < 2 << 20);
}

TEST_CASE("selective_v_attention on CUDA: more rows than the cache holds ask for no more memory") {
  for (const float max_error : {-1.0f, 0.5f}) {
    SelectiveVAttentionParams all = sigma(8, 10000, 10000), more = sigma(8, 10000, INT64_MAX);
    all.max_error = more.max_error = max_error;
    all.keep_first = all.keep_last = 10000, more.keep_first = more.keep_last = INT64_MAX;
    const CudaSelectiveVAttentionPlan plan = plan_cuda_selective_v_attention(more, DeviceFacts::h200());
    REQUIRE(plan.wanted == 10000);
    REQUIRE(plan.workspace_bytes == plan_cuda_selective_v_attention(all, DeviceFacts::h200()).workspace_bytes);
    REQUIRE(plan.gather_shared == plan_cuda_selective_v_attention(all, DeviceFacts::h200()).gather_shared);
  }
}

TEST_CASE("selective_v_attention on CUDA: a pass over V only for what needs it") {
  std::vector<float> stats(3 * 16 * 65);
  for (const Tail tail : {Tail::drop, Tail::renorm, Tail::mean})
    for (const bool want_bound : {false, true})
      for (const bool given : {false, true}) {
        SelectiveVAttentionParams sp = sigma(3, 5000, 10);
        sp.tail = tail, sp.want_bound = want_bound;
        if (given) sp.v_stats = stats.data();
        const CudaSelectiveVAttentionPlan plan = plan_cuda_selective_v_attention(sp, DeviceFacts::a100());
        REQUIRE(plan.parts == (!given && (want_bound || tail == Tail::mean) ? 3 : 0));
        REQUIRE(plan.workspace_bytes - plan.parts_at == int64_t{4} * plan.parts * 3 * 16 * 65);
      }
}

TEST_CASE("selective_v_attention on CUDA: rows are read in vectors where they are aligned to them") {
  SelectiveVAttentionParams sp = sigma(1, 100, 10);
  REQUIRE(plan_cuda_selective_v_attention(sp, DeviceFacts::a100()).k_vectors);
  sp.attention.k.stride_token = 65;
  REQUIRE_FALSE(plan_cuda_selective_v_attention(sp, DeviceFacts::a100()).k_vectors);
  REQUIRE(plan_cuda_selective_v_attention(sp, DeviceFacts::a100()).v_vectors);
  sp.attention.v.stride_page = 7;
  REQUIRE_FALSE(plan_cuda_selective_v_attention(sp, DeviceFacts::a100()).v_vectors);
}

TEST_CASE("selective_v_attention on CUDA: nothing to launch for nothing") {
  REQUIRE(plan_cuda_selective_v_attention(sigma(0, 100, 10), DeviceFacts::a100()).empty());
  SelectiveVAttentionParams sp = sigma(1, 100, 10);
  sp.attention.s_q = 0;
  REQUIRE(plan_cuda_selective_v_attention(sp, DeviceFacts::a100()).empty());
  REQUIRE_FALSE(plan_cuda_selective_v_attention(sigma(1, 0, 10), DeviceFacts::a100())
                    .empty());  // results are still to be written
}
