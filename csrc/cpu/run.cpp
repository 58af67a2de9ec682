// Hands the work items of an op to the caller's threads, and chooses the instruction set level once.
#include "cpu/run.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "cpu/isa.h"
#include "cpu/kernels/kernels.h"
#include "cpu/reference_f64.h"
#include "params/key_range.h"
#include "params/layout.h"
#include "plan/cpu/scratch.h"

namespace diffqkv {

const CpuKernels& cpu_kernels() {
  static const CpuKernels* const tables[] = {&kernels_v2, &kernels_v3, &kernels_v4, &kernels_v4_bf16};
  static const CpuKernels& chosen = *tables[static_cast<int>(cpu_isa())];
  return chosen;
}

namespace cpu {
namespace {

// Runs item(i, worker) for all i < items. Workers take the next item when they are free, since causal items differ in
// cost; which worker runs an item never changes its result.
template <class Item>
void for_items(int64_t items, int64_t threads, Parallel parallel, const Item& item) {
  const int64_t workers = std::min(threads, items);
  if (workers <= 1) {
    for (int64_t i = 0; i < items; ++i) item(i, 0);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t items;
    const Item* item;
  } context{.items = items, .item = &item};
  parallel(
      workers,
      [](void* c, int64_t worker) {
        auto& ctx = *static_cast<Context*>(c);
        for (int64_t i; (i = ctx.next.fetch_add(1, std::memory_order_relaxed)) < ctx.items;) (*ctx.item)(i, worker);
      },
      &context);
}

// Elementwise work is handed out in ranges of this many elements.
constexpr int64_t kElementsPerItem = 16384;
// Cache rows that a thread writes before a second one pays off.
constexpr int64_t kRowsPerThread = 64;
// Partial results that a thread merges before a second one pays off.
constexpr int64_t kFloatsPerThread = 8192;
// New tokens of a group that one item writes, whole panels.
constexpr int64_t kTokensPerItem = 4 * kPanelTokens;

struct Workspace {
  char* base;  // null: only `used` is of interest
  int64_t used = 0;
  void* take(int64_t bytes) {
    void* piece = base == nullptr ? nullptr : base + used;
    used += aligned(bytes);
    return piece;
  }
};

// Whether the new tokens of each entry have increasing positions, so that ranges of them can be written in any order.
bool in_order(const KvCacheUpdateParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    int64_t last = -1;
    for (int64_t t = 0; t < p.s_new; ++t) {
      const int64_t position = new_token_position(p, b, t);
      if (position < 0) continue;
      if (position <= last) return false;
      last = position;
    }
  }
  return true;
}

// Whether the result of an entry is dense attention: all its keys are among the best.
bool dense(const SelectiveVAttentionParams& p, int64_t b) {
  const KeyRange keys = entry_of(p.attention, b).keys;
  return p.top_k >= keys.hi - keys.lo;
}

}  // namespace

int64_t attention_workspace(const AttentionPlan& plan) {
  return 64 + plan.threads * aligned(plan.scratch_bytes) + aligned(plan.partial_floats * 4);
}

void attention(const AttentionParams& p, const AttentionPlan& plan, void* workspace, Parallel parallel) {
  if (plan.items == 0 || plan.rows == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  Workspace work{static_cast<char*>(workspace)};
  char* scratch = static_cast<char*>(work.take(plan.threads * aligned(plan.scratch_bytes)));
  const auto scratch_of = [&](int64_t worker) { return scratch + worker * aligned(plan.scratch_bytes); };
  if (plan.kernel == AttentionKernel::plain)
    return for_items(plan.items, plan.threads, parallel,
                     [&](int64_t i, int64_t w) { attention_f64(p, i, reinterpret_cast<double*>(scratch_of(w))); });
  if (plan.kernel == AttentionKernel::block) {
    for_items(plan.items, plan.threads, parallel,
              [&](int64_t i, int64_t w) { kernels.attention_block(p, plan, i, scratch_of(w)); });
    return;
  }
  float* partials = plan.splits > 1 ? static_cast<float*>(work.take(plan.partial_floats * 4)) : nullptr;
  for_items(plan.items, plan.threads, parallel,
            [&](int64_t i, int64_t w) { kernels.attention_split(p, plan, i, scratch_of(w), partials); });
  if (partials == nullptr) return;
  const int64_t useful = std::clamp<int64_t>(plan.partial_floats / kFloatsPerThread, 1, plan.threads);
  for_items(p.batch * plan.groups * plan.rows, useful, parallel,
            [&](int64_t i, int64_t) { kernels.attention_merge(p, plan, i / plan.rows, i % plan.rows, partials); });
}

namespace {

struct FlashAttentionBackwardPieces {
  char* scratch;
  FlashAttentionBackwardWorkspace shared;
  int64_t bytes;
};
FlashAttentionBackwardPieces pieces_of(const FlashAttentionBackwardParams& bp, const FlashAttentionBackwardPlan& plan,
                                       char* base) {
  const AttentionParams& p = bp.forward;
  Workspace work{base};
  FlashAttentionBackwardPieces pieces;
  pieces.scratch = static_cast<char*>(work.take(plan.threads * aligned(plan.scratch_bytes)));
  pieces.shared.delta = static_cast<float*>(work.take(p.total_queries() * p.heads.n_q * 4));
  pieces.shared.dsinks = static_cast<double*>(work.take(p.batch * p.heads.n_q * 8));
  pieces.shared.dq = static_cast<float*>(work.take(plan.dq_floats * 4));
  pieces.shared.ready = static_cast<int32_t*>(work.take(p.batch * p.heads.n_q * plan.query_blocks * 4));
  pieces.bytes = work.used;
  return pieces;
}

// The item waited for has been begun: items are handed out in order, and wait for earlier ones alone.
void wait_until(const int32_t* ready, int32_t count) {
  constexpr int kSpins = 1000;
  for (int spins = 0; __atomic_load_n(ready, __ATOMIC_ACQUIRE) != count; ++spins)
    if (spins >= kSpins) std::this_thread::yield();
}

}  // namespace

int64_t flash_attention_backward_workspace(const FlashAttentionBackwardParams& params,
                                           const FlashAttentionBackwardPlan& plan) {
  return 64 + pieces_of(params, plan, nullptr).bytes;
}

void flash_attention_backward(const FlashAttentionBackwardParams& bp, const FlashAttentionBackwardPlan& plan,
                              void* workspace, Parallel parallel) {
  const AttentionParams& p = bp.forward;
  const CpuKernels& kernels = cpu_kernels();
  FlashAttentionBackwardPieces pieces = pieces_of(bp, plan, static_cast<char*>(workspace));
  FlashAttentionBackwardWorkspace& shared = pieces.shared;
  const int64_t q_heads = p.batch * p.heads.n_q;
  if (p.q.dtype == DType::f64) {
    for_items(plan.items, plan.threads, parallel,
              [&](int64_t i, int64_t) { flash_attention_backward_f64(bp, i, shared.dsinks); });
  } else {
    shared.wait = wait_until;
    std::fill_n(shared.ready, q_heads * plan.query_blocks, 0);
    for_items(q_heads, plan.threads, parallel,
              [&](int64_t i, int64_t) { kernels.flash_attention_backward_rows(bp, plan, shared, i); });
    for_items(plan.items, plan.threads, parallel, [&](int64_t i, int64_t w) {
      kernels.flash_attention_backward_block(bp, plan, shared, i, pieces.scratch + w * aligned(plan.scratch_bytes));
    });
  }
  for (int64_t h = 0; bp.dsinks != nullptr && h < p.heads.n_q; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < p.batch; ++b) sum += shared.dsinks[b * p.heads.n_q + h];
    if (p.q.dtype == DType::f64)
      static_cast<double*>(bp.dsinks)[h] = sum;
    else
      static_cast<float*>(bp.dsinks)[h] = static_cast<float>(sum);
  }
}

namespace {

struct SelectiveVAttentionPieces {
  char* scratch;
  float* partials;
  SelectiveVAttentionWorkspace shared;
  int64_t bytes;
};
SelectiveVAttentionPieces pieces_of(const SelectiveVAttentionParams& sp, const SelectiveVAttentionPlan& plan,
                                    char* base) {
  const AttentionParams& p = sp.attention;
  const int64_t rows = p.batch * p.heads.n_q * p.s_q, lists = rows * plan.chunks;
  Workspace work{base};
  SelectiveVAttentionPieces pieces;
  pieces.scratch = static_cast<char*>(work.take(plan.dense.threads * aligned(plan.scratch_bytes)));
  pieces.partials = static_cast<float*>(work.take(plan.dense.items * plan.dense.rows * (kPartialHeader + p.d_v) * 4));
  SelectiveVAttentionWorkspace& shared = pieces.shared;
  shared.mass = static_cast<float*>(work.take(rows * plan.dense.splits * 8));
  shared.scores = static_cast<float*>(work.take(lists * plan.candidates * 4));
  shared.indices = static_cast<uint32_t*>(work.take(lists * plan.candidates * 4));
  shared.counts = static_cast<int32_t*>(work.take(lists * 4));
  shared.forced = static_cast<float*>(work.take(rows * plan.forced * 4));
  shared.computed_densely = static_cast<uint8_t*>(work.take(rows));
  const bool needs_stats = sp.v_stats == nullptr && (sp.tail == Tail::mean || sp.want_bound || sp.max_error >= 0);
  shared.v_stats = needs_stats ? static_cast<float*>(work.take(p.batch * p.heads.n_v * (p.d_v + 1) * 4)) : nullptr;
  pieces.bytes = work.used;
  return pieces;
}

}  // namespace

int64_t selective_v_attention_workspace(const SelectiveVAttentionParams& params, const SelectiveVAttentionPlan& plan) {
  return 64 + pieces_of(params, plan, nullptr).bytes;
}

void selective_v_attention(const SelectiveVAttentionParams& sp, const SelectiveVAttentionPlan& plan, void* workspace,
                           Parallel parallel) {
  const AttentionPlan& dense_plan = plan.dense;
  if (dense_plan.items == 0 || dense_plan.rows == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  const AttentionParams& p = sp.attention;
  const auto [all_scratch, partials, shared, bytes] = pieces_of(sp, plan, static_cast<char*>(workspace));
  const auto scratch = [&, all = all_scratch](int64_t worker) { return all + worker * aligned(plan.scratch_bytes); };
  const int64_t threads = dense_plan.threads, splits = dense_plan.splits, groups = dense_plan.groups;

  // Entries with no more than top_k keys are dense attention, to the last bit.
  for_items(plan.items, threads, parallel, [&](int64_t i, int64_t w) {
    const int64_t batch_group = i / plan.chunks, chunk = i % plan.chunks;
    if (!dense(sp, batch_group / groups)) return kernels.selective_v_attention_score(sp, plan, shared, i, scratch(w));
    const int64_t first = chunk * plan.chunk_splits, last = std::min(splits, first + plan.chunk_splits);
    for (int64_t split = first; split < last; ++split)
      kernels.attention_split(p, dense_plan, batch_group * splits + split, scratch(w), partials);
  });
  for (int64_t i = 0; i < p.batch * groups; ++i)
    if (dense(sp, i / groups))
      for (int64_t row = 0; row < dense_plan.rows; ++row) kernels.attention_merge(p, dense_plan, i, row, partials);
  if (shared.v_stats != nullptr)
    for_items(p.batch * p.heads.n_v, threads, parallel, [&](int64_t i, int64_t) {
      if (!dense(sp, i / p.heads.n_v)) kernels.selective_v_attention_stats(sp, shared, i);
    });
  for_items(plan.fetch_items, threads, parallel,
            [&](int64_t i, int64_t w) { kernels.selective_v_attention_gather(sp, plan, shared, i, scratch(w)); });
  if (sp.max_error < 0) return;

  // Rows whose candidates could not keep max_error: their groups once more, with all of V.
  const auto densely = [&, flags = shared.computed_densely](int64_t batch_group) {
    return flags + batch_group * dense_plan.rows;
  };
  for_items(dense_plan.items, threads, parallel, [&](int64_t i, int64_t w) {
    const uint8_t* rows = densely(i / splits);
    if (std::any_of(rows, rows + dense_plan.rows, [](uint8_t flag) { return flag != 0; }))
      kernels.attention_split(p, dense_plan, i, scratch(w), partials);
  });
  for (int64_t i = 0; i < p.batch * groups; ++i)
    for (int64_t row = 0; row < dense_plan.rows; ++row)
      if (densely(i)[row]) kernels.attention_merge(p, dense_plan, i, row, partials);
}

void kv_cache_update(const KvCacheUpdateParams& p, int64_t threads, Parallel parallel) {
  const int64_t rows = p.batch * p.s_new * (p.heads.n_k + p.heads.n_v), groups = p.heads.groups();
  const int64_t useful = std::clamp<int64_t>(rows / kRowsPerThread, 1, std::max<int64_t>(1, threads));
  // v_stats are summed up in the order of the tokens, by one item.
  const bool cuts = p.s_new > kTokensPerItem && p.v_stats == nullptr && in_order(p);
  const int64_t ranges = cuts ? (p.s_new + kPanelTokens + kTokensPerItem - 1) / kTokensPerItem : 1;
  // Groups innermost: their heads often lie side by side in the new tokens.
  for_items(p.batch * ranges * groups, useful, parallel, [&](int64_t i, int64_t) {
    const int64_t b = i / groups / ranges, range = i / groups % ranges;
    if (!cuts) return cpu_kernels().kv_cache_update(p, b, i % groups, 0, p.s_new);
    const int64_t begin = range * kTokensPerItem - std::max<int64_t>(0, new_token_position(p, b, 0)) % kPanelTokens;
    const int64_t end = std::min(p.s_new, begin + kTokensPerItem);
    cpu_kernels().kv_cache_update(p, b, i % groups, std::max<int64_t>(0, begin), end);
  });
}

namespace {

template <class Function>
void elementwise(const SwigluParams& p, int64_t threads, Parallel parallel, Function function) {
  const int64_t items = (p.numel + kElementsPerItem - 1) / kElementsPerItem;
  for_items(items, threads, parallel, [&](int64_t i, int64_t) {
    function(p, i * kElementsPerItem, std::min(p.numel, (i + 1) * kElementsPerItem));
  });
}

}  // namespace

void swiglu(const SwigluParams& p, int64_t threads, Parallel parallel) {
  elementwise(p, threads, parallel, cpu_kernels().swiglu);
}
void swiglu_backward(const SwigluParams& p, int64_t threads, Parallel parallel) {
  elementwise(p, threads, parallel, cpu_kernels().swiglu_backward);
}

double probe(Probe what, int64_t rounds, const void* data, int64_t bytes, int64_t threads, Parallel parallel) {
  struct Context {
    Probe what;
    int64_t rounds, share;
    const char* data;
    std::atomic<double> done{0};
  } context{
      .what = what, .rounds = rounds, .share = bytes / threads / 4096 * 4096, .data = static_cast<const char*>(data)};
  parallel(
      threads,
      [](void* c, int64_t worker) {
        auto& ctx = *static_cast<Context*>(c);
        const CpuKernels& kernels = cpu_kernels();
        float sink = 0;
        double work = 0;
        switch (ctx.what) {
          case Probe::fma: work = kernels.probe_fma(ctx.rounds, &sink); break;
          case Probe::dot: work = kernels.probe_dot(ctx.rounds, &sink); break;
          case Probe::read:
            for (int64_t r = 0; r < ctx.rounds; ++r, work += double(ctx.share))
              kernels.probe_read(ctx.data + worker * ctx.share, ctx.share, &sink);
        }
        ctx.done += work;
      },
      &context);
  return context.done;
}

}  // namespace cpu
}  // namespace diffqkv
