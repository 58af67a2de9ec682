// What differs between devices, so that an op is written once for all: who runs a call, whether the contents of its
// tensors may be looked at, and the limits of the kernels. No op is named here: cpu/run.h and cuda/launch_api.h have a
// function `run` for the params of each.
#pragma once
#include "cpu/run.h"
#include "ops/torch_caller.h"
#ifdef DIFFQKV_HAVE_CUDA
#include "cuda/launch_api.h"
#include "ops/cuda_stream.h"
#endif

namespace diffqkv {

class Device {
 public:
  struct Limits {
    int64_t sequence_tokens;  // of a sequence that is no cache
    bool panels;              // whether the attention over a cache reads K in panels
    bool rows_apart;          // whether swiglu reads rows that do not follow each other
  };

  // The device of `like`, which has to outlive it: torch's threads, or the current stream of a GPU, which is the
  // current device from then on. op: the name that errors begin with.
  Device(const char* op, const Tensor& like);

  Limits limits() const;
  // The tensor in host memory, for checks of its contents; nothing where a look would make the caller wait for the
  // device. With DIFFQKV_DEBUG=1 in the environment CUDA tensors are copied, which is an error while a graph is
  // captured.
  std::optional<Tensor> readable(const Tensor& t) const;
  std::optional<Tensor> readable(const std::optional<Tensor>& t) const { return t ? readable(*t) : std::nullopt; }
  // The length to plan for, where `longest` was found in a readable tensor and the caller promised `bound`. A launch
  // does not depend on contents: a graph replays it with others.
  int64_t planned_length(int64_t longest, int64_t bound) const;

  // Plans the call, gets a workspace and runs it; the params are complete.
  template <class Params>
  void run(const Params& params) const {
    TorchMemory memory(like_);
#ifdef DIFFQKV_HAVE_CUDA
    // Ops without CUDA kernels are registered for the CPU alone.
    if constexpr (requires(cuda::Launch launch) { cuda::run(params, launch); })
      if (on_gpu()) return stream_->check(cuda::run(params, {stream_->facts(), stream_->get(), memory}));
#endif
    cpu::run(params, {torch_threads(), parallel_on_torch, memory});
  }

 private:
  const Tensor& like_;
#ifdef DIFFQKV_HAVE_CUDA
  bool on_gpu() const { return stream_.has_value(); }

  std::optional<CudaStream> stream_;
#else
  bool on_gpu() const { return false; }
#endif
};

}  // namespace diffqkv
