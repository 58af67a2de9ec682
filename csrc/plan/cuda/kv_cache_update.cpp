#include "plan/cuda/kv_cache_update.h"

#include <algorithm>
#include <initializer_list>

#include "params/arithmetic.h"

namespace diffqkv {
namespace {

constexpr int64_t kVectorBytes = 16;
constexpr int64_t kTileUnits = 512;  // two per thread: loads in flight without many idle threads at small batches

struct Stride {
  int64_t elements, extent;
};

bool aligned(const void* data, int64_t element_bytes, int64_t bytes, std::initializer_list<Stride> strides) {
  if (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) != 0) return false;
  return std::all_of(strides.begin(), strides.end(), [&](Stride s) {
    return s.extent <= 1 || s.elements * element_bytes % bytes == 0;  // the stride of a single element is never used
  });
}

bool aligned(const TokenView& view, int64_t element_bytes, int64_t batch, int64_t heads, int64_t tokens) {
  return aligned(view.data, element_bytes, kVectorBytes,
                 {{view.stride_batch, batch}, {view.stride_head, heads}, {view.stride_token, tokens}});
}

bool aligned(const KvView& view, int64_t element_bytes, int64_t pages, int64_t groups, int64_t heads, int64_t tokens) {
  if (view.layout == KLayout::panels) {  // written element by element, bf16 by words of two
    return view.dtype != DType::bf16 || aligned(view.data, element_bytes, 4,
                                                {{view.stride_page, pages},
                                                 {view.stride_group, groups},
                                                 {view.stride_head, heads},
                                                 {view.stride_panel, ceil_div(tokens, kPanelTokens)}});
  }
  return aligned(
      view.data, element_bytes, kVectorBytes,
      {{view.stride_page, pages}, {view.stride_group, groups}, {view.stride_head, heads}, {view.stride_token, tokens}});
}

// How many elements a thread may move at once.
int64_t vector_width(const KvCacheUpdateParams& p) {
  const int64_t size = dtype_size(p.k_new.dtype), width = kVectorBytes / size;
  const HeadGroups& h = p.heads;
  const int64_t page_size = p.paging.page_size;
  bool ok = p.d_k % width == 0 && p.d_v % width == 0 && p.d_rot / 2 % width == 0 &&
            aligned(p.k_new, size, p.batch, h.n_k, p.s_new) && aligned(p.v_new, size, p.batch, h.n_v, p.s_new) &&
            aligned(p.k_cache, size, p.pages, h.groups(), h.k_per_group(), page_size) &&
            aligned(p.v_cache, size, p.pages, h.groups(), h.v_per_group(), page_size);
  if (p.d_rot > 0) {
    const int64_t rope_size = dtype_size(p.rope_dtype);
    for (const void* table : {p.cos, p.sin}) {
      ok = ok &&
           aligned(table, rope_size, kVectorBytes, {{p.rope_stride_batch, p.batch}, {p.rope_stride_token, p.s_new}});
    }
  }
  return ok ? width : 1;
}

}  // namespace

CudaKvCacheUpdatePlan plan_cuda_kv_cache_update(const KvCacheUpdateParams& p) {
  CudaKvCacheUpdatePlan plan;
  if (p.batch == 0 || p.s_new == 0) return plan;
  const HeadGroups& h = p.heads;
  const int64_t width = vector_width(p);
  const int64_t k_head_units = p.d_rot / 2 / width + (p.d_k - p.d_rot) / width, v_head_units = p.d_v / width;
  const int64_t units = h.k_per_group() * k_head_units + h.v_per_group() * v_head_units;

  // Threads of a warp that write a panel take neighbouring tokens, so a tile of panels has a panel's worth of them.
  const int64_t wanted = p.k_cache.layout == KLayout::panels ? kPanelTokens : std::max<int64_t>(kTileUnits / units, 1);
  const int64_t tile_tokens = std::min(p.s_new, wanted);
  const int64_t token_tiles = ceil_div(p.s_new, tile_tokens);

  plan.groups = static_cast<int32_t>(h.groups());
  plan.k_heads = static_cast<int32_t>(h.k_per_group());
  plan.v_heads = static_cast<int32_t>(h.v_per_group());
  plan.k_head_units = static_cast<int32_t>(k_head_units);
  plan.v_head_units = static_cast<int32_t>(v_head_units);
  plan.width = static_cast<int32_t>(width);
  plan.tile_tokens = static_cast<int32_t>(tile_tokens);
  plan.token_tiles = static_cast<int32_t>(token_tiles);
  plan.stats_blocks = p.v_stats != nullptr ? p.batch * h.n_v : 0;
  plan.blocks = plan.stats_blocks + p.batch * h.groups() * token_tiles;
  return plan;
}

}  // namespace diffqkv
