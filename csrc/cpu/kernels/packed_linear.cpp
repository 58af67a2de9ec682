// packed_linear: rows of x times panels of weights. An item holds a block of rows and a range of panels. Each result is
// summed up in one order, whatever rows lie beside it: over pieces of kLinearWords words, or over the groups of integer
// weights, whose products are exact.
#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/integers.h"
#include "cpu/kernels/kernels.h"

namespace diffqkv {
namespace {

static_assert(kPanelFeatures == kPanelTokens);

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

static_assert(kLinearTileRows % kQkRows == 0 && kLinearBlock == 4 && kLinearWords % kLinearBlock == 0);

// Calls body<n>(first) for runs of rows, as many as registers hold the sums of, and then for what is left.
template <int MR = kQkRows, class Body>
DIFFQKV_INLINE void for_row_runs(int64_t rows, const Body& body, int64_t first = 0) {
  for (; rows >= MR; rows -= MR, first += MR) body.template operator()<MR>(first);
  if constexpr (MR > 1) for_row_runs<MR - 1>(rows, body, first);
}

// Asks for weights kAhead bytes behind these: several rows keep a thread busy, and the memory would wait for it. Behind
// the last weights there may be no memory; asking does no harm.
constexpr int64_t kAhead = 8192;
DIFFQKV_INLINE void prefetch(const void* weights, int64_t bytes) {
  DIFFQKV_UNROLL
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)weights + kAhead + i);
}

// ---- floating-point weights ---------------------------------------------------------------------------------------

// Words [w, w + n) of a panel as they are multiplied: its own memory, or a copy.
const word* float_panel(WeightForm form, const void* panel, int64_t w, int64_t n, word* copy) {
  if (form == WeightForm::f32 || (kHasDot && form == WeightForm::bf16)) return (const word*)panel + w * kPanelFeatures;
  const int64_t begin = w * kPanelFeatures, count = n * kPanelFeatures;
  if (form == WeightForm::f16) {
    const uint16_t* from = (const uint16_t*)panel + begin;
    for (int64_t i = 0; i < count; i += VL) vstore((float*)copy + i, vload_f16(from + i));
    return copy;
  }
  const word* pairs = (const word*)panel + begin / 2;
  const vi upper = vi_set(0xffff0000u);
  for (int64_t i = 0; i < count / 2; i += kPanelFeatures)
    for (int64_t j = 0; j < kPanelFeatures; j += VL) {
      const vi pair = vi_load(pairs + i + j);
      vi_store(copy + 2 * i + j, vi_shift_left<16>(pair));
      vi_store(copy + 2 * i + kPanelFeatures + j, vi_and(pair, upper));
    }
  return copy;
}

// left and right[MR] += a block of at most kLinearBlock words of MR rows of a tile times words of a panel.
template <bool kDot, int MR>
DIFFQKV_INLINE void multiply_block(const word* x, const word* panel, int words, vf* left, vf* right) {
  DIFFQKV_UNROLL
  for (int w = 0; w < words; ++w) {
    const vf b0 = vload((const float*)panel + w * kPanelFeatures);
    const vf b1 = vload((const float*)panel + w * kPanelFeatures + VL);
    prefetch(panel + w * kPanelFeatures, 2 * VL * sizeof(word));
    DIFFQKV_UNROLL
    for (int i = 0; i < MR; ++i) {
      const word both = word_at(x + kLinearBlock * i + w);
      left[i] = mac<kDot>(both, b0, left[i]);
      right[i] = mac<kDot>(both, b1, right[i]);
    }
  }
}

