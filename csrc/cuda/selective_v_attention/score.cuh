// Scores of a chunk of keys with up to 8 query rows of a K head, on chip all the time: what leaves is, for each row,
// its best candidates of the chunk and maximum and sum of every quantum of tokens.
//
// S^T = K q^T: tokens are the rows of the matrix products, query rows the columns, so that K is read once for all of
// them and nothing is padded. A warp takes tiles of 16 tokens through a ring of its own, without a barrier. Scores of a
// quantum change places through shared memory, and in the end a warp has all of a query row's in its registers, where
// the k-th best is found by counting.
#pragma once
#include "cuda/selective_v_attention/cache_rows.cuh"
#include "cuda/selective_v_attention/params.cuh"
#include "cuda/tile.cuh"
#include "cuda/warp.cuh"

namespace diffqkv::device::selective_v_attention {

template <class E, int kQuanta>
struct Score {
  using Params = selective_v_attention::Params;
  using T = typename E::T;
  static constexpr int kThreads = kSelectiveVAttentionThreads, kMinBlocks = 2;
  static constexpr int kChunk = kQuanta * kSelectiveVAttentionQuantum;
  static constexpr int kTiles = kSelectiveVAttentionQuantum /
                                (kSelectiveVAttentionWarps * kSelectiveVAttentionTileTokens);  // of a warp in a quantum
  static constexpr int kPer = kSelectiveVAttentionQuantum / 32, kScores = kQuanta * kPer;      // scores of a lane
  static constexpr int kWidth = 16 / sizeof(T), kSlice = kSelectiveVAttentionSliceBytes / sizeof(T);
  static constexpr int kRow = kSelectiveVAttentionRowBytes / sizeof(T), kStage = kSelectiveVAttentionTileTokens * kRow;

  // The K rows of this warp's tiles on their way to shared memory: steps are slices of tiles.
  struct Ring {
    const Params& params;
    const HeadRows<T> rows;
    T* ring;
    int t0, lo, hi, slices;  // t0: token of the chunk; lo, hi: keys that exist, from there
    int tile, end_tile, slice = 0, stage = 0;

    // Tokens of tile `i` of this warp, from t0.
    static DIFFQKV_DEVICE int token(int i) {
      return (i * kSelectiveVAttentionWarps + warp()) * kSelectiveVAttentionTileTokens;
    }
    DIFFQKV_DEVICE bool live(int i) const { return token(i) < hi && token(i) + kSelectiveVAttentionTileTokens > lo; }

    DIFFQKV_DEVICE void issue() {
      if (tile < end_tile) {
        const AttentionParams& p = params.sp.attention;
        const int first = slice * kSlice, d_k = int(p.d_k), piece = lane() % 8 * kWidth;
        const int columns = (d_k - first + kSelectiveVAttentionStep - 1) / kSelectiveVAttentionStep *
                            kSelectiveVAttentionStep;  // zeros after d_k
        DIFFQKV_UNROLL
        for (int i = 0; i < kSelectiveVAttentionTileTokens / 4; ++i) {
          const int row = 4 * i + lane() / 8, t = token(tile) + row;
          if (piece >= columns) continue;
          const bool valid = t >= lo && t < hi && first + piece < d_k;
          const T* source = valid ? rows[uint32_t(t0 + t)] + first + piece : rows.head;
          copy_piece(ring + stage * kStage + row * kRow + piece, source, valid, params.plan.k_vectors);
        }
        if (++slice == slices) slice = 0, ++tile;
        stage = (stage + 1) % kSelectiveVAttentionStages;
      }
      copy_commit();
    }
  };

