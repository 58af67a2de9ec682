#include "ops/device.h"

#include <limits>

#include "plan/cuda/flash_attention.h"

namespace diffqkv {

Device::Device([[maybe_unused]] const char* op, const Tensor& like) : like_(like) {
#ifdef DIFFQKV_HAVE_CUDA
  if (!like.is_cpu()) stream_.emplace(op, like);
#endif
}

Device::Limits Device::limits() const {
  if (on_gpu()) return {kMaxFlashAttentionTokens, false, false};
  return {std::numeric_limits<int64_t>::max(), true, true};
}

std::optional<Tensor> Device::readable(const Tensor& t) const {
#ifdef DIFFQKV_HAVE_CUDA
  if (on_gpu() && !stream_->debugging()) return std::nullopt;
  if (on_gpu()) return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
#endif
  return t;
}

int64_t Device::planned_length(int64_t longest, int64_t bound) const { return on_gpu() ? bound : longest; }

}  // namespace diffqkv
