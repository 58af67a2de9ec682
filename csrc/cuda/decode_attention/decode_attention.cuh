// decode_attention: few queries over a long cache. A block takes one split of the tokens for the q heads of a KV group,
// so that K is read once for all of them: S^T = K q^T with the tokens as rows of the matrix product and the query rows
// as its 8 columns, then O^T = V^T P^T for each V head with the columns of its own q heads. The last block of a group
// to end merges the splits, in their order.
#pragma once
#include "cuda/tile.cuh"
#include "params/key_range.h"
#include "params/layout.h"
#include "plan/cuda/decode_attention.h"

namespace diffqkv::device {

struct DecodeAttentionParams {
  AttentionParams p;
  CudaDecodeAttentionPlan plan;
  float* partials = nullptr;    // [batch, G, chunks, splits, plan.partial_floats]
  uint32_t* tickets = nullptr;  // [batch, G, chunks], zeros before and after
};

// kBulk: tiles come by bulk copies of whole rows (sm_90), else 16 bytes at a time.
template <class E, DecodeAttentionSize kSize, bool kBulk>
struct DecodeAttention {
  using Params = DecodeAttentionParams;
  using T = typename E::T;
  static constexpr int kThreads = kDecodeAttentionThreads, kMinBlocks = 2;
  static constexpr int kTiles = kSize.tiles, kJobs = kSize.jobs;
  static constexpr int kRows = 16, kStep = 16;  // tokens of a matrix product, dimensions of a step

  // ---- a block's share ---------------------------------------------------------------------------------------------

  struct Block {
    const AttentionParams& p;
    const CudaDecodeAttentionPlan& plan;
    DecodeAttentionChunk chunk;
    Entry entry;
    int64_t batch, group, split;
    int columns;                // of this chunk
    KeyRange keys;              // that any of its queries sees
    int64_t first_split, live;  // splits that hold such keys: their first and their number

    DIFFQKV_DEVICE Block(const Params& params)
        : p(params.p), plan(params.plan), batch(block_z()), group(block_y() / plan.chunks), split(block_x()) {
      chunk = DecodeAttentionChunk::of(p.heads, group, plan.heads_per_chunk, block_y() % plan.chunks);
      entry = entry_of(p, batch);
      columns = chunk.q_heads * static_cast<int>(p.s_q);
      keys = {keys_of_query(p, entry, 0).lo, keys_of_query(p, entry, p.s_q - 1).hi};
      const bool none = keys.hi <= keys.lo;
      first_split = none ? 0 : keys.lo / plan.split_tokens;
      live = none ? 0 : (keys.hi - 1) / plan.split_tokens - first_split + 1;
    }
    DIFFQKV_DEVICE int query_of(int column) const { return column % static_cast<int>(p.s_q); }
    DIFFQKV_DEVICE int head_of(int column) const { return chunk.first_q + column / static_cast<int>(p.s_q); }
    // Columns of the chunk that read a K or V head, `per` q heads to a head.
    DIFFQKV_DEVICE void columns_of(int64_t head, int64_t per, int& begin, int& end) const {
      const int64_t first = max_of(head * per - chunk.first_q, 0);
      const int64_t last = min_of((head + 1) * per - chunk.first_q, chunk.q_heads);
      begin = static_cast<int>(first * p.s_q), end = static_cast<int>(last * p.s_q);
    }
    DIFFQKV_DEVICE int64_t group_index() const { return batch * (p.heads.groups() * plan.chunks) + block_y(); }
  };

  // ---- shared memory -----------------------------------------------------------------------------------------------

  struct Shared {
    T *q, *p, *stages;
    float *most, *alpha;  // [warps, columns], [columns]
    int32_t* bounds;      // [columns, 2]: keys that a column sees
    Barrier* arrived;     // [stages], of bulk copies
    int stage_elements, v_offset;

    DIFFQKV_DEVICE Shared(const CudaDecodeAttentionPlan& plan, char* shared) {
      const int columns = plan.column_tiles * kDecodeAttentionColumns;
      q = reinterpret_cast<T*>(shared);
      p = q + columns * plan.q_stride;
      stages = p + plan.tile_tokens * plan.p_stride;
      v_offset = plan.tile_tokens * plan.k_stride;
      stage_elements = v_offset + plan.tile_tokens * plan.v_stride;
      most = reinterpret_cast<float*>(stages + plan.stages * stage_elements);
      alpha = most + kDecodeAttentionWarps * columns;
      bounds = reinterpret_cast<int32_t*>(alpha + columns);
      arrived = reinterpret_cast<Barrier*>(bounds + 2 * columns);
    }
    DIFFQKV_DEVICE T* k(int stage) const { return stages + stage * stage_elements; }
    DIFFQKV_DEVICE T* v(int stage) const { return k(stage) + v_offset; }
  };

