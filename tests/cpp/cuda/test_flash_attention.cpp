// flash_attention on the emulated GPU against float64 on the CPU.
#include <string>
#include <utility>
#include <vector>

#include "attention_problem.h"
#include "cuda/flash_attention/flash_attention.cuh"
#include "cuda/flash_attention/plain_attention.cuh"
#include "far.h"

using namespace diffqkv;
using namespace diffqkv::device;
using emulator::Schedule;

namespace {

const HeadGroups kSigma{32, 4, 16}, kSmall{4, 1, 2};

template <class E>
emulator::Counts run(const AttentionParams& p, const CudaFlashAttentionPlan& plan,
                     Schedule schedule = Schedule::forward) {
  emulator::Counts counts;
  const auto run_as = [&]<class Kernel>() {
    counts = emulate<Kernel>({p, plan}, {plan.blocks}, plan.shared_bytes, schedule);
  };
  [&]<size_t... i>(std::index_sequence<i...>) {
    const auto run_variant = [&]<size_t j>() {
      if (plan.variant != static_cast<int32_t>(j)) return;
      constexpr FlashAttentionVariant v = kFlashAttentionVariants[j];
      if (plan.features)
        run_as.template operator()<FlashAttention<E, v.d_k, v.d_v, true>>();
      else
        run_as.template operator()<FlashAttention<E, v.d_k, v.d_v, false>>();
    };
    (run_variant.template operator()<i>(), ...);
  }(std::make_index_sequence<kFlashAttentionVariantCount>());
  REQUIRE(counts.matrix_wavefronts == counts.matrix_rows);
  return counts;
}

// Compares with the reference; `all`: under every schedule, which must give the same bits.
template <class E>
void check(const AttentionCase& c, const DeviceFacts& facts = DeviceFacts::a100(), bool all = false) {
  std::string text;
  capture_text(c, text);
  CAPTURE(text);
  AttentionProblem<E> problem(c);
  problem.reference();
  const AttentionParams p = problem.params();
  const CudaFlashAttentionPlan plan = plan_cuda_flash_attention(p, facts);
  run<E>(p, plan);
  problem.check_forward();
  if (!all) return;
  const auto out = problem.out.e;
  const auto lse = problem.lse;
  for (const Schedule schedule : {Schedule::reverse, Schedule::shuffled}) {
    run<E>(p, plan, schedule);
    REQUIRE(problem.out.e == out);
    REQUIRE(problem.lse == lse);
  }
}

}  // namespace

TEST_CASE("emulated flash_attention: head maps") {
  for (const HeadGroups heads : {kSigma, HeadGroups{32, 16, 4}, HeadGroups{12, 4, 6}, HeadGroups{12, 6, 4},
                                 HeadGroups{8, 8, 8}, HeadGroups{8, 1, 1}, HeadGroups{8, 1, 8}, HeadGroups{5, 1, 5}})
    check<BF16>({.heads = heads, .s_q = 20, .s_k = 70, .causal = true});
}

TEST_CASE("emulated flash_attention: dimensions") {
  for (const auto& [d_k, d_v] : {std::pair{32, 64},
                                 {64, 64},
                                 {64, 128},
                                 {128, 128},
                                 {256, 256},
                                 {40, 56},
                                 {8, 256},
                                 {256, 8},
                                 {128, 24},
                                 {24, 8},
                                 {8, 8},
                                 {64, 96},
                                 {128, 64},
                                 {136, 192}})
    for (const int64_t gap : {0, 8, 3})
      check<F16>({.heads = kSmall, .s_q = 19, .s_k = 75, .d_k = d_k, .d_v = d_v, .gap = gap});
}

TEST_CASE("emulated flash_attention: lengths") {
  for (const auto& [s_q, s_k] : {std::pair{1, 1},
                                 {0, 5},
                                 {5, 0},
                                 {1, 33},
                                 {31, 64},
                                 {33, 31},
                                 {128, 128},
                                 {113, 203},
                                 {203, 113},
                                 {129, 65},
                                 {300, 10},
                                 {7, 500}})
    for (const bool causal : {false, true})
      check<BF16>({.heads = kSmall, .s_q = s_q, .s_k = s_k, .causal = causal}, DeviceFacts::h100());
}

