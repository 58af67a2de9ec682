#include "ops/cache_slots.h"
#include "ops/cuda_call.h"
#include "ops/ops.h"
#include "ops/ops_cuda.h"

namespace diffqkv {
namespace {

void check_slots_on_host(KvCacheUpdateParams p, const Tensor& positions, const std::optional<Tensor>& block_table) {
  const Tensor host_positions = on_host(positions);
  p.positions = host_positions.data_ptr();
  p.positions_stride_batch = host_positions.stride(0);
  p.positions_stride_token = host_positions.stride(1);
  const std::optional<Tensor> host_table = on_host(block_table);
  if (host_table) {
    p.paging.block_table = static_cast<const int32_t*>(host_table->data_ptr());
    p.paging.stride = host_table->stride(0);
  }
  check_new_token_slots(p);
}

}  // namespace

void kv_cache_update_cuda(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& positions,
                          const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                          const std::optional<Tensor>& block_table, std::optional<Tensor> v_stats, int64_t k_layout) {
  const KvCacheUpdateParams p =
      kv_cache_update_params(k_cache, v_cache, k, v, positions, cos, sin, block_table, v_stats, k_layout);
  const CudaCall call("kv_cache_update", k_cache);
  if (call.debugging()) check_slots_on_host(p, positions, block_table);
  call.check(cuda_kv_cache_update(p, call.stream()));
}

}  // namespace diffqkv
