// The gradients of flash_attention on the emulated GPU against float64 on the CPU.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attention_problem.h"
#include "cuda/flash_attention_backward/key_gradients.cuh"
#include "cuda/flash_attention_backward/plain_gradients.cuh"
#include "cuda/flash_attention_backward/query_gradients.cuh"
#include "cuda/flash_attention_backward/sums.cuh"
#include "far.h"

using namespace diffqkv;
using namespace diffqkv::device;
using emulator::Schedule;

namespace {

template <class Kernel>
void run_kernel(const FlashAttentionBackwardCall& call, int64_t blocks, int64_t shared_bytes, Schedule schedule) {
  if (blocks == 0) return;
  const emulator::Counts counts = emulate<Kernel>(call, {blocks}, shared_bytes, schedule);
  REQUIRE(counts.matrix_wavefronts == counts.matrix_rows);
}

template <class E, int kDk, int kDv, bool kFeatures>
void run_gradients(const FlashAttentionBackwardCall& call, Schedule schedule) {
  const CudaFlashAttentionBackwardPlan& plan = call.plan;
  run_kernel<KeyGradients<E, kDk, kDv, kFeatures>>(call, plan.key_blocks, plan.key_shared_bytes, schedule);
  run_kernel<QueryGradients<E, kDk, kDv, kFeatures>>(call, plan.query_blocks, plan.query_shared_bytes, schedule);
}
template <class E, bool kFeatures>
void run_variant(const FlashAttentionBackwardCall& call, Schedule schedule) {
  switch (call.plan.variant) {
    case 0: return run_gradients<E, 32, 64, kFeatures>(call, schedule);
    case 1: return run_gradients<E, 64, 64, kFeatures>(call, schedule);
    case 2: return run_gradients<E, 64, 128, kFeatures>(call, schedule);
    case 3: return run_gradients<E, 128, 128, kFeatures>(call, schedule);
    case 4: return run_gradients<E, 256, 256, kFeatures>(call, schedule);
  }
  FAIL("no such variant");
}

// What the launch does, kernel by kernel.
template <class E>
CudaFlashAttentionBackwardPlan run(const FlashAttentionBackwardParams& p, const DeviceFacts& facts, Schedule schedule) {
  const CudaFlashAttentionBackwardPlan plan = plan_cuda_flash_attention_backward(p, facts);
  const std::vector<double> nan(static_cast<size_t>(plan.workspace_bytes / 8 + 1),
                                std::numeric_limits<double>::quiet_NaN());
  std::vector<double> workspace = nan;
  const FlashAttentionBackwardCall call{p, plan, reinterpret_cast<char*>(workspace.data())};
  run_kernel<RowSums<E>>(call, plan.row_blocks, 0, schedule);
  if constexpr (sizeof(typename E::T) == 2) {
    plan.features ? run_variant<E, true>(call, schedule) : run_variant<E, false>(call, schedule);
    run_kernel<SlotSums<E, false>>(call, plan.k_sum_blocks, 0, schedule);
    run_kernel<SlotSums<E, true>>(call, plan.v_sum_blocks, 0, schedule);
  } else {
    run_kernel<PlainKeyGradients<E, false>>(call, plan.key_blocks, 0, schedule);
    run_kernel<PlainKeyGradients<E, true>>(call, plan.value_blocks, 0, schedule);
    run_kernel<PlainQueryGradients<E>>(call, plan.query_blocks, 0, schedule);
  }
  if (p.dsinks != nullptr)
    run_kernel<SinkGradients<E>>(call, p.forward.heads.n_q, SinkGradients<E>::kSharedBytes, schedule);
  return plan;
}

// Results, P and dS are rounded, and so is the output that delta is made of: two to three times the rounding of a
// number.
template <class E>
constexpr double kTolerance = E::kDType == DType::f64   ? 1e-14
                              : E::kDType == DType::f32 ? 6e-7
                              : E::kDType == DType::f16 ? 5e-4
                                                        : 4e-3;

// Compares with the reference, and asks for the same bits however warps and blocks take turns and copies come.
template <class E>
CudaFlashAttentionBackwardPlan check(const AttentionCase& c, const DeviceFacts& facts = DeviceFacts::h200(),
                                     double softmax_scale = 0.0) {
  std::string text;
  capture_text(c, text);
  CAPTURE(text);
  AttentionProblem<E> problem(c);
  if (softmax_scale != 0.0) problem.softmax_scale = softmax_scale;
  problem.reference_backward();
  CudaFlashAttentionBackwardPlan plan;
  AttentionProblem<E> first = problem;
  static int cases = 0;  // of the other schedules in turn
  for (const Schedule schedule : {Schedule::forward, ++cases % 2 == 0 ? Schedule::reverse : Schedule::shuffled}) {
    AttentionProblem<E> again = problem;
    FlashAttentionBackwardParams p = again.backward_params();
    if constexpr (E::kDType == DType::f64) {
      again.dsinks64.assign(again.dsinks64.size(), std::numeric_limits<double>::quiet_NaN());
      p.forward.out.data = again.out.wide.data(), p.forward.lse = again.lse64.data(), p.dlse = again.dlse64.data();
      if (c.sinks) p.forward.sinks = again.sinks64.data(), p.dsinks = again.dsinks64.data();
    }
    plan = run<E>(p, facts, schedule);
    if (schedule == Schedule::forward) {
      again.check(again.dq, kTolerance<E>, "dq");
      again.check(again.dk, kTolerance<E>, "dk");
      again.check(again.dv, kTolerance<E>, "dv");
      for (size_t h = 0; c.sinks && h < again.dsinks.size(); ++h) {
        const double got = E::kDType == DType::f64 ? again.dsinks64[h] : double(again.dsinks[h]);
        const double want = problem.dsinks64[h];
        CAPTURE(h, got, want);
        REQUIRE(std::abs(got - want) <= kTolerance<E> * std::sqrt(double(problem.total_q)));
      }
      first = again;
    }
    const auto same = [](const auto& a, const auto& b) {
      return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
    };
    REQUIRE(same(again.dq.e, first.dq.e));
    REQUIRE(same(again.dk.e, first.dk.e));
    REQUIRE(same(again.dv.e, first.dv.e));
    REQUIRE(same(again.dsinks, first.dsinks));
  }
  return plan;
}

}  // namespace