TEST_CASE("emulated flash_attention: each feature by itself, then together") {
  const AttentionCase base{.heads = kSmall, .batch = 3, .s_q = 37, .s_k = 140};
  std::vector<AttentionCase> cases(12, base);
  cases[0].causal = true;
  cases[1].window_left = 20;
  cases[2].window_right = 9;
  cases[3].window_left = 60, cases[3].window_right = 0;
  cases[4].sinks = true;
  cases[5].softcap = 2.0;
  cases[6].dropout_p = 0.3;
  cases[7].padded = true;
  cases[8].packed = true;
  cases[9].cached = true, cases[9].causal = true, cases[9].padded = true;
  cases[10] = cases[9], cases[10].page_size = 48;
  cases[11] = cases[9], cases[11].page_size = 1, cases[11].gap = 3;
  for (const AttentionCase& c : cases) {
    check<BF16>(c);
    AttentionCase together = c;
    together.sinks = together.causal = true;
    together.softcap = 5.0, together.dropout_p = 0.2, together.window_left = 70;
    check<F16>(together, DeviceFacts::rtx4090());
  }
}

TEST_CASE("emulated flash_attention: any schedule gives the same bits, with one stage and with two") {
  for (const auto& [d_k, d_v] : {std::pair{32, 64}, {64, 64}, {64, 128}, {128, 128}, {256, 256}})
    for (const DeviceFacts& facts : {DeviceFacts::h100(), DeviceFacts::rtx4090()}) {
      const AttentionCase c{.heads = {2, 1, 2}, .s_q = 140, .s_k = 200, .d_k = d_k, .d_v = d_v, .causal = true};
      AttentionProblem<BF16> problem(c);
      CHECK(plan_cuda_flash_attention(problem.params(), facts).stages == (facts.capability == 90 || d_k == 32 ? 2 : 1));
      check<BF16>(c, facts, true);
      AttentionCase features = c;
      features.batch = 2, features.padded = features.sinks = true, features.dropout_p = 0.4, features.window_left = 90;
      features.page_size = 16, features.cached = true;
      check<F16>(features, facts, true);
    }
}

TEST_CASE("emulated flash_attention: the bits of a query do not depend on the batch, nor on its place in a block") {
  // The second sequence of a packed batch, against the same rows as a batch of one.
  const AttentionCase packed{.heads = kSmall, .batch = 2, .s_q = 150, .s_k = 180, .causal = true, .packed = true};
  AttentionProblem<BF16> many(packed);
  const AttentionParams all = many.params();
  run<BF16>(all, plan_cuda_flash_attention(all, DeviceFacts::h100()));
  AttentionParams one = all;
  const int64_t s_q = many.cu_q[2] - many.cu_q[1], first = many.cu_q[1], h = packed.heads.n_q, d = packed.d_v;
  std::vector<uint16_t> out(static_cast<size_t>(s_q * h * d));
  std::vector<float> lse(static_cast<size_t>(s_q * h));
  const auto from = [](void* data, int64_t elements) { return static_cast<uint16_t*>(data) + elements; };
  one.batch = 1, one.cu_seqlens_q = one.cu_seqlens_k = nullptr, one.paging = {};
  one.s_q = s_q, one.s_k = many.cu_k[2] - many.cu_k[1], one.paging.page_size = one.s_k;
  one.q.data = from(all.q.data, first * all.q.stride_token);
  one.k.data = from(all.k.data, many.cu_k[1] * all.k.stride_token);
  one.v.data = from(all.v.data, many.cu_k[1] * all.v.stride_token);
  one.out = {out.data(), 0, d, h * d, DType::bf16};
  one.lse = lse.data();
  run<BF16>(one, plan_cuda_flash_attention(one, DeviceFacts::a100()));
  for (size_t i = 0; i < out.size(); ++i) REQUIRE(out[i] == many.out.e[static_cast<size_t>(first * h * d) + i]);

  // Its last queries alone: other blocks, other first tiles.
  const int64_t few = 20;
  std::vector<uint16_t> last(static_cast<size_t>(few * h * d));
  one.q.data = from(one.q.data, (s_q - few) * one.q.stride_token);
  one.out.data = last.data();
  one.s_q = few;
  run<BF16>(one, plan_cuda_flash_attention(one, DeviceFacts::h100()));
  for (size_t i = 0; i < last.size(); ++i) REQUIRE(last[i] == out[static_cast<size_t>((s_q - few) * h * d) + i]);
}

