// kv_cache_update on the emulated GPU, against the definition of the op: every slot, and v_stats.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/kv_cache_update/kv_cache_update.cuh"
#include "far.h"
#include "support/catch.h"
#include "support/kv_element.h"

using namespace diffqkv;
using namespace diffqkv::device;

namespace {

// One rounding of a result near 1.
template <class E>
constexpr double kTolerance = E::kDType == DType::f32   ? 1e-6
                              : E::kDType == DType::f16 ? 1.0 / 2048
                                                        : 1.0 / 256;

template <class E>
typename E::T poison() {
  return E::put(std::numeric_limits<float>::quiet_NaN());
}

struct Case {
  HeadGroups heads;
  int64_t d_k, d_v, d_rot, batch, s_new;
  KLayout layout;
  bool paged, int64_positions, rope_f32, stats;
  int64_t offset;  // elements before the first one of k and v; odd ones forbid 16-byte loads
};

// Tensors and parameters of a case. k and v are [batch, s_new, heads, dim] in memory, as a projection leaves them.
template <class E>
struct Problem {
  using T = typename E::T;
  static constexpr int64_t kPageSize = 32, kMaxBlocks = 4, kCapacity = kPageSize * kMaxBlocks;
  Case c;
  int64_t pages;
  std::vector<T> k, v, k_cache, v_cache, rope_e[2];
  std::vector<float> rope_f[2];
  std::vector<int32_t> table, positions32;
  std::vector<int64_t> positions;
  std::vector<float> stats_before, stats;  // [batch, n_v, d_v + 1]
  KvCacheUpdateParams p;

  explicit Problem(const Case& the_case) : c(the_case) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<T>& x, int64_t n) {
      x.resize(static_cast<size_t>(n));
      for (T& value : x) value = E::put(normal(random));
    };
    const HeadGroups& h = c.heads;
    fill(k, c.offset + c.batch * c.s_new * h.n_k * c.d_k);
    fill(v, c.offset + c.batch * c.s_new * h.n_v * c.d_v);
    pages = c.paged ? c.batch * kMaxBlocks + 2 : c.batch;
    const int64_t page_size = c.paged ? kPageSize : kCapacity;
    k_cache.assign(static_cast<size_t>(pages * h.n_k * page_size * c.d_k), poison<E>());
    v_cache.assign(static_cast<size_t>(pages * h.n_v * page_size * c.d_v), poison<E>());

    // Distinct positions in a shuffled order; some tokens skipped, some out of range.
    for (int64_t b = 0; b < c.batch; ++b) {
      std::vector<int64_t> order(kCapacity);
      std::iota(order.begin(), order.end(), int64_t{0});
      std::shuffle(order.begin(), order.end(), random);
      for (int64_t t = 0; t < c.s_new; ++t) {
        int64_t position = order[static_cast<size_t>(t)];
        if (t % 7 == 3) position = -1;
        if (t % 11 == 5) position = kCapacity + t;
        if (t % 13 == 6) position = std::numeric_limits<int32_t>::min();
        positions.push_back(position);
        positions32.push_back(static_cast<int32_t>(position));
      }
    }
    if (c.paged) {
      std::vector<int32_t> ids(static_cast<size_t>(pages));
      std::iota(ids.begin(), ids.end(), 0);
      std::shuffle(ids.begin(), ids.end(), random);
      for (int64_t b = 0; b < c.batch; ++b) {
        for (int64_t i = 0; i < kMaxBlocks; ++i) table.push_back(ids[static_cast<size_t>(b * kMaxBlocks + i)]);
        table.back() = b % 2 == 0 ? -1 : std::numeric_limits<int32_t>::max();
      }
    }
    for (int i = 0; i < 2; ++i) {
      fill(rope_e[i], c.s_new * c.d_rot);
      for (const T x : rope_e[i]) rope_f[i].push_back(E::get(x));
    }

    for (int64_t i = 0; i < c.batch * h.n_v * (c.d_v + 1); ++i)  // the norm: sometimes larger than any new one
      stats_before.push_back((i + 1) % (c.d_v + 1) != 0 ? normal(random) : (i / (c.d_v + 1)) % 3 == 0 ? 100.0f : 0.0f);
    stats = stats_before;

