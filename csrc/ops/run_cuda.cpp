// CUDA tensors: the current stream of their device runs the call.
#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <string_view>

#include "cuda/launch_api.h"
#include "ops/device.h"

// Lives in libtorch_cuda; null on a CPU build of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream)
    __attribute__((weak, visibility("default")));

namespace diffqkv {
namespace {

void* current_stream(int32_t device) {
  DIFFQKV_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "device: got cuda, want cpu: this torch has no CUDA");
  void* stream = nullptr;
  DIFFQKV_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == TORCH_SUCCESS, "device: no current CUDA stream");
  return stream;
}

// The facts of the device with this number, which CUDA is asked for once.
const DeviceFacts& facts_of(int32_t device) {
  static std::mutex mutex;
  static std::deque<DeviceFacts> all;  // by device; references stay valid
  const std::lock_guard lock(mutex);
  while (static_cast<int32_t>(all.size()) <= device) all.push_back({.multiprocessors = 0});
  DeviceFacts& facts = all[static_cast<size_t>(device)];
  if (facts.multiprocessors == 0) {
    DeviceFacts found;
    const int error = cuda_device_facts(device, &found);
    STD_TORCH_CHECK(error == 0, "device: CUDA error: ", cuda_error_string(error));
    // Lower than the device's own: the kernels of older GPUs, to test and to compare them.
    if (const char* capability = std::getenv("DIFFQKV_CUDA_CAPABILITY"))
      found.capability = std::clamp(std::atoi(capability), kLeastCapability, found.capability);
    facts = found;
  }
  return facts;
}

class CudaDevice final : public Device {
 public:
  // Makes the device of `like` current, and checks that the kernels can run there.
  CudaDevice(const char* op, const Tensor& like)
      : op_(op),
        like_(like),
        guard_(like.get_device_index()),
        stream_(current_stream(like.get_device_index())),
        facts_(facts_of(like.get_device_index())) {
    STD_TORCH_CHECK(facts_.capability >= kLeastCapability, op, ": device: got compute capability ",
                    facts_.capability / 10, ".", facts_.capability % 10, ", want ", kLeastCapability / 10, ".",
                    kLeastCapability % 10, " or newer");
  }

  Limits limits() const override { return {kMaxFlashAttentionTokens, false}; }
  std::optional<Tensor> readable(const Tensor& t) const override {
    if (!debugging()) return std::nullopt;
    return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  }
  int64_t planned_length(int64_t /*longest*/, int64_t bound) const override { return bound; }

  void attention(const AttentionParams& p, int64_t /*max_keys*/) const override {
    if (p.batch == 0 || p.s_q == 0) return;
    if (cuda_decode_attention_takes(p))
      decode_attention(p);
    else
      check(cuda_flash_attention(p, plan_cuda_flash_attention(p, facts_), stream_));
  }
  void flash_attention_backward(const FlashAttentionBackwardParams& p) const override {
    const CudaFlashAttentionBackwardPlan plan = plan_cuda_flash_attention_backward(p, facts_);
    const Tensor workspace = torch::stable::new_empty(like_, {plan.workspace_bytes}, ScalarType::Byte);
    check(cuda_flash_attention_backward(p, plan, workspace.data_ptr(), stream_));
  }
  void selective_v_attention(const SelectiveVAttentionParams& p, int64_t /*max_keys*/) const override {
    const CudaSelectiveVAttentionPlan plan = plan_cuda_selective_v_attention(p, facts_);
    const Tensor workspace = torch::stable::new_empty(like_, {plan.workspace_bytes}, ScalarType::Byte);
    check(cuda_selective_v_attention(p, plan, workspace.data_ptr(), stream_));
  }
  void kv_cache_update(const KvCacheUpdateParams& p) const override { check(cuda_kv_cache_update(p, stream_)); }
  void swiglu(const SwigluParams& p) const override { check(cuda_swiglu(p, facts_, stream_)); }
  void swiglu_backward(const SwigluParams& p) const override { check(cuda_swiglu_backward(p, facts_, stream_)); }

 private:
  // Not about an argument, so without the prefix that becomes a ValueError.
  void check(int error) const { STD_TORCH_CHECK(error == 0, op_, ": CUDA error: ", cuda_error_string(error)); }

  bool capturing() const {
    bool capturing = false;
    check(cuda_is_capturing(stream_, &capturing));
    return capturing;
  }
  bool debugging() const {
    const char* value = std::getenv("DIFFQKV_DEBUG");
    if (value == nullptr || std::string_view(value) != "1") return false;
    STD_TORCH_CHECK(!capturing(),
                    "DIFFQKV_DEBUG: got 1 while a CUDA graph is captured, want 0: the check synchronises");
    return true;
  }

  void decode_attention(const AttentionParams& p) const {
    const CudaDecodeAttentionPlan plan = plan_cuda_decode_attention(p, facts_);
    const Tensor workspace = torch::stable::new_empty(like_, {plan.workspace_floats}, ScalarType::Float);
    std::optional<Tensor> zeros;
    uint32_t* tickets = nullptr;  // zeros without a kernel of their own, where possible
    check(cuda_tickets(like_.get_device_index(), plan.tickets, capturing(), &tickets));
    if (tickets == nullptr) {
      zeros = torch::stable::new_zeros(like_, {plan.tickets}, ScalarType::Int);
      tickets = static_cast<uint32_t*>(zeros->data_ptr());
    }
    check(cuda_decode_attention(p, plan, workspace.data_ptr(), tickets, stream_));
  }

  const char* op_;
  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
  const DeviceFacts& facts_;
};

}  // namespace

std::unique_ptr<const Device> cuda_device(const char* op, const Tensor& like) {
  return std::make_unique<CudaDevice>(op, like);
}

}  // namespace diffqkv
