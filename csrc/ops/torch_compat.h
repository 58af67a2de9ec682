// All that the ops take from torch: its stable ABI, seen through the torch 2.11 target.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/run.h"
#include "params/params.h"

// Lives in libtorch_cuda; null on a CPU build of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream)
    __attribute__((weak, visibility("default")));

// The Python wrappers turn "diffqkv: argument: got ..., want ..." into ValueError, or TypeError if it is about a dtype.
#define DIFFQKV_CHECK(condition, ...) STD_TORCH_CHECK(condition, "diffqkv: ", __VA_ARGS__)

namespace diffqkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// TORCH_BOX copies arguments out of 64 bits: a float or int32_t parameter would silently read half of a value.
template <class T>
struct boxable : std::false_type {};
template <>
struct boxable<Tensor> : std::true_type {};
template <>
struct boxable<int64_t> : std::true_type {};
template <>
struct boxable<double> : std::true_type {};
template <>
struct boxable<bool> : std::true_type {};
template <class T>
struct boxable<std::optional<T>> : boxable<T> {};
template <class R, class... A>
constexpr bool boxable_arguments(R (*)(A...)) {
  return (boxable<std::remove_cvref_t<A>>::value && ...);
}
#define DIFFQKV_IMPL(m, name, function)                                                                     \
  static_assert(::diffqkv::boxable_arguments(&function), #function " takes int64_t, double, bool, Tensor"); \
  m.impl(#name, TORCH_BOX(&function))

inline void* current_cuda_stream(int32_t device) {
  DIFFQKV_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "device: got cuda, want cpu: this torch has no CUDA");
  void* stream = nullptr;
  DIFFQKV_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == TORCH_SUCCESS, "device: no current CUDA stream");
  return stream;
}

// torch's thread pool behind the core's callback.
inline void parallel_on_torch(int64_t workers, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
  });
}
inline int64_t torch_threads() { return torch::stable::get_num_threads(); }

}  // namespace diffqkv