  // acc += the tile's tokens times the columns, over one slice. 16-bit elements: acc as a matrix product has it; fp32:
  // token lane % 16, columns 4 * (lane / 16) and on.
  static DIFFQKV_DEVICE void multiply(const T* tile, const char* q, int q_bytes, int dims, float (&acc)[4]) {
    if constexpr (sizeof(T) == 4) {
      struct alignas(16) Four {
        float x[4];
      };
      const float* k = tile + lane() % 16 * kRow;
      const int end = dims < kSlice ? dims : kSlice;
      DIFFQKV_UNROLL_BY(1)
      for (int x = 0; x < end; x += 4) {
        const Four a = load_vector<Four>(k + x);
        DIFFQKV_UNROLL
        for (int j = 0; j < 4; ++j) {
          const Four b = load_vector<Four>(q + (lane() / 16 * 4 + j) * q_bytes + x * 4);
          DIFFQKV_UNROLL
          for (int i = 0; i < 4; ++i) acc[j] = fma(a.x[i], b.x[i], acc[j]);
        }
      }
    } else {
      const T* k = tile + lane() % 16 * kRow + lane() / 16 * 8;
      const char* columns = q + lane() % 8 * q_bytes + lane() / 8 * 16;
      const int end = dims < kSlice ? dims : kSlice;
      DIFFQKV_UNROLL_BY(1)
      for (int x = 0; x < end; x += kSelectiveVAttentionStep) {
        uint32_t a[4], b[4];
        load_matrices(b, columns + x * 2);
        load_matrices(a, k + x);
        E::mma(acc, a, b[0], b[1]);
        load_matrices(a, k + x + 16);
        E::mma(acc, a, b[2], b[3]);
      }
    }
  }

  // Where the elements of acc belong: token of the tile and column.
  static DIFFQKV_DEVICE int token_of_element(int i) { return sizeof(T) == 4 ? lane() % 16 : lane() / 4 + i / 2 * 8; }
  static DIFFQKV_DEVICE int column_of_element(int i) {
    return sizeof(T) == 4 ? lane() / 16 * 4 + i : lane() % 4 * 2 + i % 2;
  }

  static DIFFQKV_DEVICE void load_queries(const Params& params, const Entry& entry, int64_t k_head, int first_column,
                                          int q_bytes, char* q) {
    const AttentionParams& p = params.sp.attention;
    const int width = q_bytes / int(sizeof(T)), queries = int(params.queries);
    for (int i = thread(); i < kSelectiveVAttentionColumns * width; i += kThreads) {
      const int column = first_column + i / width, x = i % width;
      T value = T(0);
      if (column < params.columns() && x < p.d_k) {
        const int64_t h = k_head * p.heads.q_per_k() + column / queries, query = params.first_query + column % queries;
        value = static_cast<const T*>(p.q.data)[row_of(p.q, entry, h, query) + x];
      }
      reinterpret_cast<T*>(q)[i] = value;
    }
  }

  // One query row of the chunk, taken by a warp: lane l has the tokens l, l + 32, ...
  struct Column {
    const Params& params;
    uint32_t row;    // of this launch
    int begin, end;  // the keys that it sees
    int t0, lo, hi;  // those of the chunk, from t0
    float least = __builtin_inff(), most = -__builtin_inff();
    bool nan = false;
    uint32_t u[kScores];  // scores in the order of integers, 0 where it does not see the token

    DIFFQKV_DEVICE Column(const Params& the_params, uint32_t the_row, KeyRange keys, int first)
        : params(the_params),
          row(the_row),
          begin(int(keys.lo)),
          end(int(keys.hi)),
          t0(first),
          lo(begin > t0 ? begin - t0 : 0),
          hi(end - t0 < kChunk ? end - t0 : kChunk) {}