  // Writes what never changes: the queries, the keys that each column sees, and zeros where a head is padded to whole
  // steps.
  static DIFFQKV_DEVICE void prepare(const Block& b, const Shared& s) {
    const AttentionParams& p = b.p;
    const int d = static_cast<int>(p.d_k), padded = b.plan.q_stride,
              all = b.plan.column_tiles * kDecodeAttentionColumns;
    for (int i = thread(); i < all * padded; i += kThreads) {
      const int column = i / padded, x = i % padded;
      T value = 0;
      if (column < b.columns && x < d)
        value = static_cast<const T*>(p.q.data)[row_of(p.q, b.entry, b.head_of(column), b.query_of(column)) + x];
      s.q[i] = value;
    }
    for (int column = thread(); column < all; column += kThreads) {
      const KeyRange keys = keys_of_query(p, b.entry, column < b.columns ? b.query_of(column) : 0);
      s.bounds[2 * column] = static_cast<int32_t>(keys.lo);
      s.bounds[2 * column + 1] = static_cast<int32_t>(keys.hi);
    }
    if (p.d_k % kStep != 0 || p.d_v % kStep != 0)
      for (int i = thread(); i < b.plan.stages * s.stage_elements; i += kThreads) s.stages[i] = 0;
    if constexpr (kBulk) {
      fence_before_bulk();
      if (thread() == 0) {
        for (int stage = 0; stage < b.plan.stages; ++stage) barrier_init(s.arrived + stage, 1);
        barrier_init_done();
      }
    }
  }

  // Where the rows of the chunk's first K or V head begin in a page, and how many heads follow one another.
  struct Rows {
    const T* first;
    int64_t stride_page, stride_token, stride_head;
    int heads, dim, width;  // width: of a head in shared memory
    DIFFQKV_DEVICE Rows(const KvView& view, int64_t group, int64_t in_group, int count, int64_t d)
        : first(static_cast<const T*>(view.data) + group * view.stride_group + in_group * view.stride_head),
          stride_page(view.stride_page),
          stride_token(view.stride_token),
          stride_head(view.stride_head),
          heads(count),
          dim(static_cast<int>(d)),
          width(static_cast<int>(round_up(d, kStep))) {}
  };
  static DIFFQKV_DEVICE Rows rows_of(const Block& b, bool k) {
    const DecodeAttentionChunk& c = b.chunk;
    const int64_t first =
        k ? c.first_k - b.group * b.p.heads.k_per_group() : c.first_v - b.group * b.p.heads.v_per_group();
    return {k ? b.p.k : b.p.v, b.group, first, k ? c.k_heads : c.v_heads, k ? b.p.d_k : b.p.d_v};
  }

  // Warp 0 starts the copies of a tile of tokens, row by row; the rows of tokens that do not exist are set to zero.
  static DIFFQKV_DEVICE void load_tile_in_bulk(const Block& b, const Shared& s, int64_t first, int stage) {
    if (warp() != 0) return;
    const CudaDecodeAttentionPlan& plan = b.plan;
    const Rows k = rows_of(b, true), v = rows_of(b, false);
    const int64_t begin = max_of(first, b.keys.lo), end = min_of(first + plan.tile_tokens, b.keys.hi);
    if (lane() == 0)
      barrier_arrive_expecting(s.arrived + stage, static_cast<int>(end - begin) * (k.heads * k.dim + v.heads * v.dim) *
                                                      static_cast<int>(sizeof(T)));
    sync_warp();
    for (int i = lane(); i < plan.tile_tokens; i += 32) {
      const int64_t token = first + i;
      const bool exists = token >= begin && token < end;
      const KvSlot slot = exists ? kv_page(b.p.paging, b.batch, token) : KvSlot{0, 0};
      copy_row(k, s.k(stage) + i * plan.k_stride, slot, exists, s.arrived + stage);
      copy_row(v, s.v(stage) + i * plan.v_stride, slot, exists, s.arrived + stage);
    }
    fence_before_bulk();  // of the zeros
  }
  static DIFFQKV_DEVICE void copy_row(const Rows& rows, T* target, KvSlot slot, bool exists, Barrier* arrived) {
    if (!exists) {
      for (int x = 0; x < rows.heads * rows.width; ++x) target[x] = 0;
      return;
    }
    const T* source = rows.first + slot.page * rows.stride_page + slot.token * rows.stride_token;
    const bool together = rows.stride_head == rows.dim && rows.dim == rows.width;  // all heads in one stretch
    const int copies = together ? 1 : rows.heads, elements = together ? rows.heads * rows.dim : rows.dim;
    for (int head = 0; head < copies; ++head)
      copy_bulk(target + head * rows.width, source + head * rows.stride_head, elements * static_cast<int>(sizeof(T)),
                arrived);
  }