    p.heads = h;
    p.batch = c.batch;
    p.s_new = c.s_new;
    p.d_k = c.d_k;
    p.d_v = c.d_v;
    p.d_rot = c.d_rot;
    p.k_new = {k.data() + c.offset, c.s_new * h.n_k * c.d_k, c.d_k, h.n_k * c.d_k, E::kDType};
    p.v_new = {v.data() + c.offset, c.s_new * h.n_v * c.d_v, c.d_v, h.n_v * c.d_v, E::kDType};
    p.k_cache = rows(k_cache.data(), h.n_k, c.d_k, page_size);
    if (c.layout == KLayout::panels) {
      p.k_cache.layout = KLayout::panels;
      p.k_cache.stride_panel = kPanelTokens * c.d_k;
      p.k_cache.stride_head = page_size * c.d_k;
      p.k_cache.stride_group = h.k_per_group() * p.k_cache.stride_head;
      p.k_cache.stride_token = 0;
    }
    p.v_cache = rows(v_cache.data(), h.n_v, c.d_v, page_size);
    p.positions = c.int64_positions ? static_cast<const void*>(positions.data()) : positions32.data();
    p.positions_int64 = c.int64_positions;
    p.positions_stride_batch = c.s_new;
    p.positions_stride_token = 1;
    if (c.d_rot > 0) {
      p.cos = c.rope_f32 ? static_cast<const void*>(rope_f[0].data()) : rope_e[0].data();
      p.sin = c.rope_f32 ? static_cast<const void*>(rope_f[1].data()) : rope_e[1].data();
      p.rope_stride_token = c.d_rot;
      p.rope_dtype = c.rope_f32 ? DType::f32 : E::kDType;
    }
    if (c.paged) p.paging.block_table = table.data();
    p.paging.stride = kMaxBlocks;
    p.paging.page_size = page_size;
    p.pages = pages;
    p.capacity = kCapacity;
    if (c.stats) p.v_stats = stats.data();
  }

  // [pages, G, page_size, heads / G, dim]
  KvView rows(void* data, int64_t heads, int64_t dim, int64_t page_size) const {
    KvView view;
    view.data = data;
    view.dtype = E::kDType;
    view.stride_head = dim;
    view.stride_token = heads / c.heads.groups() * dim;
    view.stride_group = page_size * view.stride_token;
    view.stride_page = c.heads.groups() * view.stride_group;
    return view;
  }

  void run(emulator::Schedule schedule) {
    const CudaKvCacheUpdatePlan plan = plan_cuda_kv_cache_update(p);
    plan.width == 1 ? run<1>(plan, schedule) : run<16 / sizeof(T)>(plan, schedule);
  }
  template <int N>
  void run(const CudaKvCacheUpdatePlan& plan, emulator::Schedule schedule) {
    REQUIRE(plan.width == N);
    emulate<KvCacheUpdate<E, N>>({p, plan}, {plan.blocks}, KvCacheUpdate<E, N>::kSharedBytes, schedule);
  }

  // Page and token of a new token, by the definition; page -1 where it has none.
  KvSlot slot(int64_t b, int64_t t) const {
    const int64_t position = positions[static_cast<size_t>(b * c.s_new + t)];
    if (position < 0 || position >= kCapacity) return {-1, 0};
    if (!c.paged) return {b, position};
    const int32_t page = table[static_cast<size_t>(b * kMaxBlocks + position / kPageSize)];
    if (page < 0 || page >= pages) return {-1, 0};
    return {page, position % kPageSize};
  }

  double rotated(int64_t b, int64_t head, int64_t t, int64_t dim) const {
    const T* row = k.data() + c.offset + ((b * c.s_new + t) * c.heads.n_k + head) * c.d_k;
    if (dim >= c.d_rot) return E::get(row[dim]);
    const int64_t half = c.d_rot / 2;
    const double other = dim < half ? -E::get(row[dim + half]) : E::get(row[dim - half]);
    const size_t at = static_cast<size_t>(t * c.d_rot + dim);
    return double(E::get(row[dim])) * rope_f[0][at] + other * rope_f[1][at];
  }

  // Every element of both caches: what was written, or the poison it held before.
  void check() const {
    std::vector<double> want_k(k_cache.size(), std::nan("")), want_v(v_cache.size(), std::nan(""));
    const HeadGroups& h = c.heads;
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t t = 0; t < c.s_new; ++t) {
        const KvSlot s = slot(b, t);
        if (s.page < 0) continue;
        for (int64_t head = 0; head < h.n_k; ++head)
          for (int64_t dim = 0; dim < c.d_k; ++dim)
            want_k[static_cast<size_t>(kv_element(p.k_cache, head / h.k_per_group(), head % h.k_per_group(), s, dim))] =
                rotated(b, head, t, dim);
        for (int64_t head = 0; head < h.n_v; ++head)
          for (int64_t dim = 0; dim < c.d_v; ++dim)
            want_v[static_cast<size_t>(kv_element(p.v_cache, head / h.v_per_group(), head % h.v_per_group(), s, dim))] =
                E::get(v[static_cast<size_t>(c.offset + ((b * c.s_new + t) * h.n_v + head) * c.d_v + dim)]);
      }
    }
    const auto same = [](const std::vector<T>& got, const std::vector<double>& want, double tolerance) {
      int64_t written = 0;
      for (size_t i = 0; i < got.size(); ++i) {
        if (std::isnan(want[i])) {
          const T untouched = poison<E>();
          if (std::memcmp(&got[i], &untouched, sizeof(T)) != 0) return int64_t{-1};
        } else if (!(std::abs(E::get(got[i]) - want[i]) <= tolerance * (1 + std::abs(want[i])))) {
          return int64_t{-1};
        } else {
          ++written;
        }
      }
      return written;
    };
    CHECK(same(k_cache, want_k, c.d_rot > 0 ? kTolerance<E> : 0.0) > 0);
    CHECK(same(v_cache, want_v, 0.0) > 0);
    if (c.stats) check_stats();
  }

  void check_stats() const {
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t head = 0; head < c.heads.n_v; ++head) {
        const size_t at = static_cast<size_t>((b * c.heads.n_v + head) * (c.d_v + 1));
        std::vector<double> want(stats_before.begin() + int64_t(at), stats_before.begin() + int64_t(at) + c.d_v + 1);
        for (int64_t t = 0; t < c.s_new; ++t) {
          if (slot(b, t).page < 0) continue;
          const T* row = v.data() + c.offset + ((b * c.s_new + t) * c.heads.n_v + head) * c.d_v;
          double square = 0.0;
          for (int64_t i = 0; i < c.d_v; ++i) {
            want[size_t(i)] += E::get(row[i]);
            square += double(E::get(row[i])) * E::get(row[i]);
          }
          want.back() = std::max(want.back(), std::sqrt(square));
        }
        double error = 0.0;
        for (size_t i = 0; i < want.size(); ++i) error = std::max(error, std::abs(stats[at + i] - want[i]));
        CHECK(error <= 1e-5 * double(c.s_new + 10));
      }
  }
};