    // Takes the scores of a quantum, and writes its maximum and sum of exponentials.
    DIFFQKV_DEVICE void take(int quantum, const float* scores) {
      const int first = quantum * kSelectiveVAttentionQuantum;
      const float scale = params.plan.exp2_scale;
      float maximum = -__builtin_inff(), sum = 0.0f;
      bool unordered = false;
      DIFFQKV_UNROLL
      for (int i = 0; i < kPer; ++i) {
        const int t = first + 32 * i + lane();
        const bool valid = t >= lo && t < hi;
        const float x = scores[32 * i + lane()];
        unordered |= valid && x != x;
        maximum = valid && x > maximum ? x : maximum;
        least = valid && x < least ? x : least;
        u[first / 32 + i] = valid ? ordered_of(x) : 0;
      }
      if (params.plan.forced > 0) {
        const ForcedKeys forced(params.sp, {begin, end});
        DIFFQKV_UNROLL_BY(1)
        for (int t = lo > first ? lo + lane() : first + lane(); t < hi && t < first + kSelectiveVAttentionQuantum;
             t += 32)
          if (forced.has(t0 + t)) params.forced(row)[forced.place(t0 + t)] = scores[t - first];
      }
      maximum = warp_max(maximum);
      most = maximum > most ? maximum : most;
      const float base = maximum > -__builtin_inff() ? maximum : 0.0f;
      DIFFQKV_UNROLL
      for (int i = 0; i < kPer; ++i) {
        const uint32_t x = u[first / 32 + i];
        sum += x != 0 ? exp2((float_of_ordered(x) - base) * scale) : 0.0f;
      }
      sum = warp_sum(sum);
      unordered = ballot(unordered) != 0;
      nan |= unordered;
      if (lane() == 0) {
        float* mass = params.mass(row) + (t0 / kSelectiveVAttentionQuantum + quantum) * 2;
        mass[0] = unordered ? __builtin_nanf("") : maximum;
        mass[1] = sum;
      }
    }

    // Writes the best candidates, in the order of their tokens.
    DIFFQKV_DEVICE void select() const {
      if (hi <= lo || nan) return;  // where a score is NaN there is no order to select by
      const int n = hi - lo, room = params.plan.candidates, kept = n < room ? n : room;
      uint32_t cut = 1;  // the candidates: all above, and so many of those that equal it
      int ties = n;
      if (n > kept) {
        // At least `kept` scores reach cut, fewer, `above`, reach end.
        cut = ordered_of(-warp_max(-least));
        uint32_t end = ordered_of(most) + 1;
        int above = 0;
        for (int step = 0; end - cut > 1; ++step) {
          // Halving values is quicker than halving exponents where scores have one scale, but need not end.
          uint32_t middle = ordered_of(0.5f * (float_of_ordered(cut) + float_of_ordered(end)));
          if (step >= 24 || middle <= cut || middle >= end) middle = cut + (end - cut) / 2;
          int count = 0;
          DIFFQKV_UNROLL
          for (int i = 0; i < kScores; ++i) count += u[i] >= middle ? 1 : 0;
          count = warp_sum(count);
          if (count < kept) {
            end = middle, above = count;
          } else {
            cut = middle;
            if (count == kept) break;  // then there are no more ties than places for them
          }
        }
        ties = kept - above;
      }
      uint64_t* out = params.keys(row) + int64_t(t0 / kChunk) * room;
      int count = 0;
      DIFFQKV_UNROLL
      for (int i = 0; i < kScores; ++i) {
        const uint32_t equal = ballot(u[i] == cut);
        const bool chosen = u[i] > cut || (u[i] == cut && count_ones(equal & lanes_below()) < ties);
        ties -= count_ones(equal);
        const uint32_t all = ballot(chosen);
        if (chosen) out[count + count_ones(all & lanes_below())] = key_of(u[i], uint32_t(t0 + 32 * i + lane()));
        count += count_ones(all);
      }
      for (int i = kept + lane(); i < room; i += 32) out[i] = 0;
    }
  };

