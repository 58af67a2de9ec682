#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/launch_api.h"
#include "cuda/swiglu/swiglu.cuh"

namespace diffqkv::cuda {
namespace {

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class E, bool backward>
cudaError_t launch_blocks(const SwigluBackwardParams& bp, const Launch& launch) {
  using Kernel = device::Swiglu<E, backward>;
  const SwigluParams& p = bp.forward;
  const bool vectors =
      aligned(p.gate) && aligned(p.up) && aligned(p.out) && aligned(bp.dout) && aligned(bp.dgate) && aligned(bp.dup);
  constexpr int64_t kPerBlock = Kernel::kThreads * Kernel::kWidth;
  const int64_t blocks = std::clamp<int64_t>(ceil_div(p.numel, kPerBlock), 1, 8 * launch.facts.multiprocessors);
  return device::launch_blocks<Kernel>({bp, vectors}, blocks, 0, static_cast<cudaStream_t>(launch.stream));
}

template <bool backward>
int dispatch(const SwigluBackwardParams& bp, const Launch& launch) {
  if (bp.forward.numel == 0) return cudaSuccess;
  switch (bp.forward.dtype) {
    case DType::f32: return launch_blocks<device::F32, backward>(bp, launch);
    case DType::f16: return launch_blocks<device::F16, backward>(bp, launch);
    case DType::bf16: return launch_blocks<device::BF16, backward>(bp, launch);
    case DType::f64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int run(const SwigluParams& p, const Launch& launch) { return dispatch<false>({p}, launch); }
int run(const SwigluBackwardParams& bp, const Launch& launch) { return dispatch<true>(bp, launch); }

}  // namespace diffqkv::cuda
