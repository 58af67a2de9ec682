// The launches of selective_v_attention, in order: for CUDA and for the emulated GPU.
#pragma once
#include <algorithm>

#include "cuda/selective_v_attention/gather.cuh"
#include "cuda/selective_v_attention/score.cuh"
#include "cuda/selective_v_attention/stats.cuh"

namespace diffqkv::device::selective_v_attention {

// launch.template operator()<Kernel>(params, blocks, shared bytes) returns 0 or an error, which ends it.
template <class E, class Launch>
int launch_all(const SelectiveVAttentionParams& sp, const CudaSelectiveVAttentionPlan& plan, void* workspace,
               const Launch& launch) {
  const AttentionParams& p = sp.attention;
  if (plan.empty()) return 0;
  Params params{sp, plan, static_cast<char*>(workspace), 0, 0, 0, 0};
  if (plan.parts > 0)
    if (const int error =
            launch.template operator()<Stats<E>>(params, p.batch * p.heads.n_v * plan.parts, Stats<E>::kSharedBytes))
      return error;
  for (int64_t b = 0; b < p.batch; b += plan.entries)
    for (int64_t q = 0; q < p.s_q; q += plan.queries) {
      params.first_entry = b, params.entries = std::min(plan.entries, p.batch - b);
      params.first_query = q, params.queries = std::min(plan.queries, p.s_q - q);
      const int64_t blocks = params.entries * p.heads.n_k * plan.chunks * params.column_tiles();
      const auto score = [&]<int quanta>() {
        return blocks == 0 ? 0 : launch.template operator()<Score<E, quanta>>(params, blocks, plan.score_shared);
      };
      int error = 0;
      if (plan.chunk_tokens == kSelectiveVAttentionQuantum) error = score.template operator()<1>();
      if (plan.chunk_tokens == 2 * kSelectiveVAttentionQuantum) error = score.template operator()<2>();
      if constexpr (E::kDType != DType::f32)
        if (plan.chunk_tokens == 4 * kSelectiveVAttentionQuantum) error = score.template operator()<4>();
      if (error == 0) error = launch.template operator()<Gather<E>>(params, params.rows(), plan.gather_shared);
      if (error != 0) return error;
    }
  return 0;
}

}  // namespace diffqkv::device::selective_v_attention