// sums[MR][32] = MR rows of a tile of x times n words of a panel, or with `add` += it.
template <bool kDot, int MR>
void float_tile(const word* x, int64_t tile_rows, const word* panel, int64_t n, bool add, float* sums) {
  for (int64_t column = 0; column < kPanelFeatures; column += 2 * VL) {
    vf left[MR], right[MR];
    DIFFQKV_UNROLL
    for (int i = 0; i < MR; ++i) left[i] = right[i] = vset(0.0f);
    const word *a = x, *b = panel + column;
    int64_t w = n;
    for (; w >= kLinearBlock; w -= kLinearBlock, a += kLinearBlock * tile_rows, b += kLinearBlock * kPanelFeatures)
      multiply_block<kDot, MR>(a, b, kLinearBlock, left, right);
    for (; w > 0; --w, ++a, b += kPanelFeatures) multiply_block<kDot, MR>(a, b, 1, left, right);
    DIFFQKV_UNROLL
    for (int i = 0; i < MR; ++i) {
      float* to = sums + i * kPanelFeatures + column;
      vstore(to, add ? vadd(vload(to), left[i]) : left[i]);
      vstore(to + VL, add ? vadd(vload(to + VL), right[i]) : right[i]);
    }
  }
}

// sums[rows][32] = tiles of x, W words a row, times a panel.
template <bool kDot>
void multiply_floats(const PackedLinearParams& p, int64_t rows, const word* x, int64_t W, const void* panel, word* copy,
                     float* sums) {
  const int64_t stride = round_up(W, kLinearBlock);
  for (int64_t w = 0; w < W; w += kLinearWords) {
    const int64_t n = min_of(kLinearWords, W - w);
    const word* words = float_panel(p.form, panel, w, n, copy);
    for (int64_t r = 0; r < rows; r += kLinearTileRows) {
      const int64_t tile_rows = min_of(kLinearTileRows, rows - r);
      for_row_runs(tile_rows, [&]<int MR>(int64_t i) {
        float_tile<kDot, MR>(x + r * stride + w * tile_rows + kLinearBlock * i, tile_rows, words, n, w > 0,
                             sums + (r + i) * kPanelFeatures);
      });
    }
  }
}

// ---- integer weights ----------------------------------------------------------------------------------------------

// How integers lie in a panel. `load` makes pairs of 16-bit integers, weights plus kOffset, of a step's features
// [column, column + VL); every second pair is 2^kOddShift times that. Tiles of more than kRows rows, and several tiles,
// multiply them as Int16 instead.
struct Int8 {
  static constexpr int kPairs = 1, kBytes = 2 * kPanelFeatures, kOffset = 0, kOddShift = 0, kRows = kLinearTileRows;
  static DIFFQKV_INLINE void load(const uint8_t* step, int64_t column, vi* pairs) {
    pairs[0] = vi_load_int8((const int8_t*)step + 2 * column);
  }
};
struct Int4 {
  static constexpr int kPairs = 4, kBytes = 4 * kPanelFeatures, kOffset = 8, kOddShift = 4, kRows = 4;
  static DIFFQKV_INLINE void load(const uint8_t* step, int64_t column, vi* pairs) {
    const vi first = vi_load(step + 4 * column), second = vi_shift_right<8>(first);
    const vi low = vi_set(0x000f000fu), high = vi_set(0x00f000f0u);
    pairs[0] = vi_and(first, low);
    pairs[1] = vi_and(first, high);
    pairs[2] = vi_and(second, low);
    pairs[3] = vi_and(second, high);
  }
};
// What they are widened to.
struct Int16 {
  static constexpr int kPairs = 1, kBytes = 4 * kPanelFeatures, kOffset = 0, kOddShift = 0;
  static DIFFQKV_INLINE void load(const uint8_t* step, int64_t column, vi* pairs) {
    pairs[0] = vi_load(step + 4 * column);
  }
};

template <class Form>
void widen(const uint8_t* from, int64_t pairs, word* to) {
  const vi offset = vi_set(word(Form::kOffset) * 0x00010001u);
  for (int64_t done = 0; done < pairs; done += Form::kPairs, from += Form::kBytes)
    for (int64_t column = 0; column < kPanelFeatures; column += VL) {
      vi step[Form::kPairs];
      Form::load(from, column, step);
      for (int j = 0; j < Form::kPairs; ++j) {
        const vi pair = j % 2 == 1 ? vi_shift_right<Form::kOddShift>(step[j]) : step[j];
        vi_store(to + (done + j) * kPanelFeatures + column, vi_subtract_int16(pair, offset));
      }
    }
}

