// decode_attention on the emulated GPU against float64 on the CPU.
#include <string>
#include <vector>

#include "attention_problem.h"
#include "cuda/decode_attention/decode_attention.cuh"
#include "far.h"

using namespace diffqkv;
using namespace diffqkv::device;

namespace {

template <class E>
emulator::Counts run(const AttentionParams& p, const DeviceFacts& facts, emulator::Schedule schedule) {
  const CudaDecodeAttentionPlan plan = plan_cuda_decode_attention(p, facts);
  std::vector<float> partials(static_cast<size_t>(plan.workspace_floats), std::numeric_limits<float>::quiet_NaN());
  std::vector<uint32_t> tickets(static_cast<size_t>(plan.tickets));
  const DecodeAttentionParams params{p, plan, partials.data(), tickets.data()};
  const emulator::Grid grid{plan.splits, p.heads.groups() * plan.chunks, p.batch};
  const auto run_as = [&]<class Kernel>() { return emulate<Kernel>(params, grid, plan.shared_bytes, schedule); };
  const auto counts = plan.large  ? run_as.template operator()<DecodeAttention<E, kLargeDecodeAttention, false>>()
                      : plan.bulk ? run_as.template operator()<DecodeAttention<E, kSmallDecodeAttention, true>>()
                                  : run_as.template operator()<DecodeAttention<E, kSmallDecodeAttention, false>>();
  for (const uint32_t ticket : tickets) REQUIRE(ticket == 0);
  REQUIRE(counts.matrix_wavefronts == counts.matrix_rows);
  return counts;
}

// Compares with the reference, and asks for the same bits however warps and blocks take turns and copies come.
template <class E>
void check(const AttentionCase& c, DeviceFacts facts = DeviceFacts::h200(), float size = 0.0f) {
  std::string text;
  capture_text(c, text);
  CAPTURE(text, size);
  AttentionProblem<E> problem(c);
  if (size > 0) problem.spread(size);
  problem.reference();
  std::vector<uint16_t> first;
  for (const emulator::Schedule schedule : emulator::kSchedules) {
    AttentionProblem<E> again(c);
    if (size > 0) again.spread(size);
    facts.capability = schedule == emulator::Schedule::shuffled ? 80 : facts.capability;
    run<E>(again.params(), facts, schedule);
    if (first.empty()) {
      first = again.out.e;
      again.out.wide = problem.out.wide, again.lse64 = problem.lse64;
      again.check_forward();
    }
    REQUIRE(again.out.e == first);
  }
}

}  // namespace

TEST_CASE("emulated decode_attention: head maps, dimensions, lengths") {
  for (const HeadGroups heads :
       {HeadGroups{32, 4, 16}, HeadGroups{32, 16, 4}, HeadGroups{12, 4, 6}, HeadGroups{12, 6, 4}, HeadGroups{8, 8, 8},
        HeadGroups{8, 1, 1}, HeadGroups{8, 1, 8}, HeadGroups{5, 1, 5}})
    check<BF16>({.heads = heads, .batch = 3, .s_k = 300, .padded = true, .cached = true});
  for (const auto& [d_k, d_v] : {std::pair{32, 64}, {128, 128}, {64, 128}, {40, 56}, {8, 256}, {256, 8}, {128, 24}})
    check<F16>({.heads = {8, 2, 4}, .batch = 2, .s_k = 200, .d_k = d_k, .d_v = d_v, .padded = true, .cached = true});
  for (const int64_t s_k : {1, 2, 31, 33, 128, 129, 1100})
    check<BF16>({.heads = {8, 2, 4}, .batch = 1, .s_k = s_k, .cached = true});
}

TEST_CASE("emulated decode_attention: several queries, causal among themselves") {
  for (const int64_t s_q : {2, 3, 5, 16}) {
    check<BF16>(
        {.heads = {32, 4, 16}, .batch = 2, .s_q = s_q, .s_k = 200, .causal = true, .padded = true, .cached = true});
    check<F16>(
        {.heads = {12, 4, 6}, .batch = 3, .s_q = s_q, .s_k = 150, .causal = true, .padded = true, .cached = true});
  }
  check<BF16>({.heads = {64, 1, 1}, .s_q = 4, .s_k = 70, .d_k = 64, .d_v = 64, .causal = true, .cached = true});
  check<BF16>({.heads = {64, 64, 1}, .s_q = 1, .s_k = 70, .d_k = 256, .d_v = 64, .causal = true, .cached = true});
  check<BF16>({.heads = {4, 2, 4}, .s_q = 16, .s_k = 7, .causal = true, .cached = true});  // more queries than keys
}

