// What differs between devices, so that an op is written once for all: who runs a call, whether the contents of its
// tensors may be looked at, and the limits of the kernels.
#pragma once
#include <memory>

#include "ops/torch_compat.h"
#include "params/params.h"

namespace diffqkv {

class Device {
 public:
  struct Limits {
    int64_t flash_attention_tokens;  // of a sequence
    bool panels;                     // whether the attention over a cache reads K in panels
  };

  virtual ~Device() = default;

  virtual Limits limits() const = 0;
  // The tensor in host memory, for checks of its contents; nothing where a look would make the caller wait for the
  // device. With DIFFQKV_DEBUG=1 in the environment CUDA tensors are copied, which is an error while a graph is
  // captured.
  virtual std::optional<Tensor> readable(const Tensor& t) const = 0;
  std::optional<Tensor> readable(const std::optional<Tensor>& t) const { return t ? readable(*t) : std::nullopt; }
  // The length to plan for, where `longest` was found in a readable tensor and the caller promised `bound`. A launch
  // does not depend on contents: a graph replays it with others.
  virtual int64_t planned_length(int64_t longest, int64_t bound) const = 0;

  // These plan the call, get a workspace and run it; the params are complete. max_keys: the longest sequence of the
  // call, or an upper bound of it.
  virtual void attention(const AttentionParams& p, int64_t max_keys) const = 0;
  virtual void flash_attention_backward(const FlashAttentionBackwardParams& p) const = 0;
  virtual void selective_v_attention(const SelectiveVAttentionParams& p, int64_t max_keys) const = 0;
  virtual void kv_cache_update(const KvCacheUpdateParams& p) const = 0;
  virtual void swiglu(const SwigluParams& p) const = 0;
  virtual void swiglu_backward(const SwigluParams& p) const = 0;
};

// The caller's threads.
std::unique_ptr<const Device> cpu_device(const Tensor& like);
// The current stream of like's device, in libraries that were built with CUDA. op: the name that errors begin with.
std::unique_ptr<const Device> cuda_device(const char* op, const Tensor& like);

// The device of `like`, which has to outlive it.
inline std::unique_ptr<const Device> device_of([[maybe_unused]] const char* op, const Tensor& like) {
#ifdef DIFFQKV_HAVE_CUDA
  if (!like.is_cpu()) return cuda_device(op, like);
#endif
  return cpu_device(like);
}

// The number of the caller's threads, and how cpu/run.h's functions use them.
int64_t torch_threads();
void parallel_on_torch(int64_t workers, void (*body)(void* context, int64_t worker), void* context);

}  // namespace diffqkv
