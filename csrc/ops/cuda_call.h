// What the ops on CUDA tensors share: a device, a stream, and errors that say what went wrong.
#pragma once
#include "cuda/launch_api.h"
#include "ops/torch_compat.h"

namespace diffqkv {

// Makes the device of `like` current, and checks that its kernels can run there.
class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& like);
  void* stream() const { return stream_; }
  const DeviceFacts& facts() const { return facts_; }
  // Not an argument error, so without the prefix that becomes a ValueError.
  void check(int error) const { STD_TORCH_CHECK(error == 0, op_, ": CUDA error: ", cuda_error_string(error)); }
  bool capturing() const;
  // Whether DIFFQKV_DEBUG=1 asks to look at the contents of device tensors, which synchronises; an error in a capture.
  bool debugging() const;

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
  const DeviceFacts& facts_;
};

// Zeros for the tickets of one kernel of the call, without a kernel of their own where possible.
class CudaTickets {
 public:
  CudaTickets(const CudaCall& call, const Tensor& like, int64_t count);
  uint32_t* first() const { return first_; }

 private:
  uint32_t* first_ = nullptr;
  std::optional<Tensor> own_;
};

Tensor on_host(const Tensor& t);
inline std::optional<Tensor> on_host(const std::optional<Tensor>& t) {
  return t ? std::optional(on_host(*t)) : std::nullopt;
}

}  // namespace diffqkv
