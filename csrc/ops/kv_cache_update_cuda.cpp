#include <cstdlib>
#include <string_view>

#include "diffqkv/cuda.h"
#include "ops/arguments.h"
#include "ops/cache_slots.h"
#include "ops/ops.h"
#include "ops/ops_cuda.h"

namespace diffqkv {
namespace {

// Not an argument error, so without the prefix that becomes a ValueError.
void check_cuda(int error) { STD_TORCH_CHECK(error == 0, "kv_cache_update: CUDA error: ", cuda_error_string(error)); }

bool debugging() {
  const char* value = std::getenv("DIFFQKV_DEBUG");
  return value != nullptr && std::string_view(value) == "1";
}

Tensor on_host(const Tensor& t) {
  return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

void check_slots_on_host(CacheUpdateParams p, const Tensor& positions, const std::optional<Tensor>& block_table,
                         void* stream) {
  bool capturing = false;
  check_cuda(cuda_is_capturing(stream, &capturing));
  STD_TORCH_CHECK(!capturing, "DIFFQKV_DEBUG: got 1 while a CUDA graph is captured, want 0: the check synchronises");
  const Tensor host_positions = on_host(positions);
  p.positions = host_positions.data_ptr();
  p.positions_stride_batch = host_positions.stride(0);
  p.positions_stride_token = host_positions.stride(1);
  const std::optional<Tensor> host_table = block_table ? std::optional(on_host(*block_table)) : std::nullopt;
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
  const CacheUpdateParams p =
      cache_update_params(k_cache, v_cache, k, v, positions, cos, sin, block_table, v_stats, k_layout);
  const torch::stable::accelerator::DeviceGuard guard(k_cache.get_device_index());
  void* stream = current_cuda_stream(k_cache.get_device_index());
  if (debugging()) check_slots_on_host(p, positions, block_table, stream);
  check_cuda(cuda_kv_cache_update(p, stream));
}

}  // namespace diffqkv
