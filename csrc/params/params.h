// One plain struct per op: what a kernel needs to know, in pointers, counts and strides. Strides are in elements, the
// last dimension always has stride 1. No torch here.
#pragma once
#include <cstdint>

#include "params/groups.h"

namespace diffqkv {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };
constexpr int64_t dtype_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// How K lies in a cache. Panels are the CPU's fast layout: 32 tokens side by side for each dimension, so that a score
// needs no horizontal sum; bf16 keeps two neighbouring dimensions in one 32-bit word, as a bf16 dot product wants them.
enum class KLayout : int32_t {
  rows = 0,    // [pages, G, page_size, n_k / G, d_k], any strides
  panels = 1,  // [pages, n_k, page_size / 32, d_k, 32], bf16: [pages, n_k, page_size / 32, d_k / 2, 32, 2]
};
inline constexpr int64_t kPanelTokens = 32;
inline constexpr int64_t kMaxHeadDim = 256;

// Up to this exponent of 2 a product of a score and a factor rounds by no more than 2^-17. Where a row's maximum, or
// its lse, has a larger one, its exponents are products of differences of scores, not differences of products.
inline constexpr float kLargeExponent = 256.0f;

enum class Tail : int32_t { drop = 0, renorm = 1, mean = 2 };

// Queries or results: [batch, heads, tokens, dim].
struct TokenView {
  void* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_token = 0;
  DType dtype = DType::f32;
};

// K or V by page. A contiguous cache and a plain [batch, heads, tokens, dim] tensor are the case "page = batch entry".
// Element (page, group, head in group, token): data + page * stride_page + group * stride_group + head * stride_head +
// token * stride_token. In panels stride_panel replaces stride_token: it leads from one 32-token panel to the next.
struct KvView {
  void* data = nullptr;
  int64_t stride_page = 0, stride_group = 0, stride_head = 0, stride_token = 0, stride_panel = 0;
  DType dtype = DType::f32;
  KLayout layout = KLayout::rows;
};

// Where the tokens of batch entry b lie: in page b, in pages block_table[b][token / page_size], or, where sequences are
// packed one after the other, from token first_token[b] on of page 0.
struct Paging {
  const int32_t* block_table = nullptr;  // [batch, max_blocks] or null
  int64_t stride = 0;                    // of a block table row
  int64_t page_size = 0;                 // tokens a page; of a contiguous cache: its capacity
  const int32_t* first_token = nullptr;  // [batch] or null
};

// Which probabilities are dropped: a function of the position alone, the same on every device (philox.h).
struct Dropout {
  uint32_t threshold = 0;  // an element is kept if its 16 random bits reach this; 0: no dropout
  uint32_t offset = 0;
  uint64_t seed = 0;

  DIFFQKV_HOST_DEVICE constexpr double keep_scale() const { return 65536.0 / (65536.0 - threshold); }
};

// flash_attention and decode_attention. Query i of entry b stands at position i + length[b] - s_q (aligned at the
// bottom right) and sees the keys j with kv_start[b] <= j < kv_end[b] and position - window_left <= j <= position +
// window_right; a causal window has no right side.
struct AttentionParams {
  HeadGroups heads;
  int64_t batch = 0, s_q = 0, s_k = 0, d_k = 0, d_v = 0;  // s_k: capacity, an upper bound of every length
  TokenView q;                                            // [batch, n_q, s_q, d_k]
  KvView k;                                               // n_k heads of d_k
  KvView v;                                               // n_v heads of d_v, rows
  TokenView out;                                          // [batch, n_q, s_q, d_v]
  void* lse = nullptr;                                    // [batch, n_q, s_q] contiguous, natural log; f32, f64 for f64
  const int32_t* kv_start = nullptr;                      // [batch] or null: 0
  const int32_t* kv_end = nullptr;                        // [batch] or null: s_k
  const int32_t* length = nullptr;                        // [batch] or null: s_k
  // Packed sequences: [batch + 1] or null. Then s_q and s_k are the longest, q and out [n_q, packed_queries, dim] by a
  // batch stride of 0, and lse is [n_q, packed_queries].
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  int64_t packed_queries = 0;
  Paging paging;
  double softmax_scale = 1.0;
  double softcap = 0.0;                         // x -> softcap * tanh(x / softcap) on scaled scores; 0: none
  const void* sinks = nullptr;                  // [n_q] logits without a value, f32 or f64 as lse, or null
  int64_t window_left = -1, window_right = -1;  // tokens; -1: unlimited
  Dropout dropout;

  DIFFQKV_HOST_DEVICE int64_t total_queries() const { return cu_seqlens_q ? packed_queries : batch * s_q; }
};

// The gradients of flash_attention. `forward` holds its inputs, out and lse.
struct FlashAttentionBackwardParams {
  AttentionParams forward;
  TokenView dout;              // as out
  const void* dlse = nullptr;  // as lse, or null: 0
  TokenView dq;                // as q; contiguous
  TokenView dk, dv;            // [batch, n_k, s_k, d_k], [batch, n_v, s_k, d_v] or packed; contiguous
  void* dsinks = nullptr;      // [n_q], as sinks
};

// selective_v_attention: decode_attention whose V rows are the top_k best of each query row.
struct SelectiveVAttentionParams {
  AttentionParams attention;
  int64_t top_k = 0, keep_first = 0, keep_last = 0;  // no more than the capacity
  Tail tail = Tail::drop;
  const float* v_stats = nullptr;  // [batch, n_v, d_v + 1] or null: sum of V rows, largest row norm
  bool want_bound = false;
  float max_error = -1.0f;       // L2, per result; below 0: no guarantee asked for
  float* kept_mass = nullptr;    // [batch, n_q, s_q]
  int64_t* indices = nullptr;    // [batch, n_q, s_q, indices_per_row] or null: ascending, -1 after the last
  int64_t indices_per_row = 0;   // top_k as it was given, which may exceed the capacity
  int32_t* rows_used = nullptr;  // [batch, n_q, s_q]
  float* error_bound = nullptr;  // [batch, n_q, s_q], L2; +inf where want_bound is false

