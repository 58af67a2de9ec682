#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/launch_api.h"
#include "cuda/swiglu/swiglu.cuh"

namespace diffqkv {
namespace {

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class E, bool backward>
cudaError_t launch(const SwigluParams& p, const DeviceFacts& facts, void* stream) {
  using Kernel = device::Swiglu<E, backward>;
  const bool vectors =
      aligned(p.gate) && aligned(p.up) && aligned(p.dout) && aligned(p.out) && aligned(p.dgate) && aligned(p.dup);
  constexpr int64_t kPerBlock = Kernel::kThreads * Kernel::kWidth;
  const int64_t blocks =
      std::clamp<int64_t>((p.numel + kPerBlock - 1) / kPerBlock, 1, int64_t{8} * facts.multiprocessors);
  return device::launch_blocks<Kernel>({p, vectors}, blocks, 0, static_cast<cudaStream_t>(stream));
}

template <bool backward>
int dispatch(const SwigluParams& p, const DeviceFacts& facts, void* stream) {
  if (p.numel == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::f32: return launch<device::F32, backward>(p, facts, stream);
    case DType::f16: return launch<device::F16, backward>(p, facts, stream);
    case DType::bf16: return launch<device::BF16, backward>(p, facts, stream);
    case DType::f64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int cuda_swiglu(const SwigluParams& p, const DeviceFacts& facts, void* stream) {
  return dispatch<false>(p, facts, stream);
}
int cuda_swiglu_backward(const SwigluParams& p, const DeviceFacts& facts, void* stream) {
  return dispatch<true>(p, facts, stream);
}

}  // namespace diffqkv
