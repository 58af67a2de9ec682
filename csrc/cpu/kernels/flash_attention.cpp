// flash_attention: a block of queries over all their keys. An item holds the queries [i0, i1) of some heads of one KV
// group, so a tile of K packed once serves every q head of its K head, and a tile of V every q head of its V head.
#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/kernels.h"

namespace diffqkv {
namespace {

struct BlockRows {  // the rows of one q head in an item
  const word* q;
  float* o;
  RowState* state;
};

template <bool kDot>
void attention_block(const AttentionParams& p, const AttentionPlan& plan, int64_t item, void* memory) {
  // Blocks of late queries see most keys: they come first, so that the last items to finish are short.
  const int64_t per_block = p.batch * plan.groups * plan.head_chunks;
  const int64_t blocks = (p.s_q + plan.block_q - 1) / plan.block_q;
  const int64_t i0 = (blocks - 1 - item / per_block) * plan.block_q;
  const int64_t rest = item % per_block, b = rest / (plan.groups * plan.head_chunks);
  const Entry entry = entry_of(p, b);
  const int64_t rows = min_of(plan.block_q, entry.s_q - i0);
  if (rows <= 0) return;  // a packed sequence that is not the longest
  const int64_t group = rest / plan.head_chunks % plan.groups, chunk = rest % plan.head_chunks;
  const int64_t group_end = (group + 1) * p.heads.q_per_group();
  const int64_t h0 = group * p.heads.q_per_group() + chunk * plan.heads_per_item;
  const int64_t h1 = min_of(group_end, h0 + plan.heads_per_item), heads = h1 - h0;

  const int64_t W = kDot ? p.d_k / 2 : p.d_k, stride_o = padded_dim(p.d_v);
  Scratch scratch(memory);
  word* q = scratch.take<word>(heads * rows * W);
  float* o = scratch.take<float>(heads * rows * stride_o);
  RowState* state = scratch.take<RowState>(heads * rows);
  word* k_tile = scratch.take<word>(kKeyTile * W);
  float* row_copies = scratch.take<float>(kPanelTokens * p.d_k);
  word* v_tile = scratch.take<word>(kKeyTile * stride_o);
  float* s = scratch.take<float>(kQkRows * kKeyTile);
  uint16_t* s16 = scratch.take<uint16_t>(kQkRows * kKeyTile);
  uint16_t* bits = scratch.take<uint16_t>(kRandomBits);

  // Rows that lie in memory as the dot products read them are not copied.
  const bool q_direct = p.softmax_scale >= 0 && (kDot ? p.q.stride_token % 2 == 0 : p.q.dtype == DType::f32);
  const int64_t stride_q = q_direct ? p.q.stride_token / (kDot ? 2 : 1) : W;
  if (!q_direct)
    for (int64_t h = h0; h < h1; ++h)
      for (int64_t r = 0; r < rows; ++r)
        copy_query<kDot>(row_at(p.q, entry, h, i0 + r), p.q.dtype, p.d_k, p.softmax_scale < 0,
                         q + ((h - h0) * rows + r) * W);
  for (int64_t x = 0; x < heads * rows * stride_o; ++x) o[x] = 0.0f;
  for (int64_t r = 0; r < heads * rows; ++r) state[r] = kEmptyRow;

  const float c = exp2_scale(p);
  const KeyRange block = {keys_of_query(p, entry, i0).lo, keys_of_query(p, entry, i0 + rows - 1).hi};
  const bool v_direct = p.v.dtype == DType::f32 && p.v.stride_token == p.d_v && p.d_v % VL == 0;

  for (int64_t t0 = block.first_tile(kKeyTile); t0 < block.hi; t0 += kKeyTile) {
    const KeyRange tile = {max_of(block.lo, t0), min_of(block.hi, t0 + kKeyTile)};
    const int64_t first_panel = (tile.lo - t0) / kPanelTokens, end_panel = round_up(tile.hi - t0, 32) / kPanelTokens;
    const word* panels[kKeyTile / kPanelTokens];
    const word* v = nullptr;
    int64_t stride_v = stride_o, k_packed = -1, v_packed = -1;

    for (int64_t h = h0; h < h1; ++h) {
      if (p.heads.k_head(h) != k_packed) {
        k_packed = p.heads.k_head(h);
        for (int64_t x = first_panel; x < end_panel; ++x)
          panels[x] = key_panel<kDot>(k_head_of(p, b, k_packed), t0 + x * kPanelTokens, tile,
                                      k_tile + x * kPanelTokens * W, row_copies);
      }
      if (p.heads.v_head(h) != v_packed) {
        v_packed = p.heads.v_head(h);
        const KvHead values = v_head_of(p, b, v_packed);
        if (!kDot && v_direct && page_end(p.paging, tile.lo, tile.hi) == tile.hi) {
          v = (const word*)values.row(tile.lo) - (tile.lo - t0) * p.d_v;
          stride_v = p.d_v;
        } else {
          const int64_t from = (tile.lo - t0) / 2 * 2, to = round_up(tile.hi - t0, 2);
          pack_rows<kDot>(values, t0 + from, to - from, tile, v_tile + (kDot ? from / 2 : from) * stride_o, stride_o);
          v = v_tile;
          stride_v = stride_o;
        }
      }
      const word* q_head = q_direct ? (const word*)row_at(p.q, entry, h, i0) : q + (h - h0) * rows * W;
      const BlockRows head = {q_head, o + (h - h0) * rows * stride_o, state + (h - h0) * rows};

      const auto row_keys = [&](int64_t r) {  // columns of this tile that row r sees
        const KeyRange keys = keys_of_query(p, entry, i0 + r);
        const int64_t hi = max_of(tile.lo, min_of(tile.hi, keys.hi));
        return KeyRange{min_of(hi, max_of(tile.lo, keys.lo)) - t0, hi - t0};
      };
      // A block of rows goes through all steps before the next: its scores stay in the L1 cache.
      for (int64_t r0 = 0; r0 < rows; r0 += kQkRows) {
        const int64_t count = min_of(kQkRows, rows - r0);
        const KeyRange seen = {row_keys(r0).lo, row_keys(r0 + count - 1).hi};
        for (int64_t x = seen.lo / kPanelTokens; x * kPanelTokens < seen.hi; ++x)
          score_rows<kDot, kKeyTile>(count, head.q + r0 * stride_q, stride_q, panels[x], W, s + x * kPanelTokens);
        if (p.softcap > 0) cap_scores(p, count, s, kKeyTile, seen.lo, seen.hi);
        for (int64_t r = r0; r < r0 + count; r += kPvRows) {
          const int64_t few = min_of(kPvRows, r0 + count - r);
          KeyRange keys = {row_keys(r).lo, row_keys(r + few - 1).hi};
          if (keys.lo >= keys.hi) continue;
          if (kDot) keys = {keys.lo / 2 * 2, round_up(keys.hi, 2)};
          float* probabilities = s + (r - r0) * kKeyTile;
          uint16_t* rounded = s16 + (r - r0) * kKeyTile;
          float factor[16];
          softmax_rows<kDot, kKeyTile>(
              few, probabilities, rounded, [&](int64_t x) { return row_keys(r + x); }, keys, c, head.state + r, factor);
          if (p.dropout.threshold > 0)
            for (int64_t x = 0; x < few; ++x) {
              draw_bits(p.dropout, b * p.heads.n_q + h, i0 + r + x, t0 + keys.lo, t0 + keys.hi, bits);
              const uint16_t* first = bits + keys.lo % kKeysPerDraw;
              for (int64_t j = keys.lo; j < keys.hi; ++j)
                if (first[j - keys.lo] < p.dropout.threshold)
                  kDot ? (void)(rounded[x * kKeyTile + j] = 0) : (void)(probabilities[x * kKeyTile + j] = 0.0f);
            }
          for (int64_t x = 0; x < few; ++x)
            if (factor[x] != 1.0f) scale_row(head.o + (r + x) * stride_o, stride_o, factor[x]);
          const word* p_words = kDot ? (const word*)(rounded + keys.lo) : (const word*)(probabilities + keys.lo);
          constexpr int64_t kStepKeys = kDot ? 2 : 1;
          accumulate_rows<kDot, Rows<kDot, kKeyTile>, Words>(few, p_words, v + keys.lo / kStepKeys * stride_v, stride_v,
                                                             (keys.hi - keys.lo) / kStepKeys, p.d_v,
                                                             head.o + r * stride_o, stride_o);
        }
      }
    }
  }
  for (int64_t h = h0; h < h1; ++h)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = (h - h0) * rows + r;
      store_result(p, entry, h, i0 + r, o + row * stride_o, state[row]);
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
