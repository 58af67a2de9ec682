#include "plan/cpu/packed_linear.h"

#include "cpu/isa.h"
#include "cpu/items.h"
#include "cpu/kernels/kernels.h"
#include "cpu/run.h"
#include "cpu/workspace.h"
#include "params/arithmetic.h"

namespace diffqkv::cpu {
namespace {

struct Pieces {
  Workspace workspace;
  ThreadScratch scratch;
  PackedLinearRows rows;

  Pieces(const PackedLinearParams& p, const PackedLinearPlan& plan, void* base)
      : workspace(base), scratch(workspace, plan.threads, plan.scratch_bytes) {
    // One row that is made of words already is a tile as it is.
    const bool is_words = p.form == WeightForm::f32 || (p.form == WeightForm::bf16 && cpu_isa() == CpuIsa::v4_bf16);
    if (p.rows > 1 || !is_words)
      rows.words =
          workspace.take<uint32_t>(p.rows * round_up(p.is_integer() ? p.in_features / 2 : p.in_features, kLinearBlock));
    if (!p.is_integer()) return;
    rows.scales = workspace.take<float>(p.rows * p.groups());
    rows.sums = workspace.take<int32_t>(p.rows * p.groups());
  }
};

}  // namespace

void run(const PackedLinearParams& p, const Caller& caller) {
  const PackedLinearPlan plan = plan_packed_linear(p, caller.threads);
  if (plan.items == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  Pieces pieces(p, plan, nullptr);
  pieces = Pieces(p, plan, caller.memory.take(pieces.workspace.bytes()));
  if (pieces.rows.words != nullptr)
    for_items(ceil_div(p.rows, kLinearTileRows), plan.row_threads, caller.parallel,
              [&](int64_t tile, int64_t) { kernels.packed_linear_rows(p, pieces.rows, tile); });
  for_items(plan.items, plan.threads, caller.parallel,
            [&](int64_t i, int64_t w) { kernels.packed_linear_block(p, plan, pieces.rows, i, pieces.scratch.of(w)); });
}

}  // namespace diffqkv::cpu