TEST_CASE("emulated flash_attention: a negative softmax scale is that of negative queries, 0 weighs all keys alike") {
  for (const double softcap : {0.0, 3.0}) {
    const AttentionCase c{.heads = kSmall, .s_q = 40, .s_k = 90, .causal = true, .softcap = softcap};
    AttentionProblem<F16> problem(c);
    AttentionParams p = problem.params();
    for (uint16_t& x : problem.q.e) x ^= 0x8000;
    run<F16>(p, plan_cuda_flash_attention(p, DeviceFacts::a100()));
    const auto out = problem.out.e;
    for (uint16_t& x : problem.q.e) x ^= 0x8000;
    p.softmax_scale = -p.softmax_scale;
    run<F16>(p, plan_cuda_flash_attention(p, DeviceFacts::a100()));
    REQUIRE(problem.out.e == out);
    p.softmax_scale = 0.0;
    run<F16>(p, plan_cuda_flash_attention(p, DeviceFacts::a100()));
    for (int64_t i = 0; i < c.s_q; ++i) {
      CAPTURE(i);
      REQUIRE(problem.lse[static_cast<size_t>(i)] == Approx(std::log(double(c.s_k - c.s_q + i + 1))).margin(1e-5));
    }
  }
}

TEST_CASE(
    "emulated flash_attention: NaN stays in its row, and what is infinite is not met by zeros that stand for no key") {
  const AttentionCase c{.heads = {1, 1, 1}, .s_q = 40, .s_k = 80, .causal = true};
  AttentionProblem<F16> problem(c);
  const AttentionParams p = problem.params();
  const int64_t bad_query = 5, bad_dim = 3;
  problem.q.e[static_cast<size_t>(bad_query * c.d_k)] = F16::put(NAN);
  problem.v.e[static_cast<size_t>((c.s_k - 1) * c.d_v + bad_dim)] = F16::put(INFINITY);  // of the last query alone
  run<F16>(p, plan_cuda_flash_attention(p, DeviceFacts::a100()));
  for (int64_t i = 0; i < c.s_q; ++i) {
    CAPTURE(i);
    REQUIRE(std::isnan(F16::get(problem.out.e[static_cast<size_t>(i * c.d_v)])) == (i == bad_query));
    REQUIRE(std::isnan(problem.lse[static_cast<size_t>(i)]) == (i == bad_query));
  }
  REQUIRE(F16::get(problem.out.e[static_cast<size_t>((c.s_q - 1) * c.d_v + bad_dim)]) == INFINITY);
}

TEST_CASE("emulated flash_attention: mathematics is done for the tiles in sight alone") {
  const auto products = [](int64_t left, int64_t d) {
    const AttentionCase c{
        .heads = {1, 1, 1}, .s_q = 128, .s_k = 1024, .d_k = d, .d_v = d, .causal = true, .window_left = left};
    AttentionProblem<BF16> problem(c);
    const AttentionParams p = problem.params();
    return run<BF16>(p, plan_cuda_flash_attention(p, DeviceFacts::h100())).mma;
  };
  // A warp's products for a tile of 64 keys: 2 row tiles x 8 key tiles x 4 steps of d_k, and as many for V.
  const int64_t tile = 4 * 2 * (2 * 8 * 4);
  CHECK(products(-1, 64) == 16 * tile);
  CHECK(products(64, 64) == 3 * tile);
  // 136 dimensions in the kernel for 256: what is not there costs nothing. Two blocks of 64 queries, 32 keys a tile.
  CHECK(products(-1, 136) == (1024 - 64 + 1024) / 32 * 4 * (4 * 9 + 2 * 18));
}

namespace {

template <class T>
void check_plain(const AttentionCase& c, double tolerance) {
  std::string text;
  capture_text(c, text);
  CAPTURE(text);
  AttentionProblem<F32> problem(c);
  problem.reference();
  AttentionParams p = problem.params();
  std::vector<double> out, lse;
  if constexpr (sizeof(T) == 8) {
    out.assign(problem.out.e.size(), std::nan("")), lse.assign(problem.lse.size(), std::nan(""));
    p.q.dtype = p.k.dtype = p.v.dtype = p.out.dtype = DType::f64;
    p.q.data = problem.q.wide.data(), p.k.data = problem.k.wide.data(), p.v.data = problem.v.wide.data();
    p.out.data = out.data(), p.lse = lse.data();
    if (c.sinks) p.sinks = problem.sinks64.data();
  }
  const CudaFlashAttentionPlan plan = plan_cuda_flash_attention(p, DeviceFacts::a100());
  for (const Schedule schedule : emulator::kSchedules) {
    emulate<PlainAttention<T>>({p, plan}, {plan.blocks}, plan.shared_bytes, schedule);
    if constexpr (sizeof(T) == 4) {
      problem.check_forward(tolerance);
    } else {
      for (size_t i = 0; i < out.size(); ++i) {
        REQUIRE(std::isnan(out[i]) == std::isnan(problem.out.wide[i]));
        if (!std::isnan(out[i])) REQUIRE(out[i] == Approx(problem.out.wide[i]).margin(tolerance));
      }
      for (size_t i = 0; i < lse.size(); ++i)
        REQUIRE((lse[i] == problem.lse64[i] || lse[i] == Approx(problem.lse64[i]).margin(tolerance)));
    }
  }
}

}  // namespace