TEST_CASE("emulated flash_attention_backward: head maps") {
  for (const HeadGroups heads :
       {HeadGroups{32, 4, 16}, HeadGroups{32, 16, 4}, HeadGroups{12, 4, 6}, HeadGroups{12, 6, 4}, HeadGroups{8, 8, 8},
        HeadGroups{8, 1, 1}, HeadGroups{8, 1, 8}, HeadGroups{5, 1, 5}})
    check<BF16>({.heads = heads, .s_q = 33, .s_k = 40, .causal = true, .sinks = true});
}

TEST_CASE("emulated flash_attention_backward: the walk over a group's heads, and its chunks") {
  DeviceFacts small = DeviceFacts::h200();
  small.multiprocessors = 0;
  for (const HeadGroups heads :
       {HeadGroups{32, 4, 16}, HeadGroups{12, 4, 6}, HeadGroups{12, 6, 4}, HeadGroups{8, 1, 8}}) {
    const AttentionCase c{.heads = heads, .s_q = 40, .s_k = 33, .d_k = 32, .causal = true};
    REQUIRE(check<F16>(c, small).chunks == 1);
    REQUIRE(check<BF16>({.heads = heads, .s_q = 9, .s_k = 33, .d_k = 8, .d_v = 256}, small).chunks == 1);
  }
  for (int multiprocessors = 1; multiprocessors < 8; ++multiprocessors) {
    small.multiprocessors = multiprocessors;
    check<BF16>({.heads = {12, 4, 6}, .s_q = 17, .s_k = 9}, small);
    check<F16>({.heads = {6, 2, 1}, .batch = 3, .s_q = 9, .s_k = 20, .padded = true}, small);
  }
}