DIFFQKV_INLINE vf load_number(const void* from, DType dtype, int64_t i) {
  if (dtype == DType::f32) return vload((const float*)from + i);
  return dtype == DType::bf16 ? vload_bf16((const uint16_t*)from + i) : vload_f16((const uint16_t*)from + i);
}

// sums[MR][VL] of a row's 32 += the sums of even and of odd pairs [MR], by the scales of x and of the weights.
template <class Form, int MR>
DIFFQKV_INLINE void add_scaled(const PackedLinearParams& p, const vi* even, const vi* odd, const float* x_scale,
                               const int32_t* x_sum, int64_t scale_at, float* sums) {
  const vf scale = load_number(p.scales, p.scales_dtype, scale_at);
  DIFFQKV_UNROLL
  for (int i = 0; i < MR; ++i) {
    vi total = even[i];
    if (Form::kOddShift != 0) total = vi_add(total, vi_shift_right_signed<Form::kOddShift>(odd[i]));
    if (Form::kOffset != 0) total = vi_add(total, vi_set(word(-Form::kOffset * x_sum[i])));
    float* to = sums + i * kPanelFeatures;
    vstore(to, vfma(vmul(vi_to_float(total), vset(x_scale[i])), scale, vload(to)));
  }
  if (p.zeros == nullptr) return;
  const vf zero = load_number(p.zeros, p.scales_dtype, scale_at);
  DIFFQKV_UNROLL
  for (int i = 0; i < MR; ++i) {
    float* to = sums + i * kPanelFeatures;
    vstore(to, vfma(vset(x_scale[i] * float(x_sum[i])), zero, vload(to)));
  }
}

// sums[MR][32] += a group of MR rows of a tile of x, their scales and sums, times a group of weights.
template <class Form, int MR>
void integer_tile(const PackedLinearParams& p, const word* x, int64_t tile_rows, const float* x_scale,
                  const int32_t* x_sum, const uint8_t* weight, int64_t scale_at, float* sums) {
  constexpr int kKinds = Form::kOddShift == 0 ? 1 : 2;  // of pairs
  for (int64_t column = 0; column < kPanelFeatures; column += 2 * VL) {
    vi left[kKinds * MR], right[kKinds * MR];
    DIFFQKV_UNROLL
    for (int i = 0; i < kKinds * MR; ++i) left[i] = right[i] = vi_set(0);
    const uint8_t* step = weight;
    const word *a = x, *end = x + p.group_size / 2 * tile_rows;
    for (; a < end; a += kLinearBlock * tile_rows) {
      DIFFQKV_UNROLL
      for (int block = 0; block < kLinearBlock; block += Form::kPairs, step += Form::kBytes) {
        vi w0[Form::kPairs], w1[Form::kPairs];
        Form::load(step, column, w0);
        Form::load(step, column + VL, w1);
        DIFFQKV_UNROLL
        for (int j = 0; j < Form::kPairs; ++j) {
          DIFFQKV_UNROLL
          for (int i = 0; i < MR; ++i) {
            const vi both = vi_set(a[kLinearBlock * i + block + j]);
            const int to = j % kKinds * MR + i;
            left[to] = vi_dot(w0[j], both, left[to]);
            right[to] = vi_dot(w1[j], both, right[to]);
          }
        }
      }
    }
    constexpr int kOdd = (kKinds - 1) * MR;
    add_scaled<Form, MR>(p, left, left + kOdd, x_scale, x_sum, scale_at + column, sums + column);
    add_scaled<Form, MR>(p, right, right + kOdd, x_scale, x_sum, scale_at + column + VL, sums + column + VL);
  }
}

