#include "ops/attention_options.h"

#include <algorithm>
#include <cmath>

#include "ops/arguments.h"

namespace diffqkv {
namespace {

// No two tokens are farther apart. Windows end here, so that positions and windows add up without an overflow.
constexpr int64_t kFarthest = int64_t{1} << 40;

Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Times log2(e) it is still a number of float32.
constexpr double kMostScale = 1e38;

}  // namespace

double softmax_scale_of(std::optional<double> softmax_scale, int64_t d_k) {
  if (!softmax_scale) return 1.0 / std::sqrt(double(d_k));
  DIFFQKV_CHECK(std::abs(*softmax_scale) <= kMostScale, "softmax_scale: got ", *softmax_scale,
                ", want a number from -1e38 to 1e38");
  return *softmax_scale;
}

void AttentionOptions::apply(const Tensor& q, AttentionParams& p) {
  DIFFQKV_CHECK(window_left >= -1, "window_left: got ", window_left, ", want -1 (unlimited) or more");
  DIFFQKV_CHECK(window_right >= -1, "window_right: got ", window_right, ", want -1 (unlimited) or more");
  DIFFQKV_CHECK(softcap >= 0 && softcap <= kMostScale, "softcap: got ", softcap, ", want 0 (none) to 1e38");
  DIFFQKV_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p: got ", dropout_p, ", want a number in [0, 1)");
  DIFFQKV_CHECK(offset >= 0 && offset <= int64_t(UINT32_MAX), "offset: got ", offset, ", want 0 to 2**32 - 1");
  if (kv_start) check_per_entry("kv_start", *kv_start, p.batch, q);
  if (kv_end) check_per_entry("kv_end", *kv_end, p.batch, q);
  if (sinks) {
    check_sinks(*sinks, q, p.heads.n_q);
    wide_sinks = as_dtype(*sinks, wide_dtype(q));
    p.sinks = wide_sinks->data_ptr();
  }
  p.kv_start = kv_start ? static_cast<const int32_t*>(kv_start->data_ptr()) : nullptr;
  p.kv_end = kv_end ? static_cast<const int32_t*>(kv_end->data_ptr()) : nullptr;
  p.softmax_scale = softmax_scale_of(softmax_scale, p.d_k);
  p.softcap = softcap;
  p.window_left = std::min(window_left, kFarthest);
  p.window_right = causal ? 0 : std::min(window_right, kFarthest);
  p.dropout.threshold = uint32_t(std::min(65535.0, std::floor(dropout_p * 65536.0 + 0.5)));
  p.dropout.seed = uint64_t(seed);
  p.dropout.offset = uint32_t(offset);
}

Tensor AttentionOptions::new_dsinks(const Tensor& q) const {
  return torch::stable::new_empty(q, {wide_sinks ? wide_sinks->numel() : 0},
                                  wide_sinks ? wide_sinks->scalar_type() : ScalarType::Float);
}

Tensor AttentionOptions::as_sinks(const Tensor& dsinks) const {
  return wide_sinks ? as_dtype(dsinks, sinks->scalar_type()) : dsinks;
}

}  // namespace diffqkv
