// Attention of a block of queries over all their keys. An item holds the queries [i0, i1) of some heads of one KV
// group, so a tile of K packed once serves every q head of its K head, and a tile of V every q head of its V head.
#include "cpu/attention_tile.h"
#include "cpu/kernels.h"

namespace diffqkv {
namespace {

// V rows [t0, t0 + n) of a head as fp32 rows, or with kDot as pairs of rows; keys outside `valid` become zeros.
template <bool kDot>
void pack_values(const AttentionParams& p, int64_t b, int64_t v_head, int64_t t0, int64_t n, KeyRange valid, word* dst,
                 int64_t stride) {
  const int64_t per_group = p.heads.v_per_group();
  const auto row = [&](int64_t t) -> const void* {
    if (t < valid.lo || t >= valid.hi) return kZeroRow;
    const KvSlot slot = kv_page(p.paging, b, t);
    const int64_t offset = slot.token * p.v.stride_token;
    return p.v.dtype == DType::f32 ? (const void*)(head_at<const float>(p.v, slot.page, v_head, per_group) + offset)
                                   : head_at<const uint16_t>(p.v, slot.page, v_head, per_group) + offset;
  };
  if (kDot) {
    for (int64_t t = 0; t < n; t += 2, dst += stride) {
      const uint16_t *even = (const uint16_t*)row(t0 + t), *odd = (const uint16_t*)row(t0 + t + 1);
      for (int64_t x = 0; x < p.d_v; ++x) dst[x] = word(even[x]) | word(odd[x]) << 16;
    }
  } else {
    for (int64_t t = 0; t < n; ++t, dst += stride) row_to_float(row(t0 + t), p.v.dtype, p.d_v, (float*)dst);
  }
}

struct BlockRows {  // the rows of one q head in an item
  const word* q;
  float* o;
  RowState* state;
};

template <bool kDot>
void attention_block(const AttentionParams& p, const AttentionPlan& plan, int64_t item, void* workspace) {
  // Blocks of late queries see most keys: they come first, so that the last items to finish are short.
  const int64_t per_block = p.batch * plan.groups * plan.head_chunks;
  const int64_t blocks = (p.s_q + plan.block_q - 1) / plan.block_q;
  const int64_t i0 = (blocks - 1 - item / per_block) * plan.block_q, rows = min_of(plan.block_q, p.s_q - i0);
  const int64_t rest = item % per_block, b = rest / (plan.groups * plan.head_chunks);
  const int64_t group = rest / plan.head_chunks % plan.groups, chunk = rest % plan.head_chunks;
  const int64_t group_end = (group + 1) * p.heads.q_per_group();
  const int64_t h0 = group * p.heads.q_per_group() + chunk * plan.heads_per_item;
  const int64_t h1 = min_of(group_end, h0 + plan.heads_per_item), heads = h1 - h0;

  const int64_t W = kDot ? p.d_k / 2 : p.d_k, stride_o = padded_dim(p.d_v);
  Scratch scratch(workspace);
  word* q = scratch.take<word>(heads * rows * W);
  float* o = scratch.take<float>(heads * rows * stride_o);
  RowState* state = scratch.take<RowState>(heads * rows);
  word* k_tile = scratch.take<word>(kKeyTile * W);
  float* row_copies = scratch.take<float>(kPanelTokens * p.d_k);
  word* v_tile = scratch.take<word>(kKeyTile * stride_o);
  float* s = scratch.take<float>(kQkRows * kKeyTile);
  uint16_t* s16 = scratch.take<uint16_t>(kQkRows * kKeyTile);

  const KeyRange entry = keys_of_entry(p, b);
  // Rows that lie in memory as the dot products read them are not copied.
  const bool q_direct = p.softmax_scale >= 0 && (kDot ? p.q.stride_token % 2 == 0 : p.q.dtype == DType::f32);
  const int64_t stride_q = q_direct ? p.q.stride_token / (kDot ? 2 : 1) : W;
  if (!q_direct)
    for (int64_t h = h0; h < h1; ++h)
      for (int64_t r = 0; r < rows; ++r)
        copy_query<kDot>(query_row(p, b, h, i0 + r), p.q.dtype, p.d_k, p.softmax_scale < 0,
                         q + ((h - h0) * rows + r) * W);
  for (int64_t x = 0; x < heads * rows * stride_o; ++x) o[x] = 0.0f;
  for (int64_t r = 0; r < heads * rows; ++r) state[r] = kEmptyRow;

  const float c = exp2_scale(p);
  // Later queries see more keys, so the last row's range is that of the block.
  const KeyRange block = keys_of_query(p, b, entry, i0 + rows - 1);
  const bool v_direct = p.v.dtype == DType::f32 && p.v.stride_token == p.d_v && p.d_v % VL == 0;

  for (int64_t t0 = block.lo / kKeyTile * kKeyTile; t0 < block.hi; t0 += kKeyTile) {
    const KeyRange tile = {max_of(block.lo, t0), min_of(block.hi, t0 + kKeyTile)};
    const int64_t first_panel = (tile.lo - t0) / kPanelTokens, end_panel = round_up(tile.hi - t0, 32) / kPanelTokens;
    const word* panels[kKeyTile / kPanelTokens];
    const word* v = nullptr;
    int64_t stride_v = stride_o, k_packed = -1, v_packed = -1;

    for (int64_t h = h0; h < h1; ++h) {
      if (p.heads.k_head(h) != k_packed) {
        k_packed = p.heads.k_head(h);
        for (int64_t x = first_panel; x < end_panel; ++x)
          panels[x] =
              key_panel<kDot>(p, b, k_packed, t0 + x * kPanelTokens, tile, k_tile + x * kPanelTokens * W, row_copies);
      }
      if (p.heads.v_head(h) != v_packed) {
        v_packed = p.heads.v_head(h);
        const KvSlot slot = kv_page(p.paging, b, tile.lo);
        if (!kDot && v_direct && page_end(p.paging, tile.lo, tile.hi) == tile.hi) {
          v = head_at<const word>(p.v, slot.page, v_packed, p.heads.v_per_group()) +
              (slot.token - (tile.lo - t0)) * p.d_v;
          stride_v = p.d_v;
        } else {
          const int64_t from = (tile.lo - t0) / 2 * 2, to = round_up(tile.hi - t0, 2);
          pack_values<kDot>(p, b, v_packed, t0 + from, to - from, tile, v_tile + (kDot ? from / 2 : from) * stride_o,
                            stride_o);
          v = v_tile;
          stride_v = stride_o;
        }
      }
      const word* q_head = q_direct ? (const word*)query_row(p, b, h, i0) : q + (h - h0) * rows * W;
      const BlockRows head = {q_head, o + (h - h0) * rows * stride_o, state + (h - h0) * rows};

      const auto row_keys = [&](int64_t r) {  // columns of this tile that row r sees
        const KeyRange keys = keys_of_query(p, b, entry, i0 + r);
        const int64_t lo = max_of(tile.lo, keys.lo) - t0;
        return KeyRange{lo, max_of(lo, min_of(tile.hi, keys.hi) - t0)};
      };
      // A block of rows goes through all steps before the next: its scores stay in the L1 cache.
      for (int64_t r0 = 0; r0 < rows; r0 += kQkRows) {
        const int64_t count = min_of(kQkRows, rows - r0), end = row_keys(r0 + count - 1).hi;
        for (int64_t x = first_panel; x * kPanelTokens < end; ++x)
          score_rows<kDot, kKeyTile>(count, head.q + r0 * stride_q, stride_q, panels[x], W, s + x * kPanelTokens);
        for (int64_t r = r0; r < r0 + count; r += kPvRows) {
          const int64_t few = min_of(kPvRows, r0 + count - r);
          KeyRange keys = row_keys(r + few - 1);
          if (keys.lo == keys.hi) continue;
          if (kDot) keys = {keys.lo / 2 * 2, round_up(keys.hi, 2)};
          float* probabilities = s + (r - r0) * kKeyTile;
          uint16_t* rounded = s16 + (r - r0) * kKeyTile;
          float factor[16];
          softmax_rows<kDot, kKeyTile>(
              few, probabilities, rounded, [&](int64_t x) { return row_keys(r + x); }, keys, c, head.state + r, factor);
          for (int64_t x = 0; x < few; ++x)
            if (factor[x] != 1.0f) scale_row(head.o + (r + x) * stride_o, stride_o, factor[x]);
          if constexpr (kDot)
            accumulate_rows<true, kKeyTile, Pairs>(few, (const word*)(rounded + keys.lo), v + keys.lo / 2 * stride_v,
                                                   stride_v, (keys.hi - keys.lo) / 2, p.d_v, head.o + r * stride_o,
                                                   stride_o);
          else
            accumulate_rows<false, kKeyTile, F32>(few, (const word*)(probabilities + keys.lo),
                                                  (const float*)v + keys.lo * stride_v, stride_v, keys.hi - keys.lo,
                                                  p.d_v, head.o + r * stride_o, stride_o);
        }
      }
    }
  }
  for (int64_t h = h0; h < h1; ++h)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = (h - h0) * rows + r;
      store_row(p, b, h, i0 + r, o + row * stride_o, state[row], c);
    }
}

}  // namespace

namespace DIFFQKV_ISA {
void attention_block(const AttentionParams& p, const AttentionPlan& plan, int64_t item, void* scratch) {
#if defined(__AVX512BF16__)
  if (p.q.dtype == DType::bf16) return diffqkv::attention_block<true>(p, plan, item, scratch);
#endif
  diffqkv::attention_block<false>(p, plan, item, scratch);
}
}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