// sums[rows][32] = the rows from r0 on, tiles of x, times panel `n`.
template <class Form>
void multiply_integers(const PackedLinearParams& p, const PackedLinearRows& x, int64_t r0, int64_t rows, int64_t n,
                       word* copy, float* sums) {
  const int64_t groups = p.groups(), pairs = p.group_size / 2, bytes = pairs / Form::kPairs * Form::kBytes;
  const uint8_t* weight = (const uint8_t*)p.weight + n * groups * bytes;
  for (int64_t i = 0; i < rows * kPanelFeatures; ++i) sums[i] = 0.0f;
  for (int64_t g = 0; g < groups; ++g, weight += bytes) {
    const int64_t scale_at = (n * groups + g) * kPanelFeatures;
    prefetch(weight, bytes);
    const bool widens = rows > Form::kRows;
    if (widens) widen<Form>(weight, pairs, copy);
    for (int64_t r = 0; r < rows; r += kLinearTileRows) {
      const int64_t tile_rows = min_of(kLinearTileRows, rows - r), at = (r0 + r) * groups + g * tile_rows;
      for_row_runs(tile_rows, [&]<int MR>(int64_t i) {
        const word* words = x.words + at * pairs + kLinearBlock * i;
        float* to = sums + (r + i) * kPanelFeatures;
        if (MR > Form::kRows || widens)
          integer_tile<Int16, MR>(p, words, tile_rows, x.scales + at + i, x.sums + at + i, (const uint8_t*)copy,
                                  scale_at, to);
        else
          integer_tile<Form, MR>(p, words, tile_rows, x.scales + at + i, x.sums + at + i, weight, scale_at, to);
      });
    }
  }
}

// A group of x as integers of 16 bits: x is about scale * integer, to half of the scale. A group with a number that is
// not finite has a scale of NaN.
DIFFQKV_INLINE void group_to_integers(const float* x, int64_t n, int16_t* integers, float* scale, int32_t* sum) {
  constexpr float kLargest = 32767.0f, kLeast = 1e-30f;  // below it, the reciprocal would overflow
  vf largest = vset(kLeast), finite = vset(0.0f);
  for (int64_t i = 0; i < n; i += VL) {
    const vf v = vload(x + i);
    largest = vmax(vcopysign(v, vset(0.0f)), largest);
    finite = vfma(v, vset(0.0f), finite);  // NaN for infinities too
  }
  const float top = vmaximum(largest), bad = vsum(finite);
  *scale = top / kLargest + bad;
  *sum = 0;
  if (bad != 0.0f) {
    for (int64_t i = 0; i < n; ++i) integers[i] = 0;
    return;
  }
  const vf inverse = vset(kLargest / top);
  for (int64_t i = 0; i < n; i += VL) vstore_int16(integers + i, vmul(vload(x + i), inverse));
  for (int64_t i = 0; i < n; ++i) *sum += integers[i];
}

// n words of a row, in blocks, to its place in a tile; the last block may get zeros besides.
DIFFQKV_INLINE void place(const word* from, int64_t n, word* to, int64_t tile_rows) {
  for (; n >= kLinearBlock; n -= kLinearBlock, from += kLinearBlock, to += kLinearBlock * tile_rows)
    _mm_storeu_si128((__m128i*)to, _mm_loadu_si128((const __m128i*)from));
  for (int64_t w = 0; n > 0 && w < kLinearBlock; ++w) to[w] = w < n ? word_at(from + w) : 0;
}

// ---- items --------------------------------------------------------------------------------------------------------

// Row r of the results [n0, n0 + n), with the bias.
template <class E>
void store_features(const PackedLinearParams& p, int64_t r, int64_t n0, int64_t n, const float* sums) {
  using T = typename E::T;
  const T* bias = p.bias == nullptr ? nullptr : (const T*)p.bias + n0;
  T* out = (T*)p.out + r * p.out_features + n0;
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    const vf sum = vload(sums + i);
    E::store(out + i, bias == nullptr ? sum : vadd(sum, E::load(bias + i)));
  }
  for (; i < n; ++i) out[i] = E::put(bias == nullptr ? sums[i] : sums[i] + E::get(bias[i]));
}

