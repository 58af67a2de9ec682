#include "ops/torch_caller.h"

namespace diffqkv {

int64_t torch_threads() { return torch::stable::get_num_threads(); }

void parallel_on_torch(int64_t workers, void (*body)(void* context, int64_t worker), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
  });
}

void* TorchMemory::take(int64_t bytes) {
  STD_TORCH_CHECK(!piece_, "memory: an op asks for it once a call");
  piece_ = torch::stable::new_empty(like_, {bytes}, ScalarType::Byte);
  return piece_->data_ptr();
}

}  // namespace diffqkv
