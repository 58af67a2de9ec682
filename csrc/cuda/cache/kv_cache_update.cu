// kv_cache_update in one launch: K (rotated) and V of the new tokens to their slots, and v_stats.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>

#include "cuda/cache/kv_cache_update.cuh"
#include "diffqkv/cuda.h"

namespace diffqkv {
namespace {

struct F32 {
  using T = float;
  static constexpr DType kDType = DType::f32;
  __device__ static float get(T x) { return x; }
  __device__ static T put(float x) { return x; }
};
struct F16 {
  using T = uint16_t;
  static constexpr DType kDType = DType::f16;
  __device__ static float get(T x) { return __half2float(__ushort_as_half(x)); }
  __device__ static T put(float x) { return __half_as_ushort(__float2half_rn(x)); }
};
struct BF16 {
  using T = uint16_t;
  static constexpr DType kDType = DType::bf16;
  __device__ static float get(T x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
  __device__ static T put(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
};

// The larger one, and NaN where there is one: a bound that hides a NaN is none.
__device__ float max_norm(float a, float b) { return b > a || b != b ? b : a; }

// v_stats of one (batch entry, V head). Thread c adds dimension c token after token, so the sum does not depend on how
// tokens are spread over calls; a warp takes a row for its norm.
template <class E>
__device__ void update_stats(const CacheUpdateParams& p, const CacheUpdatePlan& plan, uint32_t block) {
  constexpr int kWarps = kCacheUpdateThreads / 32;
  __shared__ bool written[kCacheUpdateThreads];
  __shared__ float warp_norms[kWarps];
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const int d_v = static_cast<int>(p.d_v);
  const uint32_t n_v = plan.groups * plan.v_heads;
  const int64_t entry = block / n_v, head = block % n_v;
  const auto* rows =
      static_cast<const typename E::T*>(p.v_new.data) + entry * p.v_new.stride_batch + head * p.v_new.stride_head;
  float* stats = p.v_stats + static_cast<int64_t>(block) * (d_v + 1);

  float sum = thread < d_v ? stats[thread] : 0.0f, norm = 0.0f;
  for (int64_t first = 0; first < p.s_new; first += threads) {
    const int count = static_cast<int>(min(static_cast<int64_t>(threads), p.s_new - first));
    if (thread < count) written[thread] = new_token_slot(p, entry, first + thread).page >= 0;
    __syncthreads();
    const auto* chunk = rows + first * p.v_new.stride_token;
    if (thread < d_v) {
#pragma unroll 8
      for (int t = 0; t < count; ++t) {
        const float x = E::get(chunk[t * p.v_new.stride_token + thread]);
        sum = written[t] ? sum + x : sum;
      }
    }
    for (int t = warp; t < count; t += warps) {
      if (!written[t]) continue;
      float square = 0.0f;
      for (int c = lane; c < d_v; c += 32) {
        const float x = E::get(chunk[t * p.v_new.stride_token + c]);
        square += x * x;
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) square += __shfl_xor_sync(~0u, square, offset);
      norm = max_norm(norm, sqrtf(square));
    }
    __syncthreads();  // before written is overwritten
  }
  if (lane == 0) warp_norms[warp] = norm;
  __syncthreads();
  if (thread < d_v) stats[thread] = sum;
  if (thread == 0) {
    float best = stats[d_v];
    for (int w = 0; w < warps; ++w) best = max_norm(best, warp_norms[w]);
    stats[d_v] = best;
  }
}

template <class E, int N>
__global__ void __launch_bounds__(kCacheUpdateThreads)
    kv_cache_update_kernel(const __grid_constant__ CacheUpdateParams p, const __grid_constant__ CacheUpdatePlan plan) {
  const uint32_t stats_blocks = static_cast<uint32_t>(plan.stats_blocks);
  if (blockIdx.x < stats_blocks) {
    update_stats<E>(p, plan, blockIdx.x);
  } else {
    cache_update::write_tile<E, N>(p, plan, blockIdx.x - stats_blocks, threadIdx.x, blockDim.x);
  }
}

template <class E>
cudaError_t launch(const CacheUpdateParams& p, const CacheUpdatePlan& plan, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(typename E::T);
  const auto kernel = plan.width == kWidth ? kv_cache_update_kernel<E, kWidth> : kv_cache_update_kernel<E, 1>;
  kernel<<<static_cast<unsigned>(plan.blocks), plan.threads, 0, stream>>>(p, plan);
  return cudaGetLastError();
}

}  // namespace

int cuda_kv_cache_update(const CacheUpdateParams& p, void* stream) {
  if (p.k_new.dtype != p.v_new.dtype || p.k_cache.dtype != p.k_new.dtype || p.v_cache.dtype != p.v_new.dtype ||
      p.d_v > kMaxHeadDim) {
    return cudaErrorInvalidValue;
  }
  const CacheUpdatePlan plan = plan_cache_update(p);
  if (plan.blocks == 0) return cudaSuccess;
  if (plan.blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.k_new.dtype) {
    case DType::f32: return launch<F32>(p, plan, s);
    case DType::f16: return launch<F16>(p, plan, s);
    case DType::bf16: return launch<BF16>(p, plan, s);
    case DType::f64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace diffqkv