void store_results(const PackedLinearParams& p, int64_t r0, int64_t rows, int64_t n0, const float* sums) {
  const int64_t n = min_of(kPanelFeatures, p.out_features - n0);
  for (int64_t r = r0; r < r0 + rows; ++r, sums += kPanelFeatures) {
    if (p.dtype == DType::f32)
      store_features<F32>(p, r, n0, n, sums);
    else if (p.dtype == DType::bf16)
      store_features<BF16>(p, r, n0, n, sums);
    else
      store_features<F16>(p, r, n0, n, sums);
  }
}

}  // namespace

namespace DIFFQKV_ISA {

void packed_linear_rows(const PackedLinearParams& p, const PackedLinearRows& rows, int64_t tile) {
  const int64_t r0 = tile * kLinearTileRows, n = min_of(kLinearTileRows, p.rows - r0), K = p.in_features,
                groups = p.groups();
  constexpr int64_t kPiece = kMostGroupSize;
  alignas(64) float numbers[kPiece];
  alignas(64) int16_t integers[kPiece];
  for (int64_t i = 0; i < n; ++i) {
    const char* x = (const char*)p.x + (r0 + i) * K * dtype_size(p.dtype);
    if (kHasDot && p.form == WeightForm::bf16) {
      place((const word*)x, K / 2, rows.words + r0 * round_up(K / 2, kLinearBlock) + kLinearBlock * i, n);
      continue;
    }
    const int64_t piece = p.is_integer() ? p.group_size : kPiece;
    for (int64_t k = 0, g = 0; k < K; k += piece, ++g) {
      const int64_t few = min_of(piece, K - k);
      row_to_float(x + k * dtype_size(p.dtype), p.dtype, few, numbers);
      if (p.is_integer()) {
        const int64_t at = r0 * groups + g * n + i;
        group_to_integers(numbers, few, integers, rows.scales + at, rows.sums + at);
        place((const word*)integers, few / 2, rows.words + (r0 * K + k * n) / 2 + kLinearBlock * i, n);
      } else {
        place((const word*)numbers, few, rows.words + r0 * round_up(K, kLinearBlock) + k * n + kLinearBlock * i, n);
      }
    }
  }
}

void packed_linear_block(const PackedLinearParams& p, const PackedLinearPlan& plan, const PackedLinearRows& x,
                         int64_t item, void* memory) {
  const int64_t r0 = item % plan.row_blocks * plan.row_block, rows = min_of(plan.row_block, p.rows - r0);
  const int64_t first = item / plan.row_blocks * plan.panels_per_item;
  const int64_t end = min_of(p.panels(), first + plan.panels_per_item);
  Scratch scratch(memory);
  float* sums = scratch.take<float>(rows * kPanelFeatures);
  word* copy = scratch.take<word>(kPanelFeatures * max_of(kLinearWords, p.is_integer() ? p.group_size / 2 : 0));

  const bool dots = kHasDot && p.form == WeightForm::bf16;
  const int64_t W = dots ? p.in_features / 2 : p.in_features;
  const word* words = x.words == nullptr ? (const word*)p.x : x.words + r0 * round_up(W, kLinearBlock);
  const int64_t panel_bytes = p.in_features * kPanelFeatures * (p.form == WeightForm::f32 ? 4 : 2);
  for (int64_t n = first; n < end; ++n) {
    const char* panel = (const char*)p.weight + n * panel_bytes;
    if (p.form == WeightForm::int8)
      multiply_integers<Int8>(p, x, r0, rows, n, copy, sums);
    else if (p.form == WeightForm::int4)
      multiply_integers<Int4>(p, x, r0, rows, n, copy, sums);
    else if (dots)
      multiply_floats<kHasDot>(p, rows, words, W, panel, copy, sums);
    else
      multiply_floats<false>(p, rows, words, W, panel, copy, sums);
    store_results(p, r0, rows, n * kPanelFeatures, sums);
  }
}

}  // namespace DIFFQKV_ISA
}  // namespace diffqkv
