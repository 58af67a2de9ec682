// kv_cache_update: writes new K and V rows to their cache slots, rotating K on the way (RoPE, half-split convention).
// Tokens are taken in runs whose slots follow each other in one panel: a whole panel is a transpose.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/panels.h"
#include "cpu/kernels/rotate.h"
#include "cpu/kernels/v_stats.h"
#include "params/layout.h"

namespace diffqkv {
namespace {

// Fewer tokens than this are scattered into their panel: a transpose costs the same for one as for 32.
constexpr int64_t kScatteredTokens = 8;

// Rows have whole 16-byte pieces: dimensions are multiples of 8.
template <class T>
DIFFQKV_INLINE void copy_row(const T* src, int64_t d, T* out) {
  constexpr int64_t kVector = VL * 4 / sizeof(T), kPiece = 16 / sizeof(T);
  int64_t c = 0;
  for (; c + kVector <= d; c += kVector) vstore((float*)(out + c), vload((const float*)(src + c)));
  for (; c < d; c += kPiece) _mm_storeu_si128((__m128i*)(out + c), _mm_loadu_si128((const __m128i*)(src + c)));
}

// out = row with its first d_rot dimensions rotated by the angles of token t.
template <class E, class Rope>
void rotate_token(const KvCacheUpdateParams& p, int64_t b, int64_t t, const typename E::T* row, typename E::T* out) {
  const int64_t at = b * p.rope_stride_batch + t * p.rope_stride_token;
  rotate<E, Rope>(row, (const typename Rope::T*)p.cos + at, (const typename Rope::T*)p.sin + at, p.d_rot, p.d_k, out);
}

// Writes rows [n, d] of the tokens first, first + 1, ... of a panel.
template <class E>
void write_panel(const typename E::T* rows, int64_t stride, int64_t n, int64_t d, int64_t first, typename E::T* panel) {
  using T = typename E::T;
  if (n < kScatteredTokens) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < d; ++c) panel[panel_element(first + i, c, E::dtype)] = rows[i * stride + c];
    return;
  }
  const int64_t W = d * int64_t(sizeof(T)) / 4;
  const word* row[kPanelTokens];
  for (const word*& r : row) r = kZeroRow;
  for (int64_t i = 0; i < n; ++i) row[first + i] = (const word*)(rows + i * stride);
  if (n == kPanelTokens && E::dtype != DType::f16) return transpose_panel(row, W, (word*)panel);

  word words[kMaxRowWords * kPanelTokens];
  transpose_panel(row, W, words);
  for (int64_t w = 0; w < W; ++w) {
    const word* src = words + w * kPanelTokens;
    if constexpr (E::dtype == DType::f16) {  // its panels keep the two dimensions of a word apart
      for (int64_t i = first; i < first + n; ++i) {
        panel[2 * w * kPanelTokens + i] = T(src[i]);
        panel[(2 * w + 1) * kPanelTokens + i] = T(src[i] >> 16);
      }
    } else {
      __builtin_memcpy((word*)panel + w * kPanelTokens + first, src + first, n * sizeof(word));
    }
  }
}

// Writes the n tokens from t on to slot and the places after it.
template <class E, class Rope>
void write_run(const KvCacheUpdateParams& p, int64_t b, int64_t group, int64_t t, int64_t n, KvSlot slot) {
  using T = typename E::T;
  T staged[kPanelTokens * kMaxHeadDim];
  for (int64_t i = 0; i < p.heads.k_per_group(); ++i) {
    const int64_t head = group * p.heads.k_per_group() + i;
    const T* src =
        (const T*)p.k_new.data + b * p.k_new.stride_batch + head * p.k_new.stride_head + t * p.k_new.stride_token;
    int64_t stride = p.k_new.stride_token;
    const bool panels = p.k_cache.layout == KLayout::panels;
    if (p.d_rot > 0 || (panels && sizeof(T) == 2)) {  // panels are made of words, which 16-bit rows need not lie on
      for (int64_t j = 0; j < n; ++j)
        p.d_rot > 0 ? rotate_token<E, Rope>(p, b, t + j, src + j * stride, staged + j * p.d_k)
                    : copy_row(src + j * stride, p.d_k, staged + j * p.d_k);
      asm("" ::: "memory");  // written as elements, read as words
      src = staged;
      stride = p.d_k;
    }
    T* cache = (T*)p.k_cache.data;
    if (panels) {
      write_panel<E>(src, stride, n, p.d_k, slot.token % kPanelTokens, cache + kv_panel(p.k_cache, group, i, slot));
      continue;
    }
    T* out = cache + kv_row(p.k_cache, group, i, slot);
    for (int64_t j = 0; j < n; ++j) copy_row(src + j * stride, p.d_k, out + j * p.k_cache.stride_token);
  }
  for (int64_t i = 0; i < p.heads.v_per_group(); ++i) {
    const int64_t head = group * p.heads.v_per_group() + i;
    const T* src =
        (const T*)p.v_new.data + b * p.v_new.stride_batch + head * p.v_new.stride_head + t * p.v_new.stride_token;
    T* out = (T*)p.v_cache.data + kv_row(p.v_cache, group, i, slot);
    float* stats = p.v_stats ? p.v_stats + (b * p.heads.n_v + head) * (p.d_v + 1) : nullptr;
    for (int64_t j = 0; j < n; ++j) {
      copy_row(src + j * p.v_new.stride_token, p.d_v, out + j * p.v_cache.stride_token);
      if (stats) add_to_stats<E>(src + j * p.v_new.stride_token, p.d_v, stats);
    }
  }
}

template <class E, class Rope>
void update(const KvCacheUpdateParams& p, int64_t b, int64_t group, int64_t begin, int64_t end) {
  for (int64_t t = begin, n; t < end; t += n) {
    n = 1;
    const KvSlot slot = new_token_slot(p, b, t);
    if (slot.page < 0) continue;
    const int64_t room = min_of(kPanelTokens - slot.token % kPanelTokens, p.paging.page_size - slot.token);
    const int64_t position = new_token_position(p, b, t);
    while (n < min_of(room, end - t) && new_token_position(p, b, t + n) == position + n) ++n;
    write_run<E, Rope>(p, b, group, t, n, slot);
  }
}

}  // namespace

namespace DIFFQKV_ISA {
void kv_cache_update(const KvCacheUpdateParams& p, int64_t b, int64_t group, int64_t begin, int64_t end) {
  const bool wide = p.rope_dtype == DType::f32;
  if (p.k_new.dtype == DType::f32) return update<F32, F32>(p, b, group, begin, end);
  if (p.k_new.dtype == DType::bf16)
    return wide ? update<BF16, F32>(p, b, group, begin, end) : update<BF16, BF16>(p, b, group, begin, end);
  wide ? update<F16, F32>(p, b, group, begin, end) : update<F16, F16>(p, b, group, begin, end);
}
}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
