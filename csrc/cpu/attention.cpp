#include "cpu/attention.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/items.h"
#include "cpu/kernels/kernels.h"
#include "cpu/plain_attention.h"
#include "cpu/run.h"
#include "cpu/workspace.h"
#include "params/key_range.h"

namespace diffqkv::cpu {
namespace {

// Partial results that a thread merges before a second one pays off.
constexpr int64_t kFloatsPerThread = 8192;

struct Pieces {
  Workspace workspace;
  ThreadScratch scratch;
  float* partials;

  Pieces(const AttentionPlan& plan, void* base)
      : workspace(base),
        scratch(workspace, plan.threads, plan.scratch_bytes),
        partials(workspace.take<float>(plan.partial_floats)) {}
};

}  // namespace

int64_t attention_workspace(const AttentionPlan& plan) { return Pieces(plan, nullptr).workspace.bytes(); }

void attention(const AttentionParams& p, const AttentionPlan& plan, void* workspace, Parallel parallel) {
  if (plan.items == 0 || plan.rows == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  const Pieces pieces(plan, workspace);
  const ThreadScratch& scratch = pieces.scratch;
  if (plan.kernel == AttentionKernel::plain)
    return for_items(plan.items, plan.threads, parallel,
                     [&](int64_t i, int64_t w) { plain_attention(p, i, reinterpret_cast<double*>(scratch.of(w))); });
  if (plan.kernel == AttentionKernel::block)
    return for_items(plan.items, plan.threads, parallel,
                     [&](int64_t i, int64_t w) { kernels.attention_block(p, plan, i, scratch.of(w)); });
  float* partials = plan.splits > 1 ? pieces.partials : nullptr;
  for_items(plan.items, plan.threads, parallel,
            [&](int64_t i, int64_t w) { kernels.attention_split(p, plan, i, scratch.of(w), partials); });
  if (partials == nullptr) return;
  const int64_t useful = std::clamp<int64_t>(plan.partial_floats / kFloatsPerThread, 1, plan.threads);
  for_items(p.batch * plan.groups * plan.rows, useful, parallel,
            [&](int64_t i, int64_t) { kernels.attention_merge(p, plan, i / plan.rows, i % plan.rows, partials); });
}

void run(const AttentionParams& p, const Caller& caller) {
  const AttentionPlan plan = plan_attention(p, most_keys(p), caller.threads);
  attention(p, plan, caller.memory.take(attention_workspace(plan)), caller.parallel);
}

}  // namespace diffqkv::cpu
