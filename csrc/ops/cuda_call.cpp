#include "ops/cuda_call.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <string_view>

namespace diffqkv {
namespace {

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

}  // namespace

CudaCall::CudaCall(const char* op, const Tensor& like)
    : op_(op),
      guard_(like.get_device_index()),
      stream_(current_cuda_stream(like.get_device_index())),
      facts_(facts_of(like.get_device_index())) {
  STD_TORCH_CHECK(facts_.capability >= kLeastCapability, op, ": device: got compute capability ",
                  facts_.capability / 10, ".", facts_.capability % 10, ", want ", kLeastCapability / 10, ".",
                  kLeastCapability % 10, " or newer");
}

bool CudaCall::capturing() const {
  bool capturing = false;
  check(cuda_is_capturing(stream_, &capturing));
  return capturing;
}

bool CudaCall::debugging() const {
  const char* value = std::getenv("DIFFQKV_DEBUG");
  if (value == nullptr || std::string_view(value) != "1") return false;
  STD_TORCH_CHECK(!capturing(), "DIFFQKV_DEBUG: got 1 while a CUDA graph is captured, want 0: the check synchronises");
  return true;
}

CudaTickets::CudaTickets(const CudaCall& call, const Tensor& like, int64_t count) {
  call.check(cuda_tickets(like.get_device_index(), count, call.capturing(), &first_));
  if (first_ != nullptr) return;
  own_ = torch::stable::new_zeros(like, {count}, ScalarType::Int);
  first_ = static_cast<uint32_t*>(own_->data_ptr());
}

Tensor on_host(const Tensor& t) {
  return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

}  // namespace diffqkv