template <class E>
void run_grid() {
  const KLayout layout = GENERATE(KLayout::rows, KLayout::panels);
  const bool paged = GENERATE(false, true);
  int64_t turn = 0;
  for (const HeadGroups heads : {HeadGroups{32, 4, 16}, {12, 4, 6}, {8, 1, 8}, {5, 1, 5}}) {
    for (const int64_t s_new : {1, 3, 70, 128}) {
      for (const int64_t d_rot : {0, 12, 32, 40}) {
        for (const int64_t offset : {0, 1}) {
          const bool odd = s_new % 2 == 1, stats = ++turn % 4 == 0 || s_new < 70;
          Problem<E> problem({heads, 40, 24, d_rot, 3, s_new, layout, paged, odd, offset == 0, stats, offset});
          problem.run(emulator::kSchedules[turn % 3]);
          problem.check();
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("emulated kv_cache_update writes every new token to its slot and nothing else: fp32") { run_grid<F32>(); }
TEST_CASE("emulated kv_cache_update writes every new token to its slot and nothing else: bf16") { run_grid<BF16>(); }
TEST_CASE("emulated kv_cache_update writes every new token to its slot and nothing else: fp16") {
  for (const KLayout layout : {KLayout::rows, KLayout::panels}) {
    Problem<F16> problem({{32, 4, 16}, 64, 64, 32, 2, 7, layout, true, true, true, true, 0});
    problem.run(emulator::Schedule::shuffled);
    problem.check();
  }
}

TEST_CASE("emulated kv_cache_update: v_stats do not depend on the schedule nor on the calls that bring the tokens") {
  std::vector<float> first;
  for (const emulator::Schedule schedule : emulator::kSchedules) {
    Problem<BF16> problem({{4, 1, 2}, 8, 256, 0, 1, 128, KLayout::rows, false, true, true, true, 0});
    problem.run(schedule);
    problem.check();
    if (first.empty()) first = problem.stats;
    CHECK(first == problem.stats);
  }
  Problem<BF16> parts({{4, 1, 2}, 8, 256, 0, 1, 128, KLayout::rows, false, true, true, true, 0});
  for (const auto& [begin, count] : {std::pair<int64_t, int64_t>{0, 40}, {40, 1}, {41, 87}}) {
    KvCacheUpdateParams& p = parts.p;
    const KvCacheUpdateParams whole = p;
    p.s_new = count;
    p.k_new.data = static_cast<uint16_t*>(p.k_new.data) + begin * p.k_new.stride_token;
    p.v_new.data = static_cast<uint16_t*>(p.v_new.data) + begin * p.v_new.stride_token;
    p.positions = static_cast<const int64_t*>(p.positions) + begin;
    parts.run(emulator::Schedule::forward);
    p = whole;
  }
  CHECK(first == parts.stats);
}

TEST_CASE("emulated kv_cache_update: v_stats keep a NaN") {
  Problem<F32> problem({{4, 1, 2}, 8, 8, 0, 1, 3, KLayout::rows, false, true, true, true, 0});
  problem.v[8] = std::numeric_limits<float>::quiet_NaN();  // dimension 0 of V head 1 of token 0
  problem.run(emulator::Schedule::forward);
  CHECK(std::isnan(problem.stats[9]));
  CHECK(std::isnan(problem.stats[9 + 8]));
  for (int i = 0; i < 9; ++i) CHECK_FALSE(std::isnan(problem.stats[size_t(i)]));
}

TEST_CASE("kv_cache_update on CUDA: width") {
  const auto width = [](int64_t d_rot, int64_t offset) {
    const Problem<BF16> problem({{32, 4, 16}, 64, 64, d_rot, 2, 5, KLayout::rows, true, true, true, false, offset});
    return plan_cuda_kv_cache_update(problem.p).width;
  };
  CHECK(width(0, 0) == 8);
  CHECK(width(64, 0) == 8);
  CHECK(width(64, 8) == 8);
  CHECK(width(64, 1) == 1);
  CHECK(width(8, 0) == 1);  // half of 8 is not a vector
  Problem<BF16> single({{32, 4, 16}, 64, 64, 0, 1, 1, KLayout::rows, false, true, true, false, 0});
  single.p.k_new.stride_batch = 1;  // of a batch of one: never used
  CHECK(plan_cuda_kv_cache_update(single.p).width == 8);
  single.p.k_new.stride_head = 65;
  CHECK(plan_cuda_kv_cache_update(single.p).width == 1);
}

TEST_CASE("kv_cache_update on CUDA: blocks") {
  Problem<F32> problem({{32, 4, 16}, 64, 64, 64, 2, 100, KLayout::rows, false, true, true, false, 0});
  CudaKvCacheUpdatePlan plan = plan_cuda_kv_cache_update(problem.p);
  CHECK(plan.stats_blocks == 0);
  CHECK(int64_t{plan.tile_tokens} * plan.token_tiles >= 100);
  CHECK(plan.blocks == 2 * 4 * plan.token_tiles);

  std::vector<float> stats(2 * 16 * 65);
  problem.p.v_stats = stats.data();
  plan = plan_cuda_kv_cache_update(problem.p);
  CHECK(plan.stats_blocks == 2 * 16);
  CHECK(plan.blocks == 2 * 16 + 2 * 4 * plan.token_tiles);

  problem.p.batch = 0;
  CHECK(plan_cuda_kv_cache_update(problem.p).blocks == 0);
}

TEST_CASE("emulated kv_cache_update: offsets beyond 2^31 elements") {
  for (const Apart apart : {Apart::rows, Apart::blocks})
    for (const bool paged : {false, true}) {
      Problem<BF16> problem({{8, 2, 4}, 32, 24, 16, 2, 40, KLayout::rows, paged, true, true, true, 0});
      KvCacheUpdateParams& p = problem.p;
      const KvCacheUpdateParams near = p;
      Far far(apart);
      far.move(p.k_new, p.batch, p.heads.n_k, p.s_new, p.d_k);
      far.move(p.v_new, p.batch, p.heads.n_v, p.s_new, p.d_v);
      far.move(p.k_cache, p.pages, p.heads.groups(), p.heads.k_per_group(), p.paging.page_size, p.d_k);
      far.move(p.v_cache, p.pages, p.heads.groups(), p.heads.v_per_group(), p.paging.page_size, p.d_v);
      problem.run(emulator::Schedule::forward);
      far.bring_back();
      p = near;
      problem.check();
    }
}