TEST_CASE("emulated flash_attention_backward: the bits of an entry do not depend on the batch") {
  const AttentionCase c{.heads = {8, 1, 4}, .batch = 2, .s_q = 40, .s_k = 70, .causal = true};
  AttentionCase alone = c;
  alone.batch = 1;
  AttentionProblem<BF16> both(c), one(alone);
  both.reference_backward();
  DeviceFacts facts = DeviceFacts::h200();
  facts.multiprocessors = 2;  // enough for the blocks of two entries, were they counted together
  REQUIRE(run<BF16>(both.backward_params(), facts, Schedule::forward).k_slots == 4);
  const auto second_of = [](const auto& two, auto& x) {
    std::copy_n(two.end() - int64_t(x.size()), x.size(), x.begin());
  };
  second_of(both.q.e, one.q.e), second_of(both.k.e, one.k.e), second_of(both.v.e, one.v.e);
  second_of(both.out.e, one.out.e), second_of(both.dout.e, one.dout.e);
  second_of(both.lse, one.lse), second_of(both.dlse, one.dlse);
  run<BF16>(one.backward_params(), facts, Schedule::forward);
  const auto same = [](const auto& x, const auto& two) {
    return std::memcmp(x.data(), two.data() + two.size() - x.size(), x.size() * sizeof(x[0])) == 0;
  };
  REQUIRE(same(one.dq.e, both.dq.e));
  REQUIRE(same(one.dk.e, both.dk.e));
  REQUIRE(same(one.dv.e, both.dv.e));
}

TEST_CASE("emulated flash_attention_backward: dimensions") {
  for (const auto& [d_k, d_v] : {std::pair{64, 64},
                                 {32, 64},
                                 {128, 128},
                                 {64, 128},
                                 {256, 256},
                                 {40, 56},
                                 {8, 256},
                                 {256, 8},
                                 {128, 24},
                                 {8, 8}}) {
    check<BF16>({.heads = {4, 2, 4}, .s_q = 35, .s_k = 70, .d_k = d_k, .d_v = d_v, .causal = true});
    check<F16>({.heads = {2, 2, 1}, .s_q = 33, .s_k = 31, .d_k = d_k, .d_v = d_v, .softcap = 3.0, .dropout_p = 0.2});
  }
}

TEST_CASE("emulated flash_attention_backward: lengths") {
  for (const auto& [s_q, s_k] :
       {std::pair{0, 5}, {5, 0}, {1, 1}, {31, 33}, {33, 31}, {113, 203}, {203, 113}, {1, 300}, {300, 1}})
    check<BF16>({.heads = {4, 2, 4}, .batch = 2, .s_q = s_q, .s_k = s_k, .causal = true});
  check<F16>({.heads = {2, 1, 2}, .s_q = 203, .s_k = 140});
  const CudaFlashAttentionBackwardPlan small =
      check<F16>({.heads = {2, 1, 2}, .s_q = 70, .s_k = 140, .d_k = 256}, DeviceFacts::rtx4090());
  REQUIRE(small.key_stages == 1);
  REQUIRE(small.query_stages == 1);
}

TEST_CASE("emulated flash_attention_backward: windows, softcap, sinks, dropout") {
  const AttentionCase base{.heads = {6, 1, 3}, .s_q = 70, .s_k = 150};
  for (const auto& [left, right] : {std::pair{0, 0}, {5, 3}, {130, 0}, {-1, 7}, {40, -1}}) {
    AttentionCase c = base;
    c.window_left = left, c.window_right = right;
    check<BF16>(c);
  }
  for (const bool causal : {false, true}) {
    AttentionCase c = base;
    c.causal = causal;
    c.softcap = 2.0;
    check<BF16>(c);
    c.dropout_p = 0.25;
    check<F16>(c);
    c.sinks = true, c.window_left = 50;
    check<BF16>(c);
    c.softcap = 0.0;
    check<BF16>(c);
  }
  for (const double scale : {-0.2, 1e-300}) {
    AttentionCase c = base;
    c.causal = true;
    check<BF16>(c, DeviceFacts::h200(), scale);
    c.softcap = 1.5, c.window_left = 30;
    check<F16>(c, DeviceFacts::h200(), scale);
  }
}

TEST_CASE("emulated flash_attention_backward: masks at every place in a tile") {
  for (int64_t x = 0; x < 64; ++x) {
    check<BF16>({.heads = {1, 1, 1}, .s_q = 40, .s_k = 40 + x, .d_k = 32, .causal = true});
    check<BF16>({.heads = {1, 1, 1}, .s_q = 40, .s_k = 70, .d_k = 32, .window_left = x});
  }
}