  // Whether rows that read a part of V need its statistics: given ones, or some made for the call.
  DIFFQKV_HOST_DEVICE constexpr bool needs_v_stats() const {
    return tail == Tail::mean || want_bound || max_error >= 0.0f;
  }
};

// kv_cache_update: token t of entry b goes to slot positions[b][t]; -1 skips it. cos and sin rotate the first d_rot
// dimensions of K while writing (half-split convention: dimension c pairs with c + d_rot / 2).
struct KvCacheUpdateParams {
  HeadGroups heads;  // n_q does not matter: any common multiple of n_k and n_v
  int64_t batch = 0, s_new = 0, d_k = 0, d_v = 0, d_rot = 0;
  TokenView k_new;  // [batch, n_k, s_new, d_k]
  TokenView v_new;  // [batch, n_v, s_new, d_v]
  KvView k_cache, v_cache;
  const void* positions = nullptr;  // [batch, s_new], int32 or int64
  bool positions_int64 = false;
  int64_t positions_stride_batch = 0, positions_stride_token = 0;
  const void* cos = nullptr;  // [batch or 1, s_new, d_rot] or null
  const void* sin = nullptr;
  int64_t rope_stride_batch = 0, rope_stride_token = 0;  // of cos and sin alike; batch stride 0 broadcasts
  DType rope_dtype = DType::f32;
  Paging paging;
  int64_t pages = 0;         // pages in the pool; a contiguous cache has one per entry
  int64_t capacity = 0;      // slots an entry can address: page_size, or max_blocks * page_size
  float* v_stats = nullptr;  // [batch, n_v, d_v + 1] contiguous, or null
};

// rms_norm: out = weight * (x / sqrt(mean(x^2) + eps)), the quotient rounded to the dtype of x.
struct RmsNormParams {
  int64_t rows = 0, d = 0, stride = 0;  // stride: from a row of x to the next
  float eps = 0.0f;
  DType dtype = DType::f32, weight_dtype = DType::f32;
  const void *x = nullptr, *weight = nullptr;  // [rows, d], [d]
  void* out = nullptr;                         // [rows, d] contiguous
};

// rotary_embedding: out = x, the first d_rot dimensions of whose rows are rotated as kv_cache_update rotates K.
struct RotaryEmbeddingParams {
  int64_t batch = 0, tokens = 0, heads = 0, d = 0, d_rot = 0;
  TokenView x;
  void* out = nullptr;                        // [batch, tokens, heads, d] contiguous
  const void *cos = nullptr, *sin = nullptr;  // as in KvCacheUpdateParams
  int64_t rope_stride_batch = 0, rope_stride_token = 0;
  DType rope_dtype = DType::f32;
};

// swiglu: out = silu(gate) * up over numel elements. They lie side by side, or in rows of `width` (0: all are one row),
// the rows of out side by side.
struct SwigluParams {
  const void *gate = nullptr, *up = nullptr;
  void* out = nullptr;
  int64_t numel = 0;
  DType dtype = DType::f32;
  int64_t width = 0, gate_stride = 0, up_stride = 0;  // from a row to the next; on CUDA and of gradients: one row
};

// The gradients of swiglu. `forward` holds its inputs.
struct SwigluBackwardParams {
  SwigluParams forward;
  const void* dout = nullptr;
  void *dgate = nullptr, *dup = nullptr;
};

// How the weights of packed_linear lie in memory: panels of 32 output features, so that a result needs no horizontal
// sum. In a panel, for each step along in_features, the 32 features lie side by side:
enum class WeightForm : int32_t {
  f32 = 0,   // [panels, in_features, 32]
  f16 = 1,   // [panels, in_features, 32]
  bf16 = 2,  // [panels, in_features / 2, 32, 2], as a bf16 dot product wants them
  int8 = 3,  // [panels, in_features / 2, 32, 2]
  int4 = 4,  // [panels, in_features / 8, 32, 4] bytes: bits 4 j of 16-bit half h are feature 2 j + h of 8, plus 8
};
inline constexpr int64_t kPanelFeatures = 32;
inline constexpr int64_t kLeastGroupSize = 32, kMostGroupSize = 256;  // of integer weights

// packed_linear: out = x W^T + bias. A weight of int8 or int4 is scale * integer + zero, of its group of neighbouring
// input features.
struct PackedLinearParams {
  int64_t rows = 0, in_features = 0, out_features = 0;
  DType dtype = DType::f32;    // of x, out and bias
  const void* x = nullptr;     // [rows, in_features] contiguous
  void* out = nullptr;         // [rows, out_features] contiguous
  const void* bias = nullptr;  // [out_features] or null
  const void* weight = nullptr;
  WeightForm form = WeightForm::f32;
  int64_t group_size = 0;        // of int8 and int4: a multiple of 32 that divides in_features
  const void* scales = nullptr;  // [panels, in_features / group_size, 32]
  const void* zeros = nullptr;   // as scales, or null
  DType scales_dtype = DType::f32;

  constexpr bool is_integer() const { return form == WeightForm::int8 || form == WeightForm::int4; }
  // Of any number, however large: arguments are compared with it.
  constexpr int64_t panels() const { return out_features / kPanelFeatures + (out_features % kPanelFeatures != 0); }
  constexpr int64_t groups() const { return is_integer() ? in_features / group_size : 0; }
};

}  // namespace diffqkv
