// Torch as the caller of csrc/cpu and csrc/cuda: its threads and its memory.
#pragma once
#include "ops/torch_compat.h"
#include "params/memory.h"

namespace diffqkv {

// The number of the caller's threads, and how cpu/caller.h's Parallel uses them.
int64_t torch_threads();
void parallel_on_torch(int64_t workers, void (*body)(void* context, int64_t worker), void* context);

// Memory beside `like`, which has to outlive it. Torch's allocator keeps what is freed for the work that its stream has
// been given before.
class TorchMemory final : public Memory {
 public:
  explicit TorchMemory(const Tensor& like) : like_(like) {}

  void* take(int64_t bytes) override;

 private:
  const Tensor& like_;
  std::optional<Tensor> piece_;
};

}  // namespace diffqkv
