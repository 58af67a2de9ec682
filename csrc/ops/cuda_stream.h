// Torch's current stream of a device, in libraries that were built with CUDA.
#pragma once
#include "ops/torch_compat.h"
#include "plan/cuda/device_facts.h"

namespace diffqkv {

class CudaStream {
 public:
  // Makes the device of `like` current, as long as this object lives, and checks that the kernels can run there. op:
  // the name that errors begin with.
  CudaStream(const char* op, const Tensor& like);

  void* get() const { return stream_; }
  const DeviceFacts& facts() const { return facts_; }
  // Raises the error that a function of cuda/launch_api.h returned. It is not about an argument, so that the message
  // lacks the prefix that becomes a ValueError.
  void check(int error) const;
  // Whether the environment has DIFFQKV_DEBUG=1; an error while a graph is captured.
  bool debugging() const;

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
  const DeviceFacts& facts_;
};

}  // namespace diffqkv