TEST_CASE("emulated flash_attention: fp32 and fp64") {
  const AttentionCase base{.heads = {6, 2, 3}, .batch = 3, .s_q = 11, .s_k = 45, .d_k = 24, .d_v = 40};
  std::vector<AttentionCase> cases(8, base);
  cases[1].causal = true, cases[1].s_q = 50;
  cases[2].window_left = 10, cases[2].window_right = 3, cases[2].sinks = true;
  cases[3].softcap = 2.0, cases[3].padded = true;
  cases[4].dropout_p = 0.3, cases[4].causal = true;
  cases[5].packed = true, cases[5].sinks = cases[5].causal = true, cases[5].gap = 3;
  cases[6].cached = cases[6].padded = cases[6].causal = true, cases[6].page_size = 7;
  cases[7] = cases[6], cases[7].s_q = 1, cases[7].sinks = true, cases[7].d_v = 256;
  for (const AttentionCase& c : cases) {
    check_plain<float>(c, c.softcap > 0 ? 2e-5 : 2e-6);
    check_plain<double>(c, 1e-12);
  }
}

TEST_CASE("emulated flash_attention: huge scores") {
  AttentionCase base{.heads = kSmall, .batch = 2, .s_q = 70, .s_k = 250};
  std::vector<AttentionCase> cases(4, base);
  cases[1].causal = cases[1].sinks = cases[1].padded = true;
  cases[2].softcap = 64.0, cases[2].window_left = 40;
  cases[3].packed = true;
  for (AttentionCase c : cases)
    for (const float size : {0x1p10f, 0x1p20f, 0x1p40f, 0x1p90f}) {
      c.softcap = c.softcap > 0 ? 64.0 * double(size) : 0.0;
      std::string text;
      capture_text(c, text);
      CAPTURE(text, size);
      AttentionProblem<BF16> problem(c);
      problem.spread(size);
      problem.reference();
      const AttentionParams p = problem.params();
      run<BF16>(p, plan_cuda_flash_attention(p, DeviceFacts::h100()));
      problem.check_forward();
      AttentionProblem<F32> plain(c);
      plain.spread(size);
      plain.reference();
      const AttentionParams q = plain.params();
      const CudaFlashAttentionPlan plan = plan_cuda_flash_attention(q, DeviceFacts::h100());
      emulate<PlainAttention<float>>({q, plan}, {plan.blocks}, plan.shared_bytes, Schedule::forward);
      plain.check_forward();
    }
}

TEST_CASE("emulated flash_attention: offsets beyond 2^31 elements") {
  const auto check_far = []<class E>(E, const AttentionCase& c, auto run_kernel) {
    for (const Apart apart : {Apart::rows, Apart::blocks}) {
      AttentionProblem<E> problem(c);
      problem.reference();
      AttentionParams p = problem.params();
      Far far(apart);
      far.move(p, problem);
      run_kernel(p, plan_cuda_flash_attention(p, DeviceFacts::h100()));
      far.bring_back();
      problem.check_forward();
    }
  };
  const auto flash = [](const AttentionParams& p, const CudaFlashAttentionPlan& plan) { run<BF16>(p, plan); };
  const auto plain = [](const AttentionParams& p, const CudaFlashAttentionPlan& plan) {
    emulate<PlainAttention<float>>({p, plan}, {plan.blocks}, plan.shared_bytes, Schedule::forward);
  };
  AttentionCase c{.heads = kSmall, .batch = 2, .s_q = 70, .s_k = 100, .causal = true};
  check_far(BF16{}, c, flash);
  check_far(F32{}, c, plain);
  c.packed = true;
  check_far(BF16{}, c, flash);
  c.packed = false, c.cached = true, c.page_size = 16, c.gap = 3;
  check_far(BF16{}, c, flash);
  check_far(F32{}, c, plain);
}
