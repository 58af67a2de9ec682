// CPU tensors: torch's thread pool runs the call.
#include <limits>

#include "cpu/run.h"
#include "ops/device.h"

namespace diffqkv {

int64_t torch_threads() { return torch::stable::get_num_threads(); }

void parallel_on_torch(int64_t workers, void (*body)(void* context, int64_t worker), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
  });
}

namespace {

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(const Tensor& like) : like_(like) {}

  Limits limits() const override { return {std::numeric_limits<int64_t>::max(), true}; }
  std::optional<Tensor> readable(const Tensor& t) const override { return t; }
  int64_t planned_length(int64_t longest, int64_t /*bound*/) const override { return longest; }

  void attention(const AttentionParams& p, int64_t max_keys) const override {
    const AttentionPlan plan = plan_attention(p, max_keys, torch_threads());
    const Tensor workspace = bytes(cpu::attention_workspace(plan));
    cpu::attention(p, plan, workspace.data_ptr(), parallel_on_torch);
  }
  void flash_attention_backward(const FlashAttentionBackwardParams& p) const override {
    const FlashAttentionBackwardPlan plan = plan_flash_attention_backward(p.forward, torch_threads());
    const Tensor workspace = bytes(cpu::flash_attention_backward_workspace(p, plan));
    cpu::flash_attention_backward(p, plan, workspace.data_ptr(), parallel_on_torch);
  }
  void selective_v_attention(const SelectiveVAttentionParams& p, int64_t max_keys) const override {
    const SelectiveVAttentionPlan plan = plan_selective_v_attention(p, max_keys, torch_threads());
    const Tensor workspace = bytes(cpu::selective_v_attention_workspace(p, plan));
    cpu::selective_v_attention(p, plan, workspace.data_ptr(), parallel_on_torch);
  }
  void kv_cache_update(const KvCacheUpdateParams& p) const override {
    cpu::kv_cache_update(p, torch_threads(), parallel_on_torch);
  }
  void swiglu(const SwigluParams& p) const override { cpu::swiglu(p, torch_threads(), parallel_on_torch); }
  void swiglu_backward(const SwigluParams& p) const override {
    cpu::swiglu_backward(p, torch_threads(), parallel_on_torch);
  }

 private:
  Tensor bytes(int64_t count) const { return torch::stable::new_empty(like_, {count}, ScalarType::Byte); }

  const Tensor& like_;
};

}  // namespace

std::unique_ptr<const Device> cpu_device(const Tensor& like) { return std::make_unique<CpuDevice>(like); }

}  // namespace diffqkv
