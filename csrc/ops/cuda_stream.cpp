#include "ops/cuda_stream.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <string_view>

#include "cuda/launch_api.h"

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
    const int error = cuda::device_facts(device, &found);
    STD_TORCH_CHECK(error == 0, "device: CUDA error: ", cuda::error_string(error));
    // Lower than the device's own: the kernels of older GPUs, to test and to compare them.
    if (const char* capability = std::getenv("DIFFQKV_CUDA_CAPABILITY"))
      found.capability = std::clamp(std::atoi(capability), kLeastCapability, found.capability);
    facts = found;
  }
  return facts;
}

}  // namespace

CudaStream::CudaStream(const char* op, const Tensor& like)
    : op_(op),
      guard_(like.get_device_index()),
      stream_(current_stream(like.get_device_index())),
      facts_(facts_of(like.get_device_index())) {
  STD_TORCH_CHECK(facts_.capability >= kLeastCapability, op, ": device: got compute capability ",
                  facts_.capability / 10, ".", facts_.capability % 10, ", want ", kLeastCapability / 10, ".",
                  kLeastCapability % 10, " or newer");
}

void CudaStream::check(int error) const {
  STD_TORCH_CHECK(error == 0, op_, ": CUDA error: ", cuda::error_string(error));
}

bool CudaStream::debugging() const {
  const char* value = std::getenv("DIFFQKV_DEBUG");
  if (value == nullptr || std::string_view(value) != "1") return false;
  bool capturing = false;
  check(cuda::is_capturing(stream_, &capturing));
  STD_TORCH_CHECK(!capturing, "DIFFQKV_DEBUG: got 1 while a CUDA graph is captured, want 0: the check synchronises");
  return true;
}

}  // namespace diffqkv