  // Starts the copies of a tile of tokens. Neighbouring lanes take neighbouring pieces of a token's K and V rows, warps
  // take tokens in turn.
  static DIFFQKV_DEVICE void load_tile_in_pieces(const Block& b, const Shared& s, int64_t first, int stage) {
    const AttentionParams& p = b.p;
    const CudaDecodeAttentionPlan& plan = b.plan;
    // Where the warp's tokens lie: lane l looks up its l-th one.
    const int64_t mine = first + warp() + kDecodeAttentionWarps * lane();
    const bool exists =
        kDecodeAttentionWarps * lane() + warp() < plan.tile_tokens && mine >= b.keys.lo && mine < b.keys.hi;
    const KvSlot slot = exists ? kv_page(p.paging, b.batch, mine) : KvSlot{-1, 0};
    const int my_page = static_cast<int>(slot.page), my_token = static_cast<int>(slot.token);
    const int k_pieces = static_cast<int>(p.d_k) / kPiece, v_pieces = static_cast<int>(p.d_v) / kPiece;
    const int k_units = b.chunk.k_heads * k_pieces, units = k_units + b.chunk.v_heads * v_pieces;
    for (int unit = 0; unit < units; unit += 32) {
      const int u = unit + lane();
      const bool is_k = u < k_units;
      const Rows rows = rows_of(b, is_k);
      const int i = is_k ? u : u - k_units, head = i / (is_k ? k_pieces : v_pieces), x = i * kPiece - head * rows.dim;
      const T* source = rows.first + head * rows.stride_head + x;
      T* target = (is_k ? s.k(stage) : s.v(stage)) + head * rows.width + x;
      const int stride = is_k ? plan.k_stride : plan.v_stride;
      for (int j = 0; j * kDecodeAttentionWarps + warp() < plan.tile_tokens; ++j) {
        const int64_t page = shuffle(my_page, j), token = shuffle(my_token, j);
        if (u < units)
          copy_piece(target + (j * kDecodeAttentionWarps + warp()) * stride,
                     source + page * rows.stride_page + token * rows.stride_token, page >= 0, plan.aligned);
      }
    }
  }

  // Starts the copies of tile number `tile` of `tiles`, if there is one.
  static DIFFQKV_DEVICE void load_tile(const Block& b, const Shared& s, int64_t begin, int tile, int tiles) {
    const int64_t first = begin + int64_t{tile} * b.plan.tile_tokens;
    const int stage = tile % b.plan.stages;
    if constexpr (kBulk) {
      if (tile < tiles) load_tile_in_bulk(b, s, first, stage);
    } else {
      if (tile < tiles) load_tile_in_pieces(b, s, first, stage);
      copy_commit();
    }
  }
  // Waits until the copies of the oldest tile under way have come.
  static DIFFQKV_DEVICE void wait_for_tile(const Block& b, const Shared& s, int tile) {
    const int stages = b.plan.stages;
    if constexpr (kBulk) return barrier_wait(s.arrived + tile % stages, tile / stages % 2);
    switch (stages) {
      case 2: return copy_wait<0>();
      case 3: return copy_wait<1>();
      default: return copy_wait<2>();
    }
  }

  // ---- one tile ----------------------------------------------------------------------------------------------------

  // e^x of a difference x of scores.
  static DIFFQKV_DEVICE float exp(float x) { return exp2(x * kLog2e<float>); }

