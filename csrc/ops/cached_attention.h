// What decode_attention and selective_v_attention share: attention of new tokens over a cache.
#pragma once
#include "ops/cache_arguments.h"
#include "ops/device.h"
#include "ops/options.h"

namespace diffqkv {

// The first arguments of both ops.
struct CachedTensors : ArgumentGroup {
  Tensor q = next<Tensor>();
  Tensor k_cache = next<Tensor>();
  Tensor v_cache = next<Tensor>();
  Tensor cache_seqlens = next<Tensor>();
};

struct CacheOptions : ArgumentGroup {
  std::optional<Tensor> cache_start = next<std::optional<Tensor>>();
  std::optional<Tensor> block_table = next<std::optional<Tensor>>();
  std::optional<double> softmax_scale = next<std::optional<double>>();
  int64_t k_layout = next<int64_t>();
};

class CachedAttention {
 public:
  // Checks all but the contents of tensors; b, n_q, n_v and d_v are known from then on. checks: like q.
  CachedAttention(const Device& device, TensorChecks& checks, const CachedTensors& tensors,
                  const CacheOptions& options);
  // Checks lengths, starts and the blocks in use where they are readable.
  void check_contents() const;
  // Memory for out and lse, to which the params point from then on.
  void allocate();

  AttentionParams params;
  Tensor out, lse;

 private:
  const Device& device_;
  const CachedTensors& tensors_;
  const CacheOptions& options_;
  int64_t pages_ = 0;
};

}  // namespace diffqkv
