// How flash_attention is cut into blocks on a GPU: a pure function of shapes and device.
#pragma once
#include <cstdint>

#include "params/params.h"
#include "plan/cuda/device_facts.h"

namespace diffqkv {

// A kernel on matrix products, for fp16 and bf16: what it holds in registers, and so what its code is compiled for. A
// block takes block_m queries of a q head and walks their keys by block_n, the tile of its softmax.
struct FlashAttentionVariant {
  int32_t d_k = 0, d_v = 0;  // head dimensions that fit; smaller ones are padded with zeros in shared memory
  int32_t warps = 0;
  int32_t warp_rows = 0;  // queries of a warp: 32 read shared memory half as often per product as 16
  int32_t block_n = 0;
  int32_t blocks = 0;  // to a multiprocessor, as far as registers go

  constexpr int32_t block_m() const { return warps * warp_rows; }
  constexpr bool holds(int64_t k, int64_t v) const { return k <= d_k && v <= d_v; }
};
// Smaller ones first; CMake compiles the kernels of these dimensions. Of a thread's 255 registers the accumulator of a
// warp's 32 queries takes d_v and their scores take block_n, so that 256 dimensions leave room for 16 queries. A
// result's bits depend on block_n, which therefore follows from the dimensions alone.
inline constexpr FlashAttentionVariant kFlashAttentionVariants[] = {
    {32, 64, 4, 32, 64, 2},   {64, 64, 4, 32, 64, 2},   {64, 128, 4, 32, 64, 2},
    {128, 128, 4, 32, 64, 2}, {256, 256, 4, 16, 32, 2},
};
inline constexpr int32_t kFlashAttentionVariantCount =
    sizeof(kFlashAttentionVariants) / sizeof(kFlashAttentionVariants[0]);
inline constexpr int64_t kMaxFlashAttentionTokens = int64_t{1} << 30;  // of a sequence: kernels count them in 32 bits

// Beside its tiles a block keeps in shared memory where the rows of two tiles' keys begin, and what it works on.
inline constexpr int64_t kFlashAttentionRowBytes = 16, kFlashAttentionBlockBytes = 48;

// The kernel for fp32 and fp64: a warp to a query, a lane to a key.
inline constexpr int32_t kPlainWarps = 8, kPlainKeys = 32;

struct CudaFlashAttentionPlan {
  int32_t variant = -1;              // of kFlashAttentionVariants; -1: the plain kernel
  bool features = false;             // softcap or dropout
  int32_t block_m = 0, block_n = 0;  // queries of a block, keys that it takes at a time
  int32_t stages = 0;                // tiles of K, and of V, in shared memory; two are loaded further ahead
  int32_t threads = 0;               // per block
  int64_t shared_bytes = 0;
  int64_t query_blocks = 0;     // of a sequence and head
  int64_t blocks = 0;           // in all: [batch, query_blocks, n_q]
  bool aligned = false;         // rows of q, k and v begin at multiples of 16 bytes
  bool out_aligned = false;     // those of out
  double flops = 0, bytes = 0;  // of sequences of the greatest length
};

CudaFlashAttentionPlan plan_cuda_flash_attention(const AttentionParams& params, const DeviceFacts& facts);

}  // namespace diffqkv