  // scores[t]: of this warp's 16 tokens and the 8 columns of tile t; -inf where a column does not see a token.
  static DIFFQKV_DEVICE void score(const Block& b, const Shared& s, int64_t first, int stage,
                                   float (&scores)[kTiles][4]) {
    const AttentionParams& p = b.p;
    const int width = static_cast<int>(round_up(p.d_k, kStep)), row = warp() * kRows;
    DIFFQKV_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (t >= b.plan.column_tiles) break;
      for (int head = 0; head < b.chunk.k_heads; ++head) {
        int begin, end;
        b.columns_of(b.chunk.first_k + head, p.heads.q_per_k(), begin, end);
        if (end <= t * kDecodeAttentionColumns || begin >= (t + 1) * kDecodeAttentionColumns) continue;
        const T* a_row = s.k(stage) + (row + lane() % 16) * b.plan.k_stride + head * width + lane() / 16 * kPiece;
        const T* b_row = s.q + (t * kDecodeAttentionColumns + lane() % 8) * b.plan.q_stride + lane() / 8 % 2 * kPiece;
        float c[4] = {};
        for (int x = 0; x < width; x += kStep) {
          uint32_t keys[4], queries[2];
          load_matrices(keys, a_row + x);
          load_matrices(queries, b_row + x);
          E::mma(c, keys, queries[0], queries[1]);
        }
        DIFFQKV_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int column = t * kDecodeAttentionColumns + 2 * (lane() % 4) + i % 2;
          if (column >= begin && (column < end || end == b.columns)) scores[t][i] = c[i];
        }
      }
      const float scale = static_cast<float>(p.softmax_scale), cap = static_cast<float>(p.softcap);
      DIFFQKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float x = mul(scores[t][i], scale);
        scores[t][i] = cap != 0.0f ? mul(cap, tanh(x / cap)) : x;
      }
      DIFFQKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = t * kDecodeAttentionColumns + 2 * (lane() % 4) + i % 2;
        const int64_t token = first + row + lane() / 4 + i / 2 * 8;
        if (token < s.bounds[2 * column] || token >= s.bounds[2 * column + 1]) scores[t][i] = -INFINITY;
      }
    }
  }

  // Writes the maximum of each column over this warp's tokens, for all warps to see.
  static DIFFQKV_DEVICE void share_maxima(const Block& b, const Shared& s, const float (&scores)[kTiles][4]) {
    const int columns = b.plan.column_tiles * kDecodeAttentionColumns;
    DIFFQKV_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (t >= b.plan.column_tiles) break;
      DIFFQKV_UNROLL
      for (int i = 0; i < 2; ++i) {
        float x = fmaxf(scores[t][i], scores[t][i + 2]);
        DIFFQKV_UNROLL
        for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, shuffle_xor(x, mask));
        if (lane() < 4) s.most[warp() * columns + t * kDecodeAttentionColumns + 2 * lane() + i] = x;
      }
    }
  }

  // The state of the columns of every tile that this lane holds: 2 * (lane % 4) and the next.
  struct Columns {
    float most[kTiles][2];  // of the scores so far, the same in all warps
    float sum[kTiles][2];   // of the probabilities of this lane's tokens
  };

  // Takes the tile's scores to powers of e, divided by that of the largest so far, and writes them as operands for the
  // product with V; s.alpha becomes what each column had accumulated before is multiplied by.
  static DIFFQKV_DEVICE void softmax(const Block& b, const Shared& s, bool scoring, float (&scores)[kTiles][4],
                                     Columns& state) {
    const int columns = b.plan.column_tiles * kDecodeAttentionColumns, warps = b.plan.tile_tokens / kRows;
    DIFFQKV_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (t >= b.plan.column_tiles) break;
      float shift[2];
      DIFFQKV_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = t * kDecodeAttentionColumns + 2 * (lane() % 4) + i;
        float most = state.most[t][i];
        for (int w = 0; w < warps; ++w) most = fmaxf(most, s.most[w * columns + column]);
        shift[i] = most == -INFINITY ? 0.0f : most;
        const float alpha = exp(state.most[t][i] - shift[i]);
        if (warp() == 0 && lane() < 4) s.alpha[column] = alpha;
        state.most[t][i] = most;
        state.sum[t][i] *= alpha;
      }
      if (!scoring) continue;
      DIFFQKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        scores[t][i] = exp(scores[t][i] - shift[i % 2]);
        state.sum[t][i % 2] += scores[t][i];
      }
      DIFFQKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int token = warp() * kRows + lane() / 4 + half * 8;
        *reinterpret_cast<uint32_t*>(s.p + token * b.plan.p_stride + t * kDecodeAttentionColumns + 2 * (lane() % 4)) =
            E::pack(scores[t][2 * half], scores[t][2 * half + 1]);
      }
    }
  }

  // A warp's accumulators: job j belongs to the (V head, 16 dimensions) number warp + 4 * (j / tiles_per_v_head), and
  // to the (j % tiles_per_v_head)-th tile that the head's columns meet.
  static constexpr int kMostTiles = 8;
  static_assert(kTiles <= kMostTiles);
  struct Jobs {
    int place[kJobs];  // kMostTiles * (offset of the dimensions in a token's V row) + tile; -1: no such job
    float sum[kJobs][4];

    DIFFQKV_DEVICE int tile(int j) const { return kTiles == 1 ? 0 : place[j] % kMostTiles; }
    DIFFQKV_DEVICE int offset(int j) const { return place[j] / kMostTiles; }
    DIFFQKV_DEVICE Jobs(const Block& b) {
      const int width = static_cast<int>(round_up(b.p.d_v, kStep)), slices = width / kStep;
      const int per = b.plan.tiles_per_v_head;
      DIFFQKV_UNROLL
      for (int j = 0; j < kJobs; ++j) {
        const int pair = warp() + kDecodeAttentionWarps * (j / per), head = pair / slices;
        int begin = 0, end = 0;
        if (head < b.chunk.v_heads) b.columns_of(b.chunk.first_v + head, b.p.heads.q_per_v(), begin, end);
        const int tile = begin / kDecodeAttentionColumns + j % per;
        place[j] =
            tile * kDecodeAttentionColumns < end ? (head * width + pair % slices * kStep) * kMostTiles + tile : -1;
        DIFFQKV_UNROLL
        for (int i = 0; i < 4; ++i) sum[j][i] = 0.0f;
      }
    }
  };

  static DIFFQKV_DEVICE void accumulate(const Block& b, const Shared& s, int stage, Jobs& jobs) {
    DIFFQKV_UNROLL
    for (int j = 0; j < kJobs; ++j) {
      if (jobs.place[j] < 0) continue;
      const float* alpha = s.alpha + jobs.tile(j) * kDecodeAttentionColumns + 2 * (lane() % 4);
      const float a0 = alpha[0], a1 = alpha[1];
      jobs.sum[j][0] *= a0, jobs.sum[j][1] *= a1, jobs.sum[j][2] *= a0, jobs.sum[j][3] *= a1;
    }
    for (int token = 0; token < b.plan.tile_tokens; token += kRows) {
      const T* v_row = s.v(stage) + (token + lane() % 8 + lane() / 16 * 8) * b.plan.v_stride + lane() / 8 % 2 * kPiece;
      const T* p_row = s.p + (token + lane() % 16) * b.plan.p_stride;
      uint32_t values[4], weights[2] = {};
      DIFFQKV_UNROLL
      for (int j = 0; j < kJobs; ++j) {
        if (jobs.place[j] < 0) continue;
        load_matrices_transposed(values, v_row + jobs.offset(j));
        if (kTiles > 1 || j == 0) load_matrices_transposed(weights, p_row + jobs.tile(j) * kDecodeAttentionColumns);
        E::mma(jobs.sum[j], values, weights[0], weights[1]);
      }
    }
  }

  // ---- results -----------------------------------------------------------------------------------------------------

  // Applies a sink, and writes lse; returns what a result is multiplied by. most: score of a column; sum: of its
  // powers, divided by that of most.
  static DIFFQKV_DEVICE float finish(const Block& b, int column, float most, float sum, float& shift) {
    const AttentionParams& p = b.p;
    const int head = b.head_of(column);
    const float sink = p.sinks != nullptr ? static_cast<const float*>(p.sinks)[head] : -INFINITY;
    const float top = fmaxf(most, sink), base = top == -INFINITY ? 0.0f : top;
    const float total = sum * exp(most - base) + exp(sink - base);
    shift = base;
    static_cast<float*>(p.lse)[lse_of(p, b.entry, head, b.query_of(column))] =
        total == 0.0f ? -INFINITY : base + log2(total) * kLn2<float>;
    return total == 0.0f ? 0.0f : 1.0f / total;
  }
  static DIFFQKV_DEVICE T* out_row(const Block& b, int column) {
    return static_cast<T*>(b.p.out.data) + row_of(b.p.out, b.entry, b.head_of(column), b.query_of(column));
  }

  // Merges the partial results of all splits, 4 dimensions at a time. Each thread adds in the order of the splits.
  static DIFFQKV_DEVICE void merge(const Block& b, const Shared& s, const float* partials) {
    const int64_t step = b.plan.partial_floats;
    const int header = static_cast<int>(step - int64_t{b.plan.column_tiles} * kDecodeAttentionColumns * b.p.d_v);
    const int live = static_cast<int>(b.live), d_v = static_cast<int>(b.p.d_v);
    // A warp per column: its maximum, then its sum, each lane in the order of its splits.
    for (int column = warp(); column < b.columns; column += kDecodeAttentionWarps) {
      const float* head = partials + 2 * column;
      float most = -INFINITY, sum = 0.0f;
      for (int i = lane(); i < live; i += 32) most = fmaxf(most, load_shared_by_blocks(head + i * step));
      DIFFQKV_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) most = fmaxf(most, shuffle_xor(most, mask));
      const float base = most == -INFINITY ? 0.0f : most;
      for (int i = lane(); i < live; i += 32)
        sum += load_shared_by_blocks(head + i * step + 1) * exp(load_shared_by_blocks(head + i * step) - base);
      DIFFQKV_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      if (lane() == 0) {
        float shift;
        s.alpha[column] = finish(b, column, most, sum, shift);
        s.most[column] = shift;
      }
    }
    sync_block();
    for (int i = thread(); i < b.columns * d_v / 4; i += kThreads) {
      const int column = i * 4 / d_v, x = i * 4 - column * d_v;
      const float shift = s.most[column], factor = s.alpha[column];
      Float4 sum{};
      constexpr int kAtOnce = 8;
      for (int first = 0; first < live; first += kAtOnce) {
        Float4 values[kAtOnce];
        float most[kAtOnce];
        DIFFQKV_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
          const float* partial = partials + min_of(first + j, live - 1) * step;
          most[j] = load_shared_by_blocks(partial + 2 * column);
          values[j] = load_shared_by_blocks(reinterpret_cast<const Float4*>(partial + header + column * d_v + x));
        }
        DIFFQKV_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
          if (first + j >= live) break;
          const float weight = exp(most[j] - shift);
          DIFFQKV_UNROLL
          for (int k = 0; k < 4; ++k) sum.x[k] += weight * values[j].x[k];
        }
      }
      T* out = out_row(b, column) + x;
      DIFFQKV_UNROLL
      for (int k = 0; k < 4; ++k) out[k] = E::put(sum.x[k] * factor);
    }
  }

  // Writes the results of a chunk without keys: nothing but the sinks.
  static DIFFQKV_DEVICE void write_nothing(const Block& b) {
    for (int column = thread(); column < b.columns; column += kThreads) {
      float shift;
      finish(b, column, -INFINITY, 0.0f, shift);
      for (int64_t x = 0; x < b.p.d_v; ++x) out_row(b, column)[x] = 0;
    }
  }

  // Writes the sum of each column over lanes and warps, in their order, into s.alpha; the maximum into s.most.
  static DIFFQKV_DEVICE void gather_columns(const Block& b, const Shared& s, const Columns& state) {
    const int columns = b.plan.column_tiles * kDecodeAttentionColumns;
    sync_block();  // nobody reads the maxima of the last tile any more
    DIFFQKV_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (t >= b.plan.column_tiles) break;
      DIFFQKV_UNROLL
      for (int i = 0; i < 2; ++i) {
        float sum = state.sum[t][i];
        DIFFQKV_UNROLL
        for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        if (lane() < 4) s.most[warp() * columns + t * kDecodeAttentionColumns + 2 * lane() + i] = sum;
      }
    }
    sync_block();
    for (int column = thread(); column < columns; column += kThreads) {
      float sum = 0.0f;
      for (int w = 0; w < kDecodeAttentionWarps; ++w) sum += s.most[w * columns + column];
      s.alpha[column] = sum;
    }
    sync_block();
    DIFFQKV_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (t >= b.plan.column_tiles) break;
      if (warp() == 0 && lane() < 4)
        for (int i = 0; i < 2; ++i) s.most[t * kDecodeAttentionColumns + 2 * lane() + i] = state.most[t][i];
    }
    sync_block();
  }

  // Calls store(column, dimension, value) for everything that this thread's accumulators hold of the chunk's results.
  template <class Store>
  static DIFFQKV_DEVICE void for_results(const Block& b, const Jobs& jobs, Store store) {
    const int width = static_cast<int>(round_up(b.p.d_v, kStep));
    DIFFQKV_UNROLL
    for (int j = 0; j < kJobs; ++j) {
      if (jobs.place[j] < 0) continue;
      const int head = jobs.offset(j) / width;
      int begin, end;
      b.columns_of(b.chunk.first_v + head, b.p.heads.q_per_v(), begin, end);
      DIFFQKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = jobs.tile(j) * kDecodeAttentionColumns + 2 * (lane() % 4) + i % 2;
        const int x = jobs.offset(j) - head * width + lane() / 4 + i / 2 * 8;
        if (column >= begin && column < end && x < b.p.d_v) store(column, x, jobs.sum[j][i]);
      }
    }
  }

  static DIFFQKV_DEVICE void run(const Params& params, char* memory) {
    const Block b(params);
    const CudaDecodeAttentionPlan& plan = b.plan;
    if (b.live == 0) {
      if (b.split == 0) write_nothing(b);
      return;
    }
    if (b.split < b.first_split || b.split >= b.first_split + b.live) return;
    const Shared s(plan, memory);
    prepare(b, s);
    sync_block();  // zeros before the copies that follow

    // Tiles begin at multiples of their size from the split's first token, wherever the keys begin.
    const int64_t split_begin = b.split * plan.split_tokens;
    const int64_t begin = split_begin + max_of(b.keys.lo - split_begin, 0) / plan.tile_tokens * plan.tile_tokens;
    const int64_t end = min_of(split_begin + plan.split_tokens, b.keys.hi);
    const int tiles = static_cast<int>((end - begin + plan.tile_tokens - 1) / plan.tile_tokens);
    for (int tile = 0; tile < plan.stages - 1; ++tile) load_tile(b, s, begin, tile, tiles);

    Columns state;
    DIFFQKV_UNROLL
    for (int t = 0; t < kTiles; ++t)
      for (int i = 0; i < 2; ++i) state.most[t][i] = -INFINITY, state.sum[t][i] = 0.0f;
    Jobs jobs(b);
    const bool scoring = warp() * kRows < plan.tile_tokens;
    for (int tile = 0; tile < tiles; ++tile) {
      const int64_t first = begin + int64_t{tile} * plan.tile_tokens;
      const int stage = tile % plan.stages;
      wait_for_tile(b, s, tile);
      sync_block();  // this tile is there, and nobody reads the last one any more
      load_tile(b, s, begin, tile + plan.stages - 1, tiles);
      float scores[kTiles][4];
      if (scoring) {
        score(b, s, first, stage, scores);
        share_maxima(b, s, scores);
      }
      sync_block();
      softmax(b, s, scoring, scores, state);
      sync_block();
      accumulate(b, s, stage, jobs);
    }
    gather_columns(b, s, state);

    if (b.live == 1) {
      for (int column = thread(); column < b.columns; column += kThreads) {
        float shift;
        const float factor = finish(b, column, s.most[column], s.alpha[column], shift);
        s.alpha[column] = factor * (s.most[column] == -INFINITY ? 0.0f : exp(s.most[column] - shift));
      }
      sync_block();
      for_results(b, jobs,
                  [&](int column, int x, float value) { out_row(b, column)[x] = E::put(value * s.alpha[column]); });
      return;
    }
    float* partials = params.partials + b.group_index() * plan.splits * plan.partial_floats;
    float* mine = partials + b.split * plan.partial_floats;
    const int header =
        static_cast<int>(plan.partial_floats - int64_t{plan.column_tiles} * kDecodeAttentionColumns * b.p.d_v);
    for (int column = thread(); column < b.columns; column += kThreads) {
      mine[2 * column] = s.most[column];
      mine[2 * column + 1] = s.alpha[column];
    }
    for_results(b, jobs, [&](int column, int x, float value) { mine[header + column * b.p.d_v + x] = value; });
    fence();
    sync_block();
    bool last = false;
    if (thread() == 0)
      last = take_ticket(params.tickets + b.group_index(), static_cast<uint32_t>(b.live)) == b.live - 1;
    if (!any_in_block(last)) return;
    fence();
    merge(b, s, partials + b.first_split * plan.partial_floats);
  }
};

}  // namespace diffqkv::device