  static DIFFQKV_DEVICE void run(const Params& params, char* shared) {
    const AttentionParams& p = params.sp.attention;
    uint32_t block = uint32_t(block_x());
    const uint32_t column_tiles = uint32_t(params.column_tiles()), chunks = uint32_t(params.plan.chunks);
    const int first_column = int(block % column_tiles) * kSelectiveVAttentionColumns;
    const int t0 = int(block / column_tiles % chunks) * kChunk;
    block /= column_tiles * chunks;
    const int64_t k_head = block % uint32_t(p.heads.n_k), entry_of_launch = block / uint32_t(p.heads.n_k);
    const Entry entry = entry_of(p, params.first_entry + entry_of_launch);
    const KeyRange keys = keys_of_query(p, entry, params.first_query + params.queries - 1);  // of the last of them
    const int lo = int(max_of(keys.lo - t0, 0)), hi = int(min_of(keys.hi - t0, kChunk));
    if (lo >= hi) return;

    const int q_bytes = selective_v_attention_q_bytes(int(p.d_k), sizeof(T)), queries = int(params.queries);
    char* q = shared;
    float* scores = reinterpret_cast<float*>(q + kSelectiveVAttentionColumns * q_bytes);
    T* ring = reinterpret_cast<T*>(scores + kSelectiveVAttentionColumns * kSelectiveVAttentionScoreStride) +
              warp() * (kSelectiveVAttentionRingBytes / int(sizeof(T)));
    const int slices = (int(p.d_k) + kSlice - 1) / kSlice;
    const HeadRows<T> rows(p.k, p.paging, entry.b, k_head, p.heads.k_per_group());
    Ring copies{params, rows, ring, t0, lo, hi, slices, 0, kQuanta * kTiles};
    while (copies.tile < copies.end_tile && !copies.live(copies.tile)) ++copies.tile;
    while (copies.end_tile > copies.tile && !copies.live(copies.end_tile - 1)) --copies.end_tile;
    for (int i = 0; i < kSelectiveVAttentionStages - 1; ++i) copies.issue();
    load_queries(params, entry, k_head, first_column, q_bytes, q);
    sync_block();

    const bool negative = p.softmax_scale < 0.0;  // then the least score is the best
    const int row = first_column + warp();
    const bool has_column = row < params.columns();
    const int64_t h = k_head * p.heads.q_per_k() + row / queries, query = row % queries;
    Column column(params, uint32_t((entry_of_launch * p.heads.n_q + h) * queries + query),
                  keys_of_query(p, entry, params.first_query + query), t0);
    int stage = 0;
    DIFFQKV_UNROLL
    for (int quantum = 0; quantum < kQuanta; ++quantum) {
      if (quantum * kSelectiveVAttentionQuantum >= hi || (quantum + 1) * kSelectiveVAttentionQuantum <= lo) {
        DIFFQKV_UNROLL
        for (int i = 0; i < kPer; ++i) column.u[quantum * kPer + i] = 0;
        continue;
      }
      DIFFQKV_UNROLL_BY(1)
      for (int i = 0; i < kTiles; ++i) {
        float acc[4] = {};
        const int tile = quantum * kTiles + i;
        if (copies.live(tile)) {
          DIFFQKV_UNROLL_BY(1)
          for (int slice = 0; slice < slices; ++slice) {
            copy_wait<kSelectiveVAttentionStages - 2>();
            sync_warp();  // all have the new stage, and have read the one before it, which the next copies replace
            multiply(ring + stage * kStage, q + slice * kSelectiveVAttentionSliceBytes, q_bytes,
                     int(p.d_k) - slice * kSlice, acc);
            copies.issue();
            stage = (stage + 1) % kSelectiveVAttentionStages;
          }
        }
        DIFFQKV_UNROLL
        for (int j = 0; j < 4; ++j)
          scores[column_of_element(j) * kSelectiveVAttentionScoreStride + Ring::token(i) + token_of_element(j)] =
              negative ? -acc[j] : acc[j];
      }
      sync_block();
      if (has_column) column.take(quantum, scores + warp() * kSelectiveVAttentionScoreStride);
      sync_block();
    }
    if (has_column) column.select();
  }
};

}  // namespace diffqkv::device::selective_v_attention
