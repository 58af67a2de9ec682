// kv_cache_update in one launch: K (rotated) and V of the new tokens to their slots, and v_stats.
#pragma once
#include "cuda/warp.cuh"
#include "params/layout.h"
#include "plan/cuda/kv_cache_update.h"

namespace diffqkv::device {
namespace kv_cache_update {

template <class T, int N>
struct __attribute__((may_alias, aligned(N * sizeof(T)))) Vector {
  T x[N];
};

template <class T, int N>
DIFFQKV_DEVICE Vector<T, N> load(const void* data, int64_t i) {
  return *reinterpret_cast<const Vector<T, N>*>(static_cast<const T*>(data) + i);
}
template <class T, int N>
DIFFQKV_DEVICE void store(void* data, int64_t i, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(static_cast<T*>(data) + i) = v;
}

// x * cos + y * sin with the bits of the same formula in plain torch.
DIFFQKV_DEVICE float rotate(float x, float cos, float y, float sin) { return add(mul(x, cos), mul(y, sin)); }

// Loads N values of cos or sin: fp32, or the element type E.
template <class E, int N>
DIFFQKV_DEVICE void load_rope(const void* table, DType dtype, int64_t i, float (&out)[N]) {
  if (dtype == DType::f32) {
    constexpr int kChunk = N < 4 ? N : 4;  // 16 bytes
    for (int c = 0; c < N; c += kChunk) {
      const auto v = load<float, kChunk>(table, i + c);
      for (int j = 0; j < kChunk; ++j) out[c + j] = v.x[j];
    }
  } else {
    const auto v = load<typename E::T, N>(table, i);
    for (int j = 0; j < N; ++j) out[j] = E::get(v.x[j]);
  }
}

// Writes dimensions [dim, dim + N) of a K row.
template <class E, int N>
DIFFQKV_DEVICE void store_k(const KvView& cache, int64_t group, int64_t head, KvSlot slot, int64_t dim,
                            const Vector<typename E::T, N>& v) {
  using T = typename E::T;
  if (cache.layout == KLayout::rows) {
    store<T, N>(cache.data, kv_row(cache, group, head, slot) + dim, v);
    return;
  }
  const int64_t panel = kv_panel(cache, group, head, slot), token = slot.token % kPanelTokens;
  if constexpr (E::kDType == DType::bf16 && N > 1) {  // neighbouring dimensions share a word
    for (int j = 0; j < N; j += 2) {
      const Vector<uint32_t, 1> word{v.x[j] | static_cast<uint32_t>(v.x[j + 1]) << 16};
      store<uint32_t, 1>(cache.data, (panel + panel_element(token, dim + j, E::kDType)) / 2, word);
    }
  } else {
    for (int j = 0; j < N; ++j) {
      static_cast<T*>(cache.data)[panel + panel_element(token, dim + j, E::kDType)] = v.x[j];
    }
  }
}

// Writes a unit of K of one (batch entry, group, new token). The first units of a head rotate, the others copy. Rows
// are loaded before the slot is known, to have both on their way at once.
template <class E, int N>
DIFFQKV_DEVICE void write_k(const KvCacheUpdateParams& p, const CudaKvCacheUpdatePlan& plan, int64_t entry,
                            int64_t group, int64_t token, int32_t unit) {
  using T = typename E::T;
  const int32_t head = unit / plan.k_head_units, u = unit - head * plan.k_head_units;
  const int32_t half = static_cast<int32_t>(p.d_rot / 2), pairs = half / N;
  const int64_t row =
      entry * p.k_new.stride_batch + (group * plan.k_heads + head) * p.k_new.stride_head + token * p.k_new.stride_token;
  if (u >= pairs) {
    const int32_t dim = 2 * half + (u - pairs) * N;
    const auto x = load<T, N>(p.k_new.data, row + dim);
    const KvSlot slot = new_token_slot(p, entry, token);
    if (slot.page >= 0) store_k<E, N>(p.k_cache, group, head, slot, dim, x);
    return;
  }
  const int32_t dim = u * N;
  const auto x = load<T, N>(p.k_new.data, row + dim), y = load<T, N>(p.k_new.data, row + dim + half);
  const int64_t rope = entry * p.rope_stride_batch + token * p.rope_stride_token + dim;
  float cos_x[N], cos_y[N], sin_x[N], sin_y[N];
  load_rope<E, N>(p.cos, p.rope_dtype, rope, cos_x);
  load_rope<E, N>(p.cos, p.rope_dtype, rope + half, cos_y);
  load_rope<E, N>(p.sin, p.rope_dtype, rope, sin_x);
  load_rope<E, N>(p.sin, p.rope_dtype, rope + half, sin_y);
  const KvSlot slot = new_token_slot(p, entry, token);
  if (slot.page < 0) return;
  Vector<T, N> rotated_x, rotated_y;
  for (int j = 0; j < N; ++j) {
    const float a = E::get(x.x[j]), b = E::get(y.x[j]);
    rotated_x.x[j] = E::put(rotate(a, cos_x[j], -b, sin_x[j]));
    rotated_y.x[j] = E::put(rotate(b, cos_y[j], a, sin_y[j]));
  }
  store_k<E, N>(p.k_cache, group, head, slot, dim, rotated_x);
  store_k<E, N>(p.k_cache, group, head, slot, dim + half, rotated_y);
}

template <class E, int N>
DIFFQKV_DEVICE void write_v(const KvCacheUpdateParams& p, const CudaKvCacheUpdatePlan& plan, int64_t entry,
                            int64_t group, int64_t token, int32_t unit) {
  using T = typename E::T;
  const int32_t head = unit / plan.v_head_units, dim = (unit - head * plan.v_head_units) * N;
  const int64_t row =
      entry * p.v_new.stride_batch + (group * plan.v_heads + head) * p.v_new.stride_head + token * p.v_new.stride_token;
  const auto x = load<T, N>(p.v_new.data, row + dim);
  const KvSlot slot = new_token_slot(p, entry, token);
  if (slot.page >= 0) store<T, N>(p.v_cache.data, kv_row(p.v_cache, group, head, slot) + dim, x);
}

// Neighbouring threads take neighbouring vectors of a token, and in K panels neighbouring tokens of a vector: what lies
// side by side in the cache.
template <class E, int N>
DIFFQKV_DEVICE void write_tile(const KvCacheUpdateParams& p, const CudaKvCacheUpdatePlan& plan, uint32_t tile) {
  const uint32_t tiles = plan.token_tiles, groups = plan.groups, entry_group = tile / tiles;
  const int64_t entry = entry_group / groups, group = entry_group % groups;
  const int64_t first = static_cast<int64_t>(tile % tiles) * plan.tile_tokens;
  const int32_t tokens = static_cast<int32_t>(p.s_new - first < plan.tile_tokens ? p.s_new - first : plan.tile_tokens);
  const int32_t k_units = plan.k_heads * plan.k_head_units, v_units = plan.v_heads * plan.v_head_units;
  const bool panels = p.k_cache.layout == KLayout::panels;
  for (int32_t i = thread(); i < tokens * (k_units + v_units); i += kKvCacheUpdateThreads) {
    if (i < tokens * k_units) {
      const int32_t token = panels ? i % tokens : i / k_units, unit = panels ? i / tokens : i % k_units;
      write_k<E, N>(p, plan, entry, group, first + token, unit);
    } else {
      const int32_t j = i - tokens * k_units;
      write_v<E, N>(p, plan, entry, group, first + j / v_units, j % v_units);
    }
  }
}

struct StatsShared {
  bool written[kKvCacheUpdateThreads];
  float warp_norms[kKvCacheUpdateThreads / 32];
};

// Updates v_stats of one (batch entry, V head). Thread c adds dimension c token after token, so the sum does not depend
// on how tokens are spread over calls; a warp takes a row for its norm.
template <class E>
DIFFQKV_DEVICE void update_stats(const KvCacheUpdateParams& p, const CudaKvCacheUpdatePlan& plan, uint32_t block,
                                 StatsShared& shared) {
  constexpr int kThreads = kKvCacheUpdateThreads, kWarps = kThreads / 32, kAtOnce = 8;
  const int d_v = static_cast<int>(p.d_v), c = thread();
  const uint32_t n_v = plan.groups * plan.v_heads;
  const int64_t entry = block / n_v, head = block % n_v;
  const auto* rows =
      static_cast<const typename E::T*>(p.v_new.data) + entry * p.v_new.stride_batch + head * p.v_new.stride_head;
  float* stats = p.v_stats + static_cast<int64_t>(block) * (d_v + 1);

  float sum = c < d_v ? stats[c] : 0.0f, norm = 0.0f;
  for (int64_t first = 0; first < p.s_new; first += kThreads) {
    const int count = static_cast<int>(p.s_new - first < kThreads ? p.s_new - first : kThreads);
    if (c < count) shared.written[c] = new_token_slot(p, entry, first + c).page >= 0;
    sync_block();
    const auto* chunk = rows + first * p.v_new.stride_token;
    for (int t = 0; c < d_v && t < count; t += kAtOnce) {
      float x[kAtOnce];
      DIFFQKV_UNROLL
      for (int j = 0; j < kAtOnce; ++j) x[j] = t + j < count ? E::get(chunk[(t + j) * p.v_new.stride_token + c]) : 0.0f;
      DIFFQKV_UNROLL
      for (int j = 0; j < kAtOnce; ++j) sum = t + j < count && shared.written[t + j] ? sum + x[j] : sum;
    }
    for (int t = warp(); t < count; t += kWarps) {
      if (!shared.written[t]) continue;
      float square = 0.0f;
      for (int i = lane(); i < d_v; i += 32) {
        const float x = E::get(chunk[t * p.v_new.stride_token + i]);
        square += x * x;
      }
      norm = max_norm(norm, sqrt(warp_sum(square)));
    }
    sync_block();  // before written is overwritten
  }
  if (lane() == 0) shared.warp_norms[warp()] = norm;
  sync_block();
  if (c < d_v) stats[c] = sum;
  if (c == 0) {
    float best = stats[d_v];
    for (int w = 0; w < kWarps; ++w) best = max_norm(best, shared.warp_norms[w]);
    stats[d_v] = best;
  }
}

}  // namespace kv_cache_update

// N: elements that a thread moves at once.
template <class E, int N>
struct KvCacheUpdate {
  struct Params {
    KvCacheUpdateParams p;
    CudaKvCacheUpdatePlan plan;
  };
  static constexpr int kThreads = kKvCacheUpdateThreads, kMinBlocks = 4;
  static constexpr int kSharedBytes = sizeof(kv_cache_update::StatsShared);

  static DIFFQKV_DEVICE void run(const Params& params, char* shared) {
    const auto block = static_cast<uint32_t>(block_x()), stats_blocks = static_cast<uint32_t>(params.plan.stats_blocks);
    if (block < stats_blocks) {
      auto& stats = *reinterpret_cast<kv_cache_update::StatsShared*>(shared);
      return kv_cache_update::update_stats<E>(params.p, params.plan, block, stats);
    }
    kv_cache_update::write_tile<E, N>(params.p, params.plan, block - stats_blocks);
  }
};

}  // namespace diffqkv::device