TEST_CASE("emulated decode_attention: pages, windows, softcap, sinks, unaligned rows") {
  const AttentionCase base{
      .heads = {16, 2, 8}, .batch = 3, .s_q = 2, .s_k = 400, .causal = true, .padded = true, .cached = true};
  for (const int64_t page_size : {1, 16, 48, 64}) {
    AttentionCase c = base;
    c.page_size = page_size;
    check<BF16>(c);
  }
  for (const int64_t left : {0, 5, 130}) {
    AttentionCase c = base;
    c.window_left = left;
    check<BF16>(c);
  }
  AttentionCase c = base;
  c.softcap = 2.0;
  check<F16>(c);
  c.sinks = true, c.page_size = 32, c.window_left = 200;
  check<BF16>(c);
  c.gap = 3;
  check<BF16>(c);
  c.gap = 8, c.page_size = 0;
  check<F16>(c);
}

TEST_CASE("emulated decode_attention: huge scores") {
  AttentionCase c{.heads = {16, 2, 8}, .batch = 2, .s_q = 2, .s_k = 250, .causal = true, .cached = true};
  for (const float size : {0x1p10f, 0x1p20f, 0x1p40f, 0x1p90f}) {
    c.softcap = 0.0, c.sinks = false;
    check<BF16>(c, DeviceFacts::h200(), size);
    c.softcap = 64.0 * double(size), c.sinks = true;
    check<BF16>(c, DeviceFacts::h200(), size);
  }
}

TEST_CASE("emulated decode_attention: little shared memory, and the bits of an entry do not depend on the batch") {
  const AttentionCase c{.heads = {32, 4, 16}, .batch = 2, .s_k = 300, .d_k = 128, .d_v = 128, .cached = true};
  check<BF16>(c, DeviceFacts::rtx4090());
  AttentionCase more = c;
  more.batch = 1;
  AttentionProblem<BF16> both(c), one(more);
  run<BF16>(both.params(), DeviceFacts::h200(), emulator::Schedule::forward);
  const size_t q = one.q.e.size(), k = one.k.e.size(), v = one.v.e.size();
  std::copy_n(both.q.e.begin() + static_cast<int64_t>(q), q, one.q.e.begin());
  std::copy_n(both.k.e.begin() + static_cast<int64_t>(k), k, one.k.e.begin());
  std::copy_n(both.v.e.begin() + static_cast<int64_t>(v), v, one.v.e.begin());
  run<BF16>(one.params(), DeviceFacts::h200(), emulator::Schedule::forward);
  REQUIRE(std::equal(one.out.e.begin(), one.out.e.end(), both.out.e.begin() + static_cast<int64_t>(one.out.e.size())));
}

TEST_CASE("emulated decode_attention reads each row of K and V once for the whole group") {
  const AttentionCase c{.heads = {32, 4, 16}, .s_k = 1024, .cached = true};
  AttentionProblem<BF16> problem(c);
  const auto counts = run<BF16>(problem.params(), DeviceFacts::h200(), emulator::Schedule::forward);
  CHECK(counts.copied_bytes == 1024 * (4 * 64 + 16 * 64) * 2);
}

TEST_CASE("emulated decode_attention: offsets beyond 2^31 elements") {
  for (const Apart apart : {Apart::rows, Apart::blocks})
    for (const int64_t page_size : {0, 16}) {
      AttentionProblem<BF16> problem(
          {.heads = {8, 2, 4}, .batch = 2, .s_q = 2, .s_k = 100, .cached = true, .page_size = page_size});
      problem.reference();
      AttentionParams p = problem.params();
      Far far(apart);
      far.move(p, problem);
      const DeviceFacts facts = apart == Apart::rows ? DeviceFacts::h200() : DeviceFacts::a100();
      REQUIRE(plan_cuda_decode_attention(p, facts).bulk == (facts.capability == 90));
      run<BF16>(p, facts, emulator::Schedule::forward);
      far.bring_back();
      problem.check_forward();
    }
}
