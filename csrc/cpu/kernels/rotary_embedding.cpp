// rotary_embedding: the rows of Q, rotated as kv_cache_update rotates those of K.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/rotate.h"

namespace diffqkv {
namespace {

template <class E, class Rope>
void rotate_tokens(const RotaryEmbeddingParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / p.tokens, t = i % p.tokens;
    const int64_t angles = b * p.rope_stride_batch + t * p.rope_stride_token;
    const typename Rope::T *cos = (const typename Rope::T*)p.cos + angles,
                           *sin = (const typename Rope::T*)p.sin + angles;
    const typename E::T* row = (const typename E::T*)p.x.data + b * p.x.stride_batch + t * p.x.stride_token;
    typename E::T* out = (typename E::T*)p.out + i * p.heads * p.d;
    for (int64_t head = 0; head < p.heads; ++head, row += p.x.stride_head, out += p.d)
      rotate<E, Rope>(row, cos, sin, p.d_rot, p.d, out);
  }
}

}  // namespace

namespace DIFFQKV_ISA {
void rotary_embedding(const RotaryEmbeddingParams& p, int64_t begin, int64_t end) {
  const bool wide = p.rope_dtype == DType::f32;
  if (p.x.dtype == DType::f32) return rotate_tokens<F32, F32>(p, begin, end);
  if (p.x.dtype == DType::bf16)
    return wide ? rotate_tokens<BF16, F32>(p, begin, end) : rotate_tokens<BF16, BF16>(p, begin, end);
  wide ? rotate_tokens<F16, F32>(p, begin, end) : rotate_tokens<F16, F16>(p, begin, end);
}
}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
