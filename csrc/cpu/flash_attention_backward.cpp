#include "cpu/flash_attention_backward.h"

#include <algorithm>
#include <thread>

#include "cpu/isa.h"
#include "cpu/items.h"
#include "cpu/kernels/kernels.h"
#include "cpu/plain_attention.h"
#include "cpu/run.h"
#include "cpu/workspace.h"

namespace diffqkv::cpu {
namespace {

// The item waited for has been begun: items are handed out in order, and wait for earlier ones alone.
void wait_until(const int32_t* ready, int32_t count) {
  constexpr int kSpins = 1000;
  for (int spins = 0; __atomic_load_n(ready, __ATOMIC_ACQUIRE) != count; ++spins)
    if (spins >= kSpins) std::this_thread::yield();
}

struct Pieces {
  Workspace workspace;
  ThreadScratch scratch;
  FlashAttentionBackwardWorkspace shared;

  Pieces(const AttentionParams& p, const FlashAttentionBackwardPlan& plan, void* base)
      : workspace(base), scratch(workspace, plan.threads, plan.scratch_bytes) {
    shared.delta = workspace.take<float>(p.total_queries() * p.heads.n_q);
    shared.dsinks = workspace.take<double>(p.batch * p.heads.n_q);
    shared.dq = workspace.take<float>(plan.dq_floats);
    shared.ready = workspace.take<int32_t>(p.batch * p.heads.n_q * plan.query_blocks);
    shared.wait = wait_until;
  }
};

// In the order of the batch, so that the sums do not depend on the threads.
void add_up_sinks(const FlashAttentionBackwardParams& bp, const double* of_entries) {
  const AttentionParams& p = bp.forward;
  for (int64_t h = 0; h < p.heads.n_q; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < p.batch; ++b) sum += of_entries[b * p.heads.n_q + h];
    if (p.q.dtype == DType::f64)
      static_cast<double*>(bp.dsinks)[h] = sum;
    else
      static_cast<float*>(bp.dsinks)[h] = static_cast<float>(sum);
  }
}

}  // namespace

int64_t flash_attention_backward_workspace(const FlashAttentionBackwardParams& bp,
                                           const FlashAttentionBackwardPlan& plan) {
  return Pieces(bp.forward, plan, nullptr).workspace.bytes();
}

void flash_attention_backward(const FlashAttentionBackwardParams& bp, const FlashAttentionBackwardPlan& plan,
                              void* workspace, Parallel parallel) {
  const AttentionParams& p = bp.forward;
  const CpuKernels& kernels = cpu_kernels();
  const Pieces pieces(p, plan, workspace);
  const FlashAttentionBackwardWorkspace& shared = pieces.shared;
  const int64_t q_heads = p.batch * p.heads.n_q;
  if (p.q.dtype == DType::f64) {
    for_items(plan.items, plan.threads, parallel,
              [&](int64_t i, int64_t) { plain_attention_backward(bp, i, shared.dsinks); });
  } else {
    std::fill_n(shared.ready, q_heads * plan.query_blocks, 0);
    for_items(q_heads, plan.threads, parallel,
              [&](int64_t i, int64_t) { kernels.flash_attention_backward_rows(bp, plan, shared, i); });
    for_items(plan.items, plan.threads, parallel, [&](int64_t i, int64_t w) {
      kernels.flash_attention_backward_block(bp, plan, shared, i, pieces.scratch.of(w));
    });
  }
  if (bp.dsinks != nullptr) add_up_sinks(bp, shared.dsinks);
}

void run(const FlashAttentionBackwardParams& bp, const Caller& caller) {
  const FlashAttentionBackwardPlan plan = plan_flash_attention_backward(bp.forward, caller.threads);
  void* const workspace = caller.memory.take(flash_attention_backward_workspace(bp, plan));
  flash_attention_backward(bp, plan, workspace, caller.parallel);
}

}  // namespace diffqkv::cpu