TEST_CASE("emulated flash_attention_backward: padding, packing, strides with gaps") {
  const AttentionCase base{.heads = {4, 1, 2}, .batch = 4, .s_q = 41, .s_k = 140, .causal = true, .sinks = true};
  for (const int64_t gap : {0, 3, 8}) {
    AttentionCase c = base;
    c.gap = gap;
    c.padded = true;
    check<BF16>(c);
    c.padded = false, c.packed = true;
    check<BF16>(c);
    c.dropout_p = 0.1, c.softcap = 4.0, c.window_left = 33;
    check<F16>(c);
    c.packed = false, c.padded = true, c.causal = false, c.window_right = 20;
    check<F16>(c);
  }
}

TEST_CASE("emulated flash_attention_backward: fp32 and fp64") {
  for (const HeadGroups heads : {HeadGroups{12, 4, 6}, HeadGroups{4, 4, 1}, HeadGroups{3, 1, 3}}) {
    AttentionCase c{
        .heads = heads, .batch = 2, .s_q = 9, .s_k = 14, .d_k = 40, .d_v = 72, .causal = true, .sinks = true};
    check<F32>(c);
    check<F64>(c);
    c.gap = 3, c.window_left = 4, c.padded = true;
    check<F32>(c);
    c.padded = false, c.packed = true, c.dropout_p = 0.3, c.softcap = 2.0;
    check<F32>(c);
    check<F64>(c);
  }
  check<F32>({.heads = {1, 1, 1}, .s_q = 0, .s_k = 3, .d_k = 256, .d_v = 8});
  check<F64>({.heads = {1, 1, 1}, .s_q = 5, .s_k = 3, .d_k = 8, .d_v = 256, .causal = true});
}

TEST_CASE("emulated flash_attention_backward: huge scores") {
  // The one weight of a row is 1, so that dV is the sum of rows of dO; dQ and dK are the rounding of dP - delta times
  // huge numbers.
  const auto check_dv = []<class E>(E, const AttentionCase& c, float size) {
    std::string text;
    capture_text(c, text);
    CAPTURE(text, size);
    AttentionProblem<E> problem(c);
    problem.spread(size);
    problem.reference_backward();
    run<E>(problem.backward_params(), DeviceFacts::h200(), Schedule::forward);
    problem.check(problem.dv, kTolerance<E>, "dv");
  };
  AttentionCase base{.heads = {4, 1, 2}, .batch = 2, .s_q = 41, .s_k = 140};
  std::vector<AttentionCase> cases(3, base);
  cases[1].causal = cases[1].sinks = cases[1].padded = true;
  cases[2].packed = true, cases[2].window_left = 33, cases[2].dropout_p = 0.2;
  for (const AttentionCase& c : cases)
    for (const float size : {0x1p10f, 0x1p20f, 0x1p40f, 0x1p90f}) {
      check_dv(BF16{}, c, size);
      check_dv(F32{}, c, size);
    }
  // All scores reach the cap, beside which the logarithm of their number is nothing: by this lse each has all weight.
  base.softcap = 0x1p60;
  check_dv(BF16{}, base, 0x1p70f);
  check_dv(F32{}, base, 0x1p70f);
}

TEST_CASE("emulated flash_attention_backward: offsets beyond 2^31 elements") {
  const auto check_far = []<class E>(E, const AttentionCase& c) {
    for (const Apart apart : {Apart::rows, Apart::blocks}) {
      AttentionProblem<E> problem(c);
      problem.reference_backward();
      FlashAttentionBackwardParams p = problem.backward_params();
      Far far(apart);
      far.move(p.forward, problem);
      far.move(p.dout, c.batch, c.heads.n_q, c.packed ? problem.total_q : c.s_q, c.d_v);
      run<E>(p, DeviceFacts::h200(), Schedule::forward);
      problem.check(problem.dq, kTolerance<E>, "dq");
      problem.check(problem.dk, kTolerance<E>, "dk");
      problem.check(problem.dv, kTolerance<E>, "dv");
    }
  };
  AttentionCase c{.heads = {4, 1, 2}, .batch = 2, .s_q = 40, .s_k = 70, .causal = true};
  check_far(BF16{}, c);
  check_far(F32{}, c);
  c.packed = true, c.gap = 3;
  check_far(BF16{}, c);
}
